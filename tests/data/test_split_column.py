"""A column that names each row's set: what WILDS' own files become."""

from __future__ import annotations

from pathlib import Path

import pytest

from levi_fast.data.split_column import divide
from levi_fast.data.tables import Columns, Table, read_table
from levi_fast.errors import DataError
from levi_fast.training.tasks import TableFiles, TableTask

# The header and the first cells of CivilComments-WILDS' all_data_with_identities.csv; the first column has no name.
CIVIL_COMMENTS = """,id,created_date,publication_id,toxicity,comment_text,split,male,female,LGBTQ,identity_any
0,5310247,2017-05-22 20:39:10,21,0.0,"Too dumb to even answer.",train,0.0,0.0,0.0,0.0
1,5670043,2017-07-31 22:06:03,54,1.0,"You are a fool, sir.",train,0.0,1.0,0.0,1.0
2,1000000,2017-07-31 22:06:03,54,0.0,"Thank you.",val,0.0,0.0,0.0,0.0
3,1000001,2017-07-31 22:06:03,54,1.0,"Nonsense!",test,1.0,0.0,0.0,1.0
4,1000002,2017-07-31 22:06:03,54,0.0,"I agree.",test,0.0,0.0,0.0,0.0
"""


def table(*values: object) -> Table:
    return Table("rows.csv", len(values), {"split": list(values), "place": list(range(len(values)))})


def divided(*values: object) -> dict[str, list[int]]:
    return {name: part.cells["place"] for name, part in divide(table(*values), "split").items()}


def error(*values: object) -> str:
    with pytest.raises(DataError) as caught:
        divide(table(*values), "split")
    return str(caught.value)


class TestNames:
    def test_val_and_test_alone_are_in_distribution(self) -> None:
        assert divided("test", "train", "val", "train") == {"train": [1, 3], "validation": [2], "test": [0]}

    def test_beside_id_val_and_id_test_they_are_not(self) -> None:
        """As in iWildCam, FMoW, Camelyon17 and Amazon."""
        found = divided("train", "val", "test", "id_val", "id_test", "test")
        assert found == {"train": [0], "validation": [3], "test": [4], "ood val": [1], "ood test": [2, 5]}

    def test_id_test_alone_says_so_too(self) -> None:
        """As in DomainNet, which has no id_val."""
        assert divided("train", "val", "test", "id_test") == {
            "train": [0], "test": [3], "ood val": [1], "ood test": [2]
        }  # fmt: skip

    def test_other_values_are_named_sets(self) -> None:
        found = divided("2023", "train", "ood_test", "Hospital 3", "dev")
        assert found == {
            "train": [1], "validation": [4], "ood 2023": [0], "ood ood_test": [2], "ood Hospital 3": [3]
        }  # fmt: skip

    @pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev", "VAL"])
    def test_validation_has_many_names(self, name: str) -> None:
        assert divided("Train", name) == {"train": [0], "validation": [1]}


class TestCodes:
    @pytest.mark.parametrize("kind", [int, str, float])
    def test_the_default_codes(self, kind: type) -> None:
        """As in Waterbirds' metadata.csv and CelebA's list_eval_partition.csv; -1 as in Amazon's splits/user.csv."""
        assert divided(*map(kind, [2, 0, 1, -1, 0])) == {"train": [1, 4], "validation": [2], "test": [0]}  # type: ignore[arg-type]

    def test_codes_that_mean_something_else_in_every_data_set(self) -> None:
        message = error("0", "1", "3", "2", "4")
        assert "rows.csv: column 'split': expected the codes 0 (train), 1 (val), 2 (test)" in message
        assert "got 3;" in message and "id_val" in message

    def test_numbers_beside_names_are_names(self) -> None:
        assert divided("train", "1") == {"train": [0], "ood 1": [1]}


class TestUnusable:
    def test_no_training_rows(self) -> None:
        assert error("val", "new") == (
            "rows.csv: column 'split': no training rows: expected some with 'train', found 'val', 'new'"
        )
        assert "no training rows" in error(1, 2)

    @pytest.mark.parametrize("cell", [None, "", "  ", float("nan")])
    def test_an_empty_cell(self, cell: object) -> None:
        assert "row 2 of rows.csv: column 'split': expected the name of a set, got" in error("train", cell)

    def test_one_set_under_two_names(self) -> None:
        assert "'val' and 'validation' name the same set" in error("train", "val", "validation")


class TestFiles:
    def test_civil_comments(self, tmp_path: Path) -> None:
        path = tmp_path / "all_data_with_identities.csv"
        path.write_text(CIVIL_COMMENTS)
        columns = Columns(text=("comment_text",), label="toxicity", split="split")
        task = TableTask.load(TableFiles(str(path)), columns, problem_type="single_label_classification")
        assert {name: part.num_rows for name, part in task.tables.items()} == {"train": 2, "validation": 1, "test": 2}
        assert task.tables["test"].cells["comment_text"] == ["Nonsense!", "I agree."]
        assert task.processor.labels is not None and task.processor.labels.names == ("0", "1")
        assert task.processor.columns.split is None  # a row to predict needs no split

    def test_without_validation_rows_a_part_of_training_is_held_out(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text("text,label,split\n" + "good,a,train\nbad,b,train\n" * 10 + "odd,a,new\n")
        task = TableTask.load(TableFiles(str(path)), Columns(text=("text",), label="label", split="split"))
        assert {name: part.num_rows for name, part in task.tables.items()} == {
            "train": 18, "validation": 2, "ood new": 1
        }  # fmt: skip

    def test_rows_keep_their_number_in_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text("text,label,split\ngood,a,train\nbad,b,train\nfine,a,test\nodd,c,test\n")
        with pytest.raises(DataError, match=r"row 4 of .*rows.csv: column 'label': label 'c' does not occur"):
            TableTask.load(TableFiles(str(path)), Columns(text=("text",), label="label", split="split"))

    def test_other_files_beside_it(self) -> None:
        columns = Columns(text=("text",), label="label", split="split")
        for files in (
            TableFiles("a.csv", validation="b.csv"),
            TableFiles("a.csv", test="b.csv"),
            TableFiles("a.csv", ood={"new": "b.csv"}),
        ):
            with pytest.raises(DataError, match=r"--split-column: column 'split' names all sets of a\.csv"):
                TableTask.load(files, columns)

    def test_unknown_or_doubled_column(self, tmp_path: Path) -> None:
        path = tmp_path / "rows.csv"
        path.write_text("text,label,Split\ngood,a,train\n")
        with pytest.raises(DataError, match=r"no column 'split' \(named by --split-column\).*did you mean 'Split'"):
            read_table(path, Columns(text=("text",), label="label", split="split"))
        with pytest.raises(DataError, match="'label' is named twice: by --label-column and by --split-column"):
            Columns(text=("text",), label="label", split="label")
