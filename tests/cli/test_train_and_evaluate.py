"""Training and evaluation through the command line, end to end on a tiny backbone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from levi_fast.training.methods import METHODS

Run = Callable[..., tuple[int, str, str]]
Rows = list[dict[str, Any]]


def metrics(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return document


def probabilities(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


class TestTrain:
    def test_writes_a_model_folder_and_a_table(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, tiny_bert_dir: str
    ) -> None:
        status, out, err = levi_fast(*train_arguments)
        assert status == 0, err
        assert "ID (test)" in out and "OOD new" in out and "accuracy" in out
        assert "inferred from column 'label'" in err and "labels: neg, pos" in err
        folder = tmp_path / "model"
        assert {"config.json", "model.safetensors", "tokenizer.json", "levi_processor.json", "metrics.json"} <= {
            path.name for path in folder.iterdir()
        }
        assert not any(
            "checkpoint" in path.name or path.suffix in (".bin", ".pt", ".pkl") for path in folder.rglob("*")
        )
        config = json.loads((folder / "config.json").read_text())
        assert config["id2label"] == {"0": "neg", "1": "pos"}
        found = metrics(folder)
        assert set(found["id"]) == {"accuracy", "macro_f1", "log_loss"} == set(found["ood"]["new"])
        assert found["id_split"] == "test" and found["method"] == "levi" and found["blend"] in (0.0, 0.5, 1.0)
        assert found["blend"] == config["blend"]
        assert 1 <= found["best_epoch"] <= found["epochs"] == 3
        assert found["sizes"] == {"train": 36, "validation": 4, "test": 40, "ood": {"new": 40}}
        assert found["seed"] == 0 and found["backbone"] == config["backbone"] and found["trained_parameters"] > 0
        assert found["seconds"] > 0 and {"torch", "transformers"} <= set(found["versions"])

    def test_without_a_test_file_the_validation_figures_are_named_so(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        place = train_arguments.index("--test")
        status, out, err = levi_fast(*train_arguments[:place], *train_arguments[place + 2 :])
        assert status == 0, err
        assert "ID (validation)" in out and "no --test file" in err
        found = metrics(tmp_path / "model")
        assert found["id_split"] == "validation" and found["id"] == pytest.approx(found["validation"], rel=1e-6)
        assert found["sizes"]["test"] is None

    def test_the_same_seed_gives_the_same_model(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
            status, _, err = levi_fast(*train_arguments, "--seed", seed, "--output", str(tmp_path / name))
            assert status == 0, err
        weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
        assert weights["a"] == weights["b"] != weights["c"]

    def test_both_loops_give_the_same_bits(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        for loop in ("trainer", "lean"):
            status, _, err = levi_fast(*train_arguments, "--loop", loop, "--output", str(tmp_path / loop))
            assert status == 0, err
        one, other = metrics(tmp_path / "trainer"), metrics(tmp_path / "lean")
        assert (one["id"], one["ood"], one["best_epoch"]) == (other["id"], other["ood"], other["best_epoch"])
        weights = [(tmp_path / loop / "model.safetensors").read_bytes() for loop in ("trainer", "lean")]
        assert weights[0] == weights[1]

    @pytest.mark.parametrize("method", [name for name in METHODS if name != "levi"])
    def test_baselines(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, method: str) -> None:
        status, _out, err = levi_fast(*train_arguments, "--method", method)
        assert status == 0, err
        found = metrics(tmp_path / "model")
        assert found["method"] == method
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        kind = METHODS[method]
        layers = {"last": [2], "none": None}.get(kind.fields.get("taps", "all"), [0, 1, 2])
        assert config["tap_layers"] == layers
        has_view = kind.needs_view
        assert (config["task_model"] is None) == (not has_view)
        if not has_view or method == "task-model":
            assert found["blend"] == 0.0
        test = train_arguments[train_arguments.index("--test") + 1]
        status, _, err = levi_fast(
            "evaluate", "--model", str(tmp_path / "model"), "--data", test, "--output", str(tmp_path / "e.json")
        )
        assert status == 0, err
        assert json.loads((tmp_path / "e.json").read_text())["metrics"] == found["id"]

    def test_learns_what_there_is_to_learn(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        status, _, err = levi_fast(*train_arguments, "--epochs", "15", "--learning-rate", "0.01")
        assert status == 0, err
        found = metrics(tmp_path / "model")
        assert found["id"]["accuracy"] >= 0.85 and found["ood"]["new"]["accuracy"] >= 0.85  # chance: 0.5

    def test_running_the_backbone_in_every_epoch(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        once, always = str(tmp_path / "once"), str(tmp_path / "always")
        validation_alone = "--cross-fit=0"  # as it is where the backbone runs in every epoch
        assert levi_fast(*train_arguments, "--output", once, validation_alone)[0] == 0
        assert levi_fast(*train_arguments, "--output", always, "--no-precompute")[0] == 0
        first, second = metrics(tmp_path / "once"), metrics(tmp_path / "always")
        # the same mathematics in other batches
        assert first["id"]["log_loss"] == pytest.approx(second["id"]["log_loss"], abs=1e-3)

    def test_one_warning_for_long_texts(
        self,
        levi_fast: Run,
        train_arguments: list[str],
        make_rows: Callable[..., Rows],
        write_rows: Callable[..., str],
    ) -> None:
        rows = make_rows()
        for row in rows[:3]:
            row["text"] = "good film " * 50
        write_rows("train.csv", rows)
        write_rows("new.csv", rows)
        status, _, err = levi_fast(*train_arguments)
        assert status == 0
        assert [line for line in err.splitlines() if line.startswith("warning")] == [
            "warning: 6 of 120 texts are longer than 64 tokens and were cut"
        ]

    def test_empty_output_folder_is_taken(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        status, _, err = levi_fast(*train_arguments)
        assert status == 0, err
        assert (tmp_path / "model" / "metrics.json").is_file()


class TestKindsOfProblems:
    def test_regression_with_numbers_and_categories(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        arguments = [*train_arguments, "--numeric-column", "price", "--categorical-column", "colour"]
        arguments[arguments.index("--label-column") + 1] = "stars"
        status, _out, err = levi_fast(*arguments, "--epochs", "20", "--learning-rate", "0.01")
        assert status == 0, err
        found = metrics(tmp_path / "model")
        assert found["problem_type"] == "regression" and set(found["id"]) == {"rmse", "mae", "spearman"}
        assert found["id"]["rmse"] < 0.8 < 1.25  # the labels' own standard deviation is about 1.3
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["task_model"]["type"] == "table" and config["target_mean"] == pytest.approx(3.25, abs=0.3)
        predicted = tmp_path / "p.csv"
        test = train_arguments[train_arguments.index("--test") + 1]
        levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", test, "--predictions", str(predicted))
        values = [float(row[1]) for row in probabilities(predicted)[1:]]
        assert len(values) == 40 and 0 < min(values) < 2.5 < max(values) < 6

    @pytest.mark.parametrize("suffix", ["csv", "jsonl"])
    def test_multi_label(
        self,
        levi_fast: Run,
        train_arguments: list[str],
        make_rows: Callable[..., Rows],
        write_rows: Callable[..., str],
        tmp_path: Path,
        suffix: str,
    ) -> None:
        files = {name: write_rows(f"m{name}.{suffix}", make_rows(seed=seed)) for seed, name in enumerate(("a", "b"))}
        arguments = [
            *(
                "train",
                "--train",
                files["a"],
                "--test",
                files["b"],
                "--text-column",
                "text",
                "--label-column",
                "tags",
            ),
            *("--backbone", train_arguments[train_arguments.index("--backbone") + 1], "--epochs", "15"),
            *("--learning-rate", "0.01", "--output", str(tmp_path / "model")),
        ]
        if suffix == "csv":
            arguments += ["--problem-type", "multi_label_classification"]
        status, _, err = levi_fast(*arguments)
        assert status == 0, err
        found = metrics(tmp_path / "model")
        assert set(found["id"]) == {"macro_f1", "micro_f1", "subset_accuracy", "log_loss"}
        assert found["id"]["micro_f1"] > 0.6
        predicted = tmp_path / "p.csv"
        levi_fast(
            "evaluate", "--model", str(tmp_path / "model"), "--data", files["b"], "--predictions", str(predicted)
        )
        rows = probabilities(predicted)
        assert rows[0] == ["row", "prediction", "probability:cheap", "probability:liked"]
        assert {row[1] for row in rows[1:]} <= {"", "cheap", "liked", "cheap|liked"}

    def test_columns_alone(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        train = train_arguments[train_arguments.index("--train") + 1]
        arguments = ["--train", train, "--label-column", "label", "--categorical-column", "colour"]
        folder = str(tmp_path / "model")
        status, _, err = levi_fast("train", *arguments, "--method", "task-model", "--epochs", "5", "--output", folder)
        assert status == 0, err
        status, out, err = levi_fast("evaluate", "--model", folder, "--data", train)
        assert status == 0 and "accuracy" in out, err


class TestEvaluate:
    def test_a_new_process_gives_the_same_bits(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        assert levi_fast(*train_arguments)[0] == 0
        test = train_arguments[train_arguments.index("--test") + 1]
        evaluate = ["evaluate", "--model", str(tmp_path / "model"), "--data", test]
        here, there = tmp_path / "here.csv", tmp_path / "there.csv"
        assert levi_fast(*evaluate, "--predictions", str(here))[0] == 0
        command = [sys.executable, "-m", "levi_fast", *evaluate, "--predictions", str(there)]
        subprocess.run(
            [*command, "--output", str(tmp_path / "e.json")], check=True, capture_output=True, cwd=tmp_path
        )
        assert here.read_bytes() == there.read_bytes()
        assert len(probabilities(here)) == 41
        # the figures of training, to the last bit
        found = json.loads((tmp_path / "e.json").read_text())
        assert found["metrics"] == metrics(tmp_path / "model")["id"]

    def test_the_views_own_prediction_is_weighed_again(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path
    ) -> None:
        status, _, err = levi_fast(*train_arguments, "--view-loss", "1")
        assert status == 0, err
        trained = metrics(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert trained["view_blend"] == config["view_blend"] in (0.0, 0.5, 1.0)
        arguments = [
            "--model",
            str(tmp_path / "model"),
            "--data",
            train_arguments[train_arguments.index("--test") + 1],
        ]
        status, _, err = levi_fast("evaluate", *arguments, "--output", str(tmp_path / "again.json"))
        assert status == 0, err
        assert json.loads((tmp_path / "again.json").read_text())["metrics"] == trained["id"]

    def test_a_moved_folder(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, tiny_bert_dir: str
    ) -> None:
        assert levi_fast(*train_arguments)[0] == 0
        elsewhere = tmp_path / "deep" / "er" / "model"
        elsewhere.parent.mkdir(parents=True)
        (tmp_path / "model").rename(elsewhere)
        test = train_arguments[train_arguments.index("--test") + 1]
        status, _, err = levi_fast("evaluate", "--model", str(elsewhere), "--data", test, "--backbone", tiny_bert_dir)
        assert status == 0, err

    def test_a_backbone_in_fewer_bits_is_found_again(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, tiny_bert_dir: str
    ) -> None:
        status, _, err = levi_fast(*train_arguments, "--backbone-dtype", "int8", "--device", "cpu")
        assert status == 0, err
        test = train_arguments[train_arguments.index("--test") + 1]
        for where in ([], ["--backbone", tiny_bert_dir]):
            status, _, err = levi_fast(
                "evaluate", "--model", str(tmp_path / "model"), "--data", test, "--output", str(tmp_path / "e.json"),
                *where,
            )  # fmt: skip
            assert status == 0, err
            assert json.loads((tmp_path / "e.json").read_text())["metrics"] == metrics(tmp_path / "model")["id"]

    def test_another_backbone_is_refused_with_both_fingerprints(
        self, levi_fast: Run, train_arguments: list[str], tmp_path: Path, tiny_bert_dir: str
    ) -> None:
        import torch
        from transformers import AutoModel

        assert levi_fast(*train_arguments)[0] == 0
        other = AutoModel.from_pretrained(tiny_bert_dir)
        with torch.no_grad():
            next(other.encoder.parameters()).add_(1.0)
        other.save_pretrained(tmp_path / "other")
        status, _, err = levi_fast(
            *("evaluate", "--model", str(tmp_path / "model"), "--backbone", str(tmp_path / "other")),
            *("--data", train_arguments[train_arguments.index("--test") + 1]),
        )
        assert status == 2 and err.startswith("error: ") and err.count("bert:float32:") == 2, err

    def test_file_without_labels(self, levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
        assert levi_fast(*train_arguments)[0] == 0
        unlabelled = tmp_path / "unlabelled.csv"
        unlabelled.write_text("text\ngood great film\nawful plot\n")
        evaluate = ["evaluate", "--model", str(tmp_path / "model"), "--data", str(unlabelled)]
        status, out, err = levi_fast(*evaluate)
        assert status == 2 and "no column 'label'" in err
        status, out, err = levi_fast(*evaluate, "--predictions", str(tmp_path / "p.csv"))
        assert status == 0 and "accuracy" not in out, err
        rows = probabilities(tmp_path / "p.csv")
        assert rows[0] == ["row", "prediction", "probability:neg", "probability:pos"]
        for row in rows[1:]:
            assert row[1] in ("neg", "pos") and float(row[2]) + float(row[3]) == pytest.approx(1.0)

    def test_folder_that_is_no_model(self, levi_fast: Run, tmp_path: Path) -> None:
        status, _, err = levi_fast("evaluate", "--model", str(tmp_path), "--data", "x.csv")
        assert status == 2 and "expected a model folder that levi-fast train wrote" in err

    def test_results_into_a_missing_folder(self, levi_fast: Run, tmp_path: Path) -> None:
        target = str(tmp_path / "no" / "p.csv")
        status, _, err = levi_fast("evaluate", "--model", "m", "--data", "x.csv", "--predictions", target)
        assert status == 2 and "--predictions" in err and "is no folder" in err


def test_help_is_quick_and_names_every_command() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "levi_fast", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    for command in ("train", "evaluate", "demo", "env"):
        assert command in result.stdout
    for heavy in ("torch", "transformers", "datasets", "pandas", "sklearn"):
        assert f"| {heavy}\n" not in result.stderr and f" {heavy}\n" not in result.stderr, heavy
