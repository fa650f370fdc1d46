"""``levi-fast bench epoch`` on a tenth of the demo's reviews and a tiny backbone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast.bench import epochs, plots, targets, workload
from levi_fast.bench.epochs import NAMES, UNCACHED, EpochOptions
from levi_fast.bench.methods import OURS
from levi_fast.bench.peers import lora_targets
from levi_fast.bench.targets import Target
from levi_fast.bench.workload import Workload
from levi_fast.errors import DataError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def few_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = workload.synthetic.write_csv
    monkeypatch.setattr(
        workload.synthetic,
        "write_csv",
        lambda folder, seed: whole(folder, seed, train_size=80, validation_size=30, test_size=10),
    )


@pytest.mark.usefixtures("few_reviews")
def test_every_part_has_its_rows(bench: Run, tiny_bert_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("matplotlib")
    output = tmp_path / "epochs.json"
    status, out, err = bench(
        *("epoch", "--backbone", tiny_bert_dir, "--seconds", "0.01", "--batches", "2", "--heads", "2"),
        *("--parts", ",".join(epochs.PARTS), "--target", "0.4"),
        *("--output", str(output), "--plots", str(tmp_path / "plots")),
    )
    assert status == 0, err
    document = json.loads(output.read_text())
    rows = {row["case"]["what"]: row for row in document["epoch"]}
    assert set(rows) == set(NAMES.values())
    for what, row in rows.items():
        assert row["case"]["data"] == "synthetic" and row["dtype"] == "float32" and row["pass"]
        assert row["sizes"] == {"train": 80, "validation": 30}
        low, middle, high = row["quartiles_seconds"]
        assert 0 < low <= middle <= high and row["rounds"] >= 1
        assert ("extrapolated_from" in row) == (what in UNCACHED.values()), what
    uncached = rows[NAMES[OURS]]
    taken = uncached["extrapolated_from"]
    assert taken["timed_batches"] == 2 and taken["timed_tokens"] <= taken["tokens"] and "tokens" in taken["how"]
    assert set(uncached["relative_loss_error"]) == {"levi-eager", "hidden-states"}
    assert rows[NAMES["lean"]]["rounds"] >= 3
    cold = rows[NAMES["cold"]]
    assert cold["build_seconds"][0] < cold["median_seconds"]
    warm, from_cold = rows[NAMES["target"]], rows[NAMES["target-cold"]]
    assert warm["target"] == {"metric": "accuracy", "value": 0.4, "source": "given"}
    assert from_cold["median_seconds"] == pytest.approx(warm["median_seconds"] + from_cold["build_seconds"], abs=1e-3)
    assert epochs.remark(rows[NAMES["lora"]]) == "extrapolated by tokens from 2 batches"
    assert all(name in out for name in NAMES.values()) and "extrapolated" in out
    drawn = (tmp_path / "plots" / "epoch-epochs.svg").read_text()
    assert all(name in drawn for name in NAMES.values())


@pytest.mark.usefixtures("few_reviews")
def test_a_run_ends_in_the_first_epoch_that_reaches_the_target(tiny_bert_dir: str, tmp_path: Path) -> None:
    loaded = Workload.load("synthetic", None, tiny_bert_dir)
    bank = loaded.bank(tmp_path / "cache")
    first = targets.from_the_cache(loaded, bank, Target("accuracy", 0.0, "given"), 0)
    assert first.reached and first.epochs == 1 and first.score is not None and first.score > 0
    never = targets.from_the_cache(loaded, bank, Target("accuracy", 1.1, "given"), 0)
    assert not never.reached and never.epochs == loaded.options.epochs and never.seconds > first.seconds
    probe = targets.probe_target(loaded, bank)
    assert probe.metric == "accuracy" and 0 < probe.value <= 1
    assert not loaded.splits.train.has_taps


def test_less_is_better_of_an_error() -> None:
    rmse, accuracy = Target("rmse", 0.9, ""), Target("accuracy", 0.9, "")
    assert rmse.reached({"rmse": 0.8}) and not rmse.reached({"rmse": 1.0}) and rmse.reached({"rmse": 0.9})
    assert accuracy.reached({"accuracy": 0.95}) and not accuracy.reached({"accuracy": 0.8})
    assert not accuracy.reached({"diverged": 1.0})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "camelyon"}, "--task-name: expected synthetic"),
        ({"parts": ("cold", "warm")}, "--parts: expected some of .* got 'warm'"),
        ({"parts": ()}, "--parts: .* got none"),
        ({"peers": ("adapter",)}, "--peers: expected some of .* got 'adapter'"),
        ({"parts": ("cold",), "target": 0.9}, "--target: nothing is trained to it"),
        ({"seconds": 0.0}, "--seconds: expected a number above 0"),
        ({"sampled": 0}, "--batches: expected at least 1"),
        ({"heads": 17}, "--heads: expected 2 to 16"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        EpochOptions(**options)


def test_data_that_cannot_be(bench: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (("--data", str(tmp_path)), "--task-name synthetic, the default, generates its rows"),
        (("--task-name", "imdb"), "--task-name imdb needs --data"),
        (("--max-train-rows", "9"), "--max-train-rows, --max-eval-rows: only with --task-name movielens"),
        (("--task-name", "movielens"), "--task-name movielens needs --data"),
    ):
        status, _, err = bench("epoch", "--parts", "cached", *arguments)
        assert status == 2 and message in err
    monkeypatch.setattr(workload, "packaged_folder", lambda name: None)
    status, _, err = bench("epoch", "--parts", "cached")
    assert status == 2 and "pip install 'levi_fast[demo]'" in err


def test_ratings_of_movielens(bench: Run, tiny_bert_dir: str, shared_data: Path, tmp_path: Path) -> None:
    """Labels that are numbers: the target is an RMSE."""
    data = shared_data / "movielens-small"
    if not (data / "ratings.csv").is_file():
        pytest.skip(f"no movielens-small in {shared_data}")
    output = tmp_path / "epochs.json"
    status, _, err = bench(
        *("epoch", "--task-name", "movielens", "--data", str(data), "--backbone", tiny_bert_dir, "--seconds", "0.01"),
        *("--max-train-rows", "60", "--max-eval-rows", "30", "--parts", "target", "--output", str(output)),
    )
    assert status == 0, err
    warm, cold = json.loads(output.read_text())["epoch"]
    assert str(shared_data) not in output.read_text()  # results are shown to others
    assert warm["sizes"] == {"train": 60, "validation": 30} and warm["case"]["data"] == "movielens"
    assert warm["target"]["metric"] == "rmse" and warm["target"]["source"].startswith("linear probe")
    for reached, score in zip(warm["reached"], warm["scores"], strict=True):
        assert reached == (score <= warm["target"]["value"])
    assert cold["median_seconds"] > warm["median_seconds"]


def test_a_backbone_without_known_projections_is_named() -> None:
    with pytest.raises(DataError, match="Linear has none of these pairs"):
        lora_targets(torch.nn.Linear(2, 2))


def test_no_rows_no_chart() -> None:
    assert plots.epochs({}) is None and plots.scaling({}) is None
