"""benchmarks/guard.py: this checkout's figures beside the stored ones, and that worse figures are reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="no benchmarks beside the tests")
HERE = {"python": "3.11", "torch": "2.13.0", "transformers": "5", "typer": "1", "rich": "1", "native": "loaded",
        "isa": "a", "cpu": "one"}  # fmt: skip


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import guard

    return guard


def baseline(guard: Any, **values: float) -> dict[str, Any]:
    """As guard.json, with one figure of each named kind."""
    return {"environment": HERE, "figures": {kind: {"kind": kind, "value": v} for kind, v in values.items()}}


def test_no_figure_of_this_checkout_has_regressed() -> None:
    # A process of its own: what other tests have imported, patched or compiled would be counted too.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LEVI_FAST_")}
    command = [sys.executable, str(BENCHMARKS / "guard.py")]
    ran = subprocess.run(
        command, env={**clean, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-2000:]}"
    not_compared = [line for line in ran.stdout.splitlines() if line.startswith("skipped")]
    if not_compared:
        warnings.warn("not compared with benchmarks/results/guard.json:\n" + "\n".join(not_compared), stacklevel=1)
    assert "tap at layer 2 of 3: layers" in ran.stdout


@pytest.mark.parametrize(
    ("kind", "at_most", "too_much"),
    [("calls", 110, 111), ("ops", 100, 101), ("bytes", 102, 103), ("layers", 100, 101), ("modules", 110, 111),
     ("folder", 102, 103), ("ratio", 175, 176)],
)  # fmt: skip
def test_a_figure_above_its_tolerance_is_regressed(guard: Any, kind: str, at_most: float, too_much: float) -> None:
    stored = baseline(guard, **{kind: 100})
    for value, status in ((at_most, "ok"), (too_much, "regressed"), (50, "better")):
        (verdict,) = guard.compare({kind: guard.Figure(kind, value)}, HERE, stored)
        expected = "regressed" if value > 100 and kind in ("ops", "layers") else status
        assert verdict.status == expected, value


def test_a_module_that_must_not_be_imported_is_one_too_many(guard: Any) -> None:
    (verdict,) = guard.compare({"heavy": guard.Figure("heavy", 1)}, HERE, baseline(guard, heavy=0))
    assert verdict.status == "regressed"


def test_figures_of_other_versions_are_named_and_skipped(guard: Any) -> None:
    measured = {"calls": guard.Figure("calls", 500), "layers": guard.Figure("layers", 500)}
    stored = baseline(guard, calls=100, layers=100)
    verdicts = {v.name: v for v in guard.compare(measured, {**HERE, "torch": "2.14.0"}, stored)}
    assert verdicts["calls"].status == "skipped"
    assert "torch 2.14.0 here, 2.13.0 in the baseline" in str(verdicts["calls"])
    assert verdicts["layers"].status == "regressed"  # depends on no version


def test_a_ratio_has_more_room_on_another_cpu_and_the_report_says_so(guard: Any) -> None:
    for value, status in ((249, "ok"), (251, "regressed")):
        figure = {"ratio": guard.Figure("ratio", value)}
        (verdict,) = guard.compare(figure, {**HERE, "cpu": "two"}, baseline(guard, ratio=100))
        assert verdict.status == status and "tolerance +150%" in str(verdict) and "another CPU" in str(verdict)


def test_the_command_fails_on_regressed_missing_and_new_figures_until_refreshed(
    guard: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "guard.json"
    stored.write_text(json.dumps(baseline(guard, calls=100, ops=5)))
    monkeypatch.setattr(guard, "environment", lambda: HERE)
    for found, code, said in (
        ({"calls": 100, "ops": 5}, 0, "2 ok"),
        ({"calls": 90, "ops": 5}, 0, "--refresh"),
        ({"calls": 100, "ops": 6}, 1, "1 regressed"),
        ({"calls": 100}, 1, "1 missing"),
        ({"calls": 100, "ops": 5, "bytes": 1}, 1, "1 no baseline"),
    ):
        monkeypatch.setattr(guard, "measure", lambda found=found: {k: guard.Figure(k, v) for k, v in found.items()})
        assert guard.main(["--baseline", str(stored)]) == code, found
        assert said in capsys.readouterr().out
    assert guard.main(["--baseline", str(stored), "--refresh"]) == 0
    assert guard.main(["--baseline", str(stored)]) == 0


def test_an_op_that_does_more_is_seen_to(guard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import guard_figures

    from levi_fast import functional

    before = guard_figures.op_calls()["pooling forward"]
    calls = guard_figures.python_calls(before)
    pool = functional.masked_mean_pool

    def doctored(hidden: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return pool(hidden.clone(), mask)

    counted = guard_figures.profiled({"before": before})["before"]
    monkeypatch.setattr(functional, "masked_mean_pool", doctored)
    after = guard_figures.op_calls()["pooling forward"]
    ops, allocated = guard_figures.profiled({"after": after})["after"]
    assert guard_figures.python_calls(after) == calls + 1
    assert ops > counted[0]
    hidden_bytes = 4 * guard_figures.BATCH * guard_figures.TOKENS * guard_figures.WIDTH
    assert allocated == counted[1] + hidden_bytes


def test_a_slowed_contender_has_a_greater_ratio(guard: Any) -> None:
    import guard_figures

    def run(name: str, _: int) -> float:
        start = time.perf_counter()
        time.sleep(0.004 if name == "ours" else 0.002)
        return time.perf_counter() - start

    assert guard_figures.least_ratio(run, 2, 5) > 1.4  # above what a baseline of 1 would allow
