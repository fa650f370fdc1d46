"""Benchmarks' own files through the command line: a split column, named data sets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]
Compared = Callable[[str], tuple[dict[str, Any], str]]
MODEL = ("--epochs", "2", "--hidden-width", "8")
COLUMNS = ("--split-column", "split", "--text-column", "text", "--label-column", "label")


@pytest.fixture
def table_of_sets(
    make_rows: Callable[..., list[dict[str, Any]]], write_rows: Callable[[str, list[dict[str, Any]]], str]
) -> str:
    """One CSV file with 40 training, 10 ID validation, 10 ID test, 10 ``test`` and 10 ``new`` rows, as in WILDS."""
    rows = make_rows(80)
    names = ["train"] * 40 + ["id_val"] * 10 + ["id_test"] * 10 + ["test"] * 10 + ["new"] * 10
    return write_rows("all.csv", [{**row, "split": name} for row, name in zip(rows, names, strict=True)])


class TestSplitColumn:
    def test_train_cache_select_and_compare(
        self, levi_fast: Run, table_of_sets: str, tiny_bert_dir: str, tmp_path: Path
    ) -> None:
        data = ("--train", table_of_sets, *COLUMNS, "--backbone", tiny_bert_dir)
        cache = ("--cache", str(tmp_path / "taps"))
        assert levi_fast("cache", "build", *data, *cache)[0] == 0
        status, _, err = levi_fast("train", *data, *MODEL, *cache, "--output", str(tmp_path / "model"))
        assert status == 0, err
        metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
        sizes = {"train": 40, "validation": 10, "test": 10, "ood": {"test": 10, "new": 10}}
        assert metrics["sizes"] == sizes and set(metrics["ood"]) == {"test", "new"}
        # the model reads no split: a file without the column can be evaluated
        (tmp_path / "more.csv").write_text("text,label\na good film,pos\n")
        assert levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "more.csv"))[0] == 0
        assert levi_fast("select-taps", *data, "--selector", "cka:1")[0] == 0

    def test_compare_file(self, compared: Compared, table_of_sets: str, tiny_bert_dir: str) -> None:
        found, _ = compared(
            "data: [{name: sets, train: all.csv, split_column: split, text_column: text, label_column: label}]\n"
            f"methods: [levi, linear-probe]\nseeds: [0]\nepochs: 1\nbackbone: {tiny_bert_dir}\n"
        )
        assert found["data"]["sets"]["splits"] == ["ID", "OOD test", "OOD new"]

    def test_together_with_files_or_a_named_data_set(
        self, levi_fast: Run, table_of_sets: str, tmp_path: Path
    ) -> None:
        data = ("--train", table_of_sets, *COLUMNS)
        status, _, err = levi_fast("train", *data, "--test", table_of_sets, "--output", str(tmp_path / "model"))
        assert status == 2 and "--split-column: column 'split' names all sets of" in err
        named = ("--task-name", "movielens", "--data", str(tmp_path), "--split-column", "split")
        status, _, err = levi_fast("train", *named, "--output", str(tmp_path / "model"))
        assert status == 2 and "--task-name brings its own data" in err


class TestAmazon:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Two categories, the one in the format of 2018, gzipped, the other in that of 2023."""
        folder = tmp_path / "amazon"
        folder.mkdir()
        words = ["awful bad book", "poor dull book", "the book", "good fine book", "great lovely book"]
        stars = [1 + place % 5 for place in range(200)]
        old = [
            {
                "overall": float(s),
                "reviewerID": f"A{place}",
                "asin": "1",
                "summary": "a book",
                "reviewText": words[s - 1],
            }
            for place, s in enumerate(stars)
        ]
        new = [
            {"rating": float(s), "user_id": f"A{place}", "parent_asin": "1", "title": "a film", "text": words[s - 1]}
            for place, s in enumerate(stars)
        ]
        (folder / "Books_5.json.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in old).encode()))
        (folder / "Movies_and_TV.jsonl").write_text("".join(json.dumps(r) + "\n" for r in new))
        return folder

    def test_train_and_evaluate(self, levi_fast: Run, folder: Path, tiny_bert_dir: str, tmp_path: Path) -> None:
        model, metrics = tmp_path / "model", tmp_path / "again.json"
        data = ("--task-name", "amazon", "--data", str(folder), "--split", "Books", "--max-train-rows", "100")
        data = (*data, "--max-eval-rows", "20", "--backbone", tiny_bert_dir)
        status, _, err = levi_fast("train", *data, *MODEL, "--output", str(model))
        assert status == 0, err
        found = json.loads((model / "metrics.json").read_text())
        assert found["task"] == "amazon" and found["problem_type"] == "regression"
        assert found["sizes"]["train"] == 100 and found["sizes"]["ood"] == {"Movies_and_TV": 20}
        status, _, err = levi_fast("evaluate", "--model", str(model), "--data", str(folder), "--output", str(metrics))
        assert status == 0, err
        again = json.loads(metrics.read_text())
        assert again["id"] == found["id"] and again["ood"] == found["ood"]

    def test_five_classes_as_in_wilds(self, levi_fast: Run, folder: Path, tiny_bert_dir: str, tmp_path: Path) -> None:
        data = ("--task-name", "amazon", "--data", str(folder / "Books_5.json.gz"), "--backbone", tiny_bert_dir)
        kind = ("--problem-type", "single_label_classification")
        status, _, err = levi_fast("train", *data, *kind, *MODEL, "--output", str(tmp_path / "model"))
        assert status == 0, err
        assert "5 labels: 1, 2, 3, 4, 5" in err
        found = json.loads((tmp_path / "model" / "metrics.json").read_text())
        assert "accuracy" in found["id"] and found["ood"] == {}

    def test_compare_file(self, compared: Compared, folder: Path, tiny_bert_dir: str) -> None:
        found, err = compared(
            "data: [{name: products, task_name: amazon, data: amazon, split: [Books]}]\nmax_train_rows: 50\n"
            f"methods: [levi, linear-probe]\nseeds: [0]\nepochs: 1\nbackbone: {tiny_bert_dir}\n"
        )
        assert "50 train" in err
        assert found["data"]["products"]["splits"] == ["ID", "OOD Movies_and_TV"]

    def test_refused(self, levi_fast: Run, folder: Path, tmp_path: Path) -> None:
        output = ("--output", str(tmp_path / "model"))
        status, _, err = levi_fast("train", "--task-name", "amazon", "--data", str(folder), *output)
        assert (
            status == 2 and "expected the categories to train on, separated by commas, of Books, Movies_and_TV" in err
        )
        status, _, err = levi_fast("train", "--task-name", "amazon", *output)
        assert status == 2 and "--task-name amazon needs --data, a folder with files such as Books.json.gz" in err
        status, _, err = levi_fast("train", "--train", "a.csv", "--max-train-rows", "5", *output)
        assert status == 2 and "--max-train-rows, --max-eval-rows: only with --task-name movielens, amazon" in err
        assert not (tmp_path / "model").exists()
