"""``levi-fast bench growth`` at the smallest sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from levi_fast.bench import growth
from levi_fast.bench.growth import GrowthOptions
from levi_fast.errors import DataError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "ENSEMBLE", {"L": 2, "D": 8, "V": 4, "H": 4, "C": 2, "B": 4})
    monkeypatch.setattr(growth, "ENSEMBLE_SIZES", {"B": (1, 4, 16), "L": (1, 2, 4)})
    monkeypatch.setattr(growth.ensemble, "COLD_BYTES", 2**12)
    monkeypatch.setattr(growth, "POOLING_SIZES", (4, 8, 16))
    monkeypatch.setattr(growth, "EXAMPLES", (100, 200, 400, 800))
    monkeypatch.setattr(growth, "QUICK_EXAMPLES", (100, 200))
    monkeypatch.setattr(growth, "ONCE_FROM", 400)
    monkeypatch.setattr(growth, "STEP_BATCHES", (1, 2, 4))
    monkeypatch.setattr(growth, "STEP_LENGTHS", (8, 16, 32, 128))


@pytest.mark.usefixtures("tiny_sizes")
def test_every_part_has_its_rows(bench: Run, tiny_bert_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "growth.json"
    status, out, err = bench(
        *("growth", "--backbone", tiny_bert_dir, "--seconds", "0.001", "--peers", "eager,bmm,hand-batched"),
        *("--output", str(output), "--plots", str(tmp_path / "plots")),
    )
    assert status == 0, err
    rows = json.loads(output.read_text())["growth"]
    assert [(row["case"]["what"].split(",")[0], row["case"]["variable"], row["sizes"]) for row in rows] == [
        ("ensemble", "B", [1, 4, 16]),
        ("ensemble", "L", [1, 2, 4]),
        ("pooling", "T", [4, 8, 16]),
        ("epoch from the cache", "examples", [100, 200, 400, 800]),
        ("step with the backbone", "batch", [1, 2, 4]),
        ("step with the backbone", "length", [8, 16, 32]),  # the backbone has 64 positions
    ]
    assert [sorted(row["peers"]) for row in rows[:4]] == [
        ["eager", "hand-batched"], ["eager", "hand-batched"], ["bmm", "eager"], [],
    ]  # fmt: skip
    for row in rows:
        for found in (row, *row["peers"].values()):
            assert len(found["median_us"]) == len(found["quartiles_us"]) == len(found["rounds"]) == len(row["sizes"])
            assert all(value > 0 for value in found["median_us"])
            assert {"exponent", "exponent_stderr", "fixed", "per_unit", "linear_fit_worst"} <= set(found)
    assert rows[3]["rounds"][-2:] == [1, 1] and rows[3]["rounds"][0] >= 3
    assert "exponent" in out
    drawn = (tmp_path / "plots" / "growth-scaling.svg").read_text()
    assert f"ours: {rows[0]['exponent']:.2f}" in drawn and "hand-batched: " in drawn


@pytest.mark.usefixtures("tiny_sizes")
def test_quick_has_fewer_examples(bench: Run, tmp_path: Path) -> None:
    output = tmp_path / "growth.json"
    arguments = ("growth", "--parts", "cached", "--quick", "--seconds", "0.001", "--output", str(output))
    status, _, err = bench(*arguments)
    assert status == 0, err
    (row,) = json.loads(output.read_text())["growth"]
    assert row["sizes"] == [100, 200] and row["exponent_stderr"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ("loss",)}, "--parts: expected some of ensemble, .* got 'loss'"),
        ({"parts": ()}, "--parts: .* got none"),
        ({"peers": ("compile",)}, "--peers: expected some of eager, .* got 'compile'"),
        ({"seconds": -1.0}, "--seconds: expected a number above 0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        GrowthOptions(**options)
