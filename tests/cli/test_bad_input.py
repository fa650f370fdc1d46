"""Bad input through the real command line: exit status 2, one line that says what is wrong, no model folder."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]
Rows = list[dict[str, Any]]


@pytest.fixture
def refused(levi_fast: Run, tmp_path: Path) -> Callable[..., str]:
    """Run a command that has to be refused; returns its message."""

    def run(*arguments: str) -> str:
        status, out, err = levi_fast(*arguments)
        assert status == 2 and out == "", err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, err
        # all of it is found before training: no epoch was reported, nothing was written
        assert "epoch 1 of" not in err
        assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".model*"))
        return lines[0]

    return run


def with_option(arguments: list[str], name: str, value: str) -> list[str]:
    place = arguments.index(name)
    return [*arguments[: place + 1], value, *arguments[place + 2 :]]


class TestFiles:
    def test_missing_column(self, refused: Callable[..., str], train_arguments: list[str]) -> None:
        message = refused(*with_option(train_arguments, "--text-column", "Text"))
        assert "train.csv: no column 'Text' (named by --text-column)" in message
        assert "did you mean 'text'?" in message

    def test_column_missing_in_the_ood_file_alone(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "new.csv").write_text("body,label\nx,pos\n")
        assert "new.csv: no column 'text'" in refused(*train_arguments)

    @pytest.mark.parametrize("content", ["", "text,label\n"])
    def test_empty_file(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path, content: str
    ) -> None:
        (tmp_path / "test.csv").write_text(content)
        assert re.search(r"test\.csv: the file (is empty|has a header but no rows)", refused(*train_arguments))

    def test_missing_file(self, refused: Callable[..., str], train_arguments: list[str]) -> None:
        assert "gone.csv: no such file" in refused(*with_option(train_arguments, "--train", "gone.csv"))

    def test_unknown_file_type(self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path) -> None:
        (tmp_path / "rows.xlsx").write_text("x")
        message = refused(*with_option(train_arguments, "--train", str(tmp_path / "rows.xlsx")))
        assert "unknown file type '.xlsx'; expected one of .csv, .tsv" in message

    def test_not_utf8(self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path) -> None:
        (tmp_path / "new.csv").write_bytes(b"text,label\ncaf\xe9,pos\n")
        assert "new.csv: expected UTF-8 text, got byte 0xe9 at offset 14 (line 2)" in refused(*train_arguments)


class TestLabels:
    def test_label_of_an_ood_file_that_training_did_not_show(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path
    ) -> None:
        (tmp_path / "new.csv").write_text("text,label\ngood,pos\nfine,neutral\n")
        message = refused(*train_arguments)
        assert "row 2 of" in message and "new.csv" in message
        assert "label 'neutral' does not occur in the training file; known labels: neg, pos" in message

    @pytest.mark.parametrize("cell", ["", "NaN"])
    def test_missing_label(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path, cell: str
    ) -> None:
        (tmp_path / "train.csv").write_text(f"text,label\ngood,pos\nbad,neg\nfine,{cell}\n")
        message = refused(*train_arguments)
        assert "row 3 of" in message and "train.csv: column 'label': the label is missing" in message

    @pytest.mark.parametrize("cell", ["four", "inf"])
    def test_regression_label_that_is_no_finite_number(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path, cell: str
    ) -> None:
        (tmp_path / "train.csv").write_text(f"text,label\ngood,4.5\nbad,{cell}\nfine,3\n")
        message = refused(*train_arguments, "--problem-type", "regression")
        assert "row 2 of" in message and f"expected a finite number, got '{cell}'" in message

    def test_nan_label_in_parquet(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        path = tmp_path / "train.parquet"
        pyarrow.parquet.write_table(pa.table({"text": ["a", "b"], "label": [1.5, float("nan")]}), path)
        message = refused(*with_option(train_arguments, "--train", str(path)))
        assert "row 2 of" in message and "the label is missing (got nan)" in message


class TestRows:
    def test_row_without_text(self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path) -> None:
        (tmp_path / "test.csv").write_text('text,label\ngood,pos\n"   ",neg\n')
        message = refused(*train_arguments)
        assert "row 2 of" in message and "test.csv: no text in 'text'" in message

    def test_text_that_the_tokenizer_turns_into_nothing(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path, tiny_bert_dir: str
    ) -> None:
        """Without special tokens, a text of characters that the tokenizer drops would be a row of padding."""
        import shutil

        from tokenizers import Tokenizer, normalizers

        folder = tmp_path / "bare"
        shutil.copytree(tiny_bert_dir, folder)
        core = Tokenizer.from_file(str(folder / "tokenizer.json"))
        core.post_processor = None
        core.normalizer = normalizers.Replace("~", " ")
        core.save(str(folder / "tokenizer.json"))
        (tmp_path / "new.csv").write_text("text,label\ngood,pos\n~~~,neg\n")
        message = refused(*with_option(train_arguments, "--backbone", str(folder)))
        assert "row 2 of" in message and "new.csv" in message and "it would be all padding" in message

    def test_cell_that_is_no_number(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path
    ) -> None:
        message = refused(*train_arguments, "--numeric-column", "colour")
        assert "row 1 of" in message and "column 'colour': expected a finite number" in message


class TestArguments:
    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            (["--taps", "7"], "taps[0]: 7 is out of range for a backbone of 3 layers (0 to 2, or -3 to -1)"),
            (["--taps", "even:9"], "even:k needs k from 1 to 3"),
            (["--taps", "some"], "taps: expected"),
            (["--ood", "x.csv"], "--ood: expected NAME=FILE, such as new=reviews.csv, got 'x.csv'"),
            (["--ood", "new=other.csv"], "--ood: the name 'new' is given twice"),
            (["--method", "magic"], "--method: expected one of levi, levi-no-standalone, levi-last-tap"),
            (["--method", "linear-probe", "--taps", "all"], "--taps: --method linear-probe reads the last layer"),
            (["--method", "head2toe", "--no-precompute"], "--no-precompute: --method head2toe selects among"),
            (["--method", "lora", "--backbone-training", "full"], "--backbone-training full: --method lora is lora"),
            (["--method", "lp-ft", "--backbone-dtype", "int8", "--device", "cpu"], "int8: cannot be trained (full)"),
            (["--method", "output-ensemble", "--task-model", "none"], "--method output-ensemble needs a task model"),
            (["--method", "task-model", "--task-model", "none"], "--method task-model needs a task model"),
            (["--task-model", "tabular"], "--task-model tabular needs --numeric-column or --categorical-column"),
            (["--task-model", "forest"], "--task-model: expected one of auto, text"),
            (["--problem-type", "ranking"], "--problem-type: expected one of"),
            (["--blend", "half"], "--blend: expected 'auto' or a number from 0 to 1, got 'half'"),
            (["--blend", "2"], "--blend: expected 'auto' or a number from 0 to 1, got 2.0"),
            (["--cross-fit", "1"], "--cross-fit: expected 0 or at least 2 folds, got 1"),
            (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got 0"),
            (["--learning-rate", "-1"], "--learning-rate: expected a positive number"),
            (["--seed", "-1"], "--seed: expected a whole number"),
            (["--device", "tpu"], "--device: expected auto, cpu or cuda, got 'tpu'"),
            (["--max-length", "65"], "--max-length: expected a number between 3 and 64"),
            (["--view-dropout", "1.5"], "view_dropout: expected a number in [0, 1], got 1.5"),
            (["--view-loss", "-1"], "view_loss: expected a number of at least 0, got -1.0"),
            (["--mix", "learned"], "'learned' mixing weights get no gradient from objective='per_layer'"),
            (["--pooling", "max"], "pooling: expected one of mean, cls, last, token, got 'max'"),
            (["--text-column", "label"], "column 'label' is named twice"),
            (["--task-name", "movielens"], "--task-name brings its own data"),
            (["--data", "x"], "--data: only with --task-name"),
            (["--backbone", "./nowhere"], "'./nowhere'"),
            (
                ["--backbone-dtype", "int2"],
                "--backbone-dtype: expected one of float32, bfloat16, int8, int4, got 'int2'",
            ),
            (["--loop", "fast"], "--loop: expected one of auto, trainer, lean, graph, got 'fast'"),
            (
                ["--loop", "graph", "--device", "cpu"],
                "--loop graph: replays CUDA graphs, and --device cpu is the CPU",
            ),
        ],
    )
    def test_refused_with_the_reason(
        self, refused: Callable[..., str], train_arguments: list[str], extra: list[str], message: str
    ) -> None:
        assert message in refused(*train_arguments, *extra)

    def test_no_data_at_all(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert "expected --train FILE" in refused("train", "--output", str(tmp_path / "model"))

    def test_no_label_or_text_column(
        self, refused: Callable[..., str], train_arguments: list[str], tmp_path: Path
    ) -> None:
        train = train_arguments[train_arguments.index("--train") + 1]
        output = ["--output", str(tmp_path / "model")]
        assert "--label-column: expected the name" in refused("train", "--train", train, *output)
        message = refused("train", "--train", train, "--label-column", "label", *output)
        assert "--text-column: --method levi reads text with the backbone" in message

    def test_output_folder_with_content(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "precious.txt").write_text("mine")
        # even before the files are looked at
        status, _, err = levi_fast(*with_option(train_arguments, "--train", "gone.csv"))
        assert status == 2 and "exists and is not empty" in err and str(folder) in err
        assert (folder / "precious.txt").read_text() == "mine"

    def test_output_that_is_a_file(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        (tmp_path / "model").write_text("mine")
        status, _, err = levi_fast(*train_arguments)
        assert status == 2 and "is a file" in err
        assert (tmp_path / "model").read_text() == "mine"

    def test_named_task(self, refused: Callable[..., str], tmp_path: Path) -> None:
        output = ["--output", str(tmp_path / "model")]
        names = "movielens, amazon, image-folders, domainnet, retinopathy, digits"
        assert f"--task-name: expected {names}, got 'imdb'" in refused("train", "--task-name", "imdb", *output)
        assert "needs --data" in refused("train", "--task-name", "movielens", *output)
        assert "movies.csv is missing" in refused(
            "train", "--task-name", "movielens", "--data", str(tmp_path), *output
        )


def test_debug_shows_the_traceback(train_arguments: list[str]) -> None:
    command = [sys.executable, "-m", "levi_fast", *with_option(train_arguments, "--train", "gone.csv")]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert plain.returncode == 2 and plain.stderr.splitlines()[-1] == "error: gone.csv: no such file"
    assert "Traceback" not in plain.stderr
    debug = subprocess.run(
        command, capture_output=True, text=True, env={**__import__("os").environ, "LEVI_FAST_DEBUG": "1"}
    )
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "gone.csv: no such file" in debug.stderr
