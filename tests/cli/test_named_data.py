"""Benchmarks' own files through the command line: a split column, named data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]
MODEL = ("--epochs", "2", "--hidden-width", "8")


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
        data = (
            "--train",
            table_of_sets,
            "--split-column",
            "split",
            "--text-column",
            "text",
            "--label-column",
            "label",
        )
        data = (*data, "--backbone", tiny_bert_dir)
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

    def test_compare_file(self, levi_fast: Run, table_of_sets: str, tiny_bert_dir: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        pytest.importorskip("statsmodels")
        (tmp_path / "compare.yaml").write_text(
            "data: [{name: sets, train: all.csv, split_column: split, text_column: text, label_column: label}]\n"
            f"methods: [levi, linear-probe]\nseeds: [0]\nepochs: 1\nbackbone: {tiny_bert_dir}\n"
        )
        status, _, err = levi_fast("compare", str(tmp_path / "compare.yaml"), "--output", str(tmp_path / "compared"))
        assert status == 0, err
        found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
        assert found["data"]["sets"]["splits"] == ["ID", "OOD test", "OOD new"]

    def test_together_with_files_or_a_named_data_set(
        self, levi_fast: Run, table_of_sets: str, tmp_path: Path
    ) -> None:
        data = (
            "--train",
            table_of_sets,
            "--split-column",
            "split",
            "--text-column",
            "text",
            "--label-column",
            "label",
        )
        status, _, err = levi_fast("train", *data, "--test", table_of_sets, "--output", str(tmp_path / "model"))
        assert status == 2 and "--split-column: column 'split' names all sets of" in err
        named = ("--task-name", "movielens", "--data", str(tmp_path), "--split-column", "split")
        status, _, err = levi_fast("train", *named, "--output", str(tmp_path / "model"))
        assert status == 2 and "--task-name brings its own data" in err
