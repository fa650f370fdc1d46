"""``levi-fast train --sweep``: the best head's folder, every head's figures, and its equality to its own run."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast.training import sweep_command
from levi_fast.training.sweep import train_heads

Run = Callable[..., tuple[int, str, str]]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as the workers have, for the backbone and the run by itself; two workers all the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sweep_command, "train_heads", partial(train_heads, workers=2))
    yield
    torch.set_num_threads(before)


def with_validation(arguments: list[str], folder: Path) -> list[str]:
    """The rows held out must not depend on the seed, so that another seed's run by itself has the same data."""
    validation = folder / "validation.csv"
    validation.write_bytes(Path(arguments[arguments.index("--test") + 1]).read_bytes())
    return [*arguments, "--validation", str(validation)]


def test_the_best_head_is_saved_and_equals_its_own_run(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, two_workers: None
) -> None:
    arguments = with_validation(train_arguments, tmp_path)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("seed: [3, 4]\nlearning_rate: [1e-3, 1e-2]\n")
    status, out, err = levi_fast(*arguments, "--sweep", str(sweep))
    assert status == 0, err
    assert "4 configurations, best accuracy on ID validation first" in out and "seed=4, learning_rate=0.01" in out
    (column,) = read(tmp_path / "model" / "sweep.json")["columns"]
    assert [head["rank"] for head in column["heads"]] == [1, 2, 3, 4]
    keys = [(head["validation"]["accuracy"], -head["validation"]["log_loss"]) for head in column["heads"]]
    assert keys == sorted(keys, reverse=True)
    best, found = column["heads"][0], read(tmp_path / "model" / "metrics.json")
    assert found["sweep"] == {"configuration": best["name"], "of": 4}
    assert (found["id"], found["ood"], found["seed"]) == (best["id"], best["ood"], best["settings"]["seed"])

    own = [str(value) for key, value in best["settings"].items() for value in (f"--{key.replace('_', '-')}", value)]
    status, _, err = levi_fast(*arguments, *own, "--output", str(tmp_path / "own"))
    assert status == 0, err
    alone = read(tmp_path / "own" / "metrics.json")
    assert (alone["id"], alone["ood"]) == (best["id"], best["ood"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("model", "own")]
    assert weights[0] == weights[1]
    test = arguments[arguments.index("--test") + 1]
    status, _, err = levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", test)
    assert status == 0, err


def test_a_sweep_on_a_cache_does_not_load_the_backbone(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, two_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*with_validation(train_arguments, tmp_path), "--cache", str(tmp_path / "cache")]
    own = ["--seed", "5", "--output", str(tmp_path / "own")]
    assert levi_fast(*arguments, *own)[0] == 0  # builds the cache

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the backbone was loaded")

    monkeypatch.setattr("levi_fast.training.commands.load_backbone", refuse)
    monkeypatch.setattr("levi_fast.training.cached.load_backbone", refuse)
    (tmp_path / "sweep.yaml").write_text("seed: [5, 6]")
    status, _, err = levi_fast(*arguments, "--sweep", str(tmp_path / "sweep.yaml"))
    assert status == 0, err
    heads = {head["name"]: head for head in read(tmp_path / "model" / "sweep.json")["columns"][0]["heads"]}
    alone = read(tmp_path / "own" / "metrics.json")
    assert (heads["seed=5"]["id"], heads["seed=5"]["ood"]) == (alone["id"], alone["ood"])


def test_of_equals_the_first_is_saved(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, two_workers: None
) -> None:
    (tmp_path / "sweep.yaml").write_text("max_grad_norm: [3e3, 1e3, 2e3]")  # none of which clips anything
    status, _, err = levi_fast(*train_arguments, "--sweep", str(tmp_path / "sweep.yaml"))
    assert status == 0, err
    heads = read(tmp_path / "model" / "sweep.json")["columns"][0]["heads"]
    assert [head["settings"]["max_grad_norm"] for head in heads] == [3e3, 1e3, 2e3]
    assert len({json.dumps(head["validation"]) for head in heads}) == 1
    assert read(tmp_path / "model" / "metrics.json")["sweep"]["configuration"] == "max_grad_norm=3000.0"
    test = train_arguments[train_arguments.index("--test") + 1]
    assert levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", test)[0] == 0


def test_several_label_columns_write_a_folder_each(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path
) -> None:
    for name in ("train", "test", "new"):  # a second thing to predict: how long the text is
        path = tmp_path / f"{name}.csv"
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "length"])
            writer.writeheader()
            writer.writerows({**row, "length": f"{len(row['text'])}.5"} for row in rows)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("label_column: [label, length]\nseed: [0, 1]\n")
    status, out, err = levi_fast(*train_arguments, "--sweep", str(sweep))
    assert status == 0, err
    assert "accuracy" in out and "RMSE" in out
    assert read(tmp_path / "model" / "label" / "metrics.json")["problem_type"] == "single_label_classification"
    assert read(tmp_path / "model" / "length" / "metrics.json")["problem_type"] == "regression"
    columns = read(tmp_path / "model" / "sweep.json")["columns"]
    assert [(column["label_column"], len(column["heads"])) for column in columns] == [("label", 2), ("length", 2)]
    for name in ("label", "length"):
        status, _, err = levi_fast(
            "evaluate", "--model", str(tmp_path / "model" / name), "--data", str(tmp_path / "test.csv")
        )
        assert status == 0, err


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        ("sed: [1]", [], "unknown setting 'sed'; did you mean 'seed'?"),
        (
            "learning_rate: [-1]",
            [],
            "configuration 'learning_rate=-1.0': --learning-rate: expected a positive number",
        ),
        ("mix: [learned]", [], "configuration 'mix=learned': mix: 'learned' mixing weights get no gradient"),
        ("seed: [0, 1]", ["--no-precompute"], "--sweep: trains on precomputed taps; leave out --no-precompute"),
        ("seed: [0, 1]", ["--loop", "trainer"], "--sweep: trains with the lean loop; leave out --loop trainer"),
        ("label_column: [label, gone]", [], "no column 'gone'"),
    ],
)
def test_a_sweep_that_cannot_be_trained_is_refused(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, content: str, extra: list[str], message: str
) -> None:
    (tmp_path / "sweep.yaml").write_text(content)
    status, _, err = levi_fast(*train_arguments, "--sweep", str(tmp_path / "sweep.yaml"), *extra)
    assert status == 2 and message in err, err
    assert not (tmp_path / "model").exists()
