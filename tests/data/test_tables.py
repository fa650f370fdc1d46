"""Reading tables: what comes out, and that every kind of unusable file gives an error that says where and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from levi_fast.data.tables import Columns, read_table
from levi_fast.errors import DataError

TEXT_AND_LABEL = Columns(text=("text",), label="label")


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def parquet(folder: Path, columns: dict[str, list[object]]) -> str:
    import pyarrow as pa
    import pyarrow.parquet

    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def error(path: str, columns: Columns = TEXT_AND_LABEL) -> str:
    with pytest.raises(DataError) as caught:
        read_table(path, columns)
    return str(caught.value)


class TestReading:
    def test_the_four_formats_agree(self, tmp_path: Path) -> None:
        texts, labels = ["good, very", 'a "b"', "line\nbreak", "naïve ☃"], ["x", "NA", "None", "y"]
        rows = [{"text": t, "label": c} for t, c in zip(texts, labels, strict=True)]
        quoted = [(t.replace('"', '""'), c) for t, c in zip(texts, labels, strict=True)]
        paths = [
            write(tmp_path, "a.csv", "text,label\n" + "".join(f'"{t}",{c}\n' for t, c in quoted)),
            write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f'"{t}"\t{c}\n' for t, c in quoted)),
            write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows)),
            parquet(tmp_path, {"text": texts, "label": labels}),
        ]
        for path in paths:
            table = read_table(path, TEXT_AND_LABEL)
            assert table.texts(("text",)) == texts, path
            assert table.cells["label"] == labels, path

    def test_only_the_named_columns_are_read(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.csv", "label,other,text\n1,x,hello\n")
        assert set(read_table(path, TEXT_AND_LABEL).cells) == {"text", "label"}

    def test_byte_order_mark_windows_newlines_and_odd_file_names(self, tmp_path: Path) -> None:
        folder = tmp_path / "we[1]rd *"
        folder.mkdir()
        path = write(folder, "a b?.csv", b"\xef\xbb\xbftext,label\r\nhello,1\r\n")
        assert read_table(path, TEXT_AND_LABEL).cells == {"text": ["hello"], "label": ["1"]}

    def test_text_columns_are_joined_and_empty_cells_left_out(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.csv", "title,body\nT,B\n,B\nT,\n")
        table = read_table(path, Columns(text=("title", "body")))
        assert table.texts(("title", "body")) == ["T\nB", "B", "T"]

    def test_a_very_long_cell(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.csv", "text,label\n" + "word " * 100_000 + ",1\n")
        assert len(read_table(path, TEXT_AND_LABEL).texts(("text",))[0]) == 499_999

    def test_nothing_stays_in_the_cache_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        cache = tmp_path / "cache"
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        read_table(write(tmp_path, "a.csv", "text,label\nhello,1\n"), TEXT_AND_LABEL)
        assert not cache.exists() or not any(cache.rglob("*.arrow"))

    def test_the_label_column_may_be_missing_only_when_allowed(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.csv", "text\nhello\n")
        assert "label" not in read_table(path, TEXT_AND_LABEL, label_required=False).cells
        assert "no column 'label' (named by --label-column)" in error(path)

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        cells=st.lists(
            st.text(st.characters(codec="utf-8", exclude_characters="\r\0", exclude_categories=["Cs"]), max_size=30),
            min_size=1,
            max_size=8,
        )
    )
    def test_any_text_survives_csv(self, tmp_path: Path, cells: list[str]) -> None:
        import csv

        path = tmp_path / "any.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerow(["text", "label"])
            writer.writerows([cell, "1"] for cell in cells)
        assert read_table(path, TEXT_AND_LABEL).cells["text"] == cells


class TestUnusableFiles:
    def test_missing_file(self, tmp_path: Path) -> None:
        assert error(str(tmp_path / "none.csv")) == f"{tmp_path / 'none.csv'}: no such file"

    def test_folder(self, tmp_path: Path) -> None:
        assert "expected a file, got a folder" in error(str(tmp_path))

    def test_unknown_extension(self, tmp_path: Path) -> None:
        message = error(write(tmp_path, "a.xlsx", "x"))
        assert "'.xlsx'" in message and ".csv, .tsv, .jsonl" in message and ".parquet" in message

    def test_missing_column_lists_those_present_and_suggests(self, tmp_path: Path) -> None:
        message = error(write(tmp_path, "a.csv", "Texts,label\nx,1\n"))
        assert "no column 'text' (named by --text-column)" in message
        assert "the file has 'Texts', 'label'" in message
        assert message.endswith("did you mean 'Texts'?")

    @pytest.mark.parametrize(
        ("name", "content"), [("a.csv", ""), ("a.tsv", "\n\n"), ("a.jsonl", ""), ("b.csv", "text,label\n")]
    )
    def test_empty(self, tmp_path: Path, name: str, content: str) -> None:
        message = error(write(tmp_path, name, content))
        assert name in message and ("empty" in message or "no rows" in message)

    def test_empty_parquet(self, tmp_path: Path) -> None:
        assert "no rows" in error(parquet(tmp_path, {"text": [], "label": []}))

    @pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
    def test_not_utf8_names_byte_and_line(self, tmp_path: Path, name: str) -> None:
        message = error(write(tmp_path, name, b"text,label\nfine,1\ncaf\xe9,1\n"))
        assert "expected UTF-8 text, got byte 0xe9 at offset 21 (line 3)" in message

    def test_utf16_is_recognised(self, tmp_path: Path) -> None:
        assert "looks like UTF-16" in error(write(tmp_path, "a.csv", "text,label\nx,1\n".encode("utf-16")))

    def test_doubled_column(self, tmp_path: Path) -> None:
        assert "'text' stands 2 times" in error(write(tmp_path, "a.csv", "text,text,label\na,b,1\n"))

    def test_rows_longer_than_the_header(self, tmp_path: Path) -> None:
        assert "row 1 has 3 cells, the header has 2" in error(write(tmp_path, "a.csv", "text,label\na,b,1\n"))
        message = error(write(tmp_path, "b.csv", "text,label\na,1\nb,2,3\n"))
        assert "cannot be read as CSV" in message and "line 3" in message

    def test_broken_json_names_the_line(self, tmp_path: Path) -> None:
        message = error(write(tmp_path, "a.jsonl", '{"text": "a", "label": 1}\n{"text": \n'))
        assert "cannot be read as JSONL: line 2" in message
        message = error(write(tmp_path, "b.jsonl", '{"text": "a", "label": 1}\n[1, 2]\n'))
        assert "line 2: expected an object" in message

    def test_broken_parquet(self, tmp_path: Path) -> None:
        assert "cannot be read as PARQUET" in error(write(tmp_path, "a.parquet", b"PAR1 nothing PAR1"))

    def test_one_column_in_two_parts(self) -> None:
        with pytest.raises(DataError, match=r"'text' is named twice: by --text-column and by --label-column"):
            Columns(text=("text",), label="text")


class TestCells:
    def test_row_without_text(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, "a.csv", 'text,label\nfine,1\n"  ",2\n'), TEXT_AND_LABEL)
        with pytest.raises(DataError, match=r"row 2 of .*a\.csv: no text in 'text'"):
            table.texts(("text",))

    def test_a_row_cut_short_has_no_label_and_no_text(self, tmp_path: Path) -> None:
        table = read_table(write(tmp_path, "a.csv", "label,text\n1,fine\n2\n"), TEXT_AND_LABEL)
        with pytest.raises(DataError, match=r"row 2 .* no text"):
            table.texts(("text",))

    def test_numbers(self, tmp_path: Path) -> None:
        path = write(tmp_path, "a.csv", "x\n1\n-2.5e3\n\nNA\n 7 \n")
        table = read_table(path, Columns(numeric=("x",)))
        values = table.numbers("x")
        assert values[:2] == [1.0, -2500.0] and values[2] != values[2] and values[3] == 7.0

    @pytest.mark.parametrize("cell", ["abc", "1,5", "inf", "1_000", "12 kg"])
    def test_cell_that_is_no_number(self, tmp_path: Path, cell: str) -> None:
        table = read_table(write(tmp_path, "a.csv", f'x\n1\n"{cell}"\n'), Columns(numeric=("x",)))
        with pytest.raises(DataError, match=r"row 2 of .*column 'x': expected a finite number") as caught:
            table.numbers("x")
        assert cell in str(caught.value)

    def test_one_category_in_three_formats(self, tmp_path: Path) -> None:
        columns = Columns(categorical=("c",))
        from_csv = read_table(write(tmp_path, "a.csv", 'c\n1\n""\nx\n'), columns).categories("c")
        from_parquet = read_table(parquet(tmp_path, {"c": [1.0, None, 2.5]}), columns).categories("c")
        assert from_csv == ["1", None, "x"]
        assert from_parquet == ["1", None, "2.5"]
