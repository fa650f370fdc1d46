"""The targets are held to the rows they speak of, and a miss is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def targets(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("pages", "targets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import targets

    return targets


def ensemble_row(dtype: str, ours: float, peer: float, gflop: float = 0.01, **more: Any) -> dict[str, Any]:
    return {
        "case": {"L": 2, "B": 8}, "dtype": dtype, "pass": "forward+backward", "gflop": gflop, "bound_by": "flop",
        "median_us": {"ours": ours, "eager": 2 * peer, "compile": peer}, "best_peer_over_ours": peer / ours,
        "fraction_of_roofline": 0.8, **more,
    }  # fmt: skip


def by_goal(found: list[Any], start: str) -> Any:
    (target,) = [target for target in found if target.goal.startswith(start)]
    return target


def test_rows_of_the_cpu(targets: Any) -> None:
    rows = [ensemble_row("float32", 10.0, 20.0), ensemble_row("bfloat16", 10.0, 9.0)]
    found = targets.kernels_on_cpu({"ensemble": rows})
    slow = by_goal(found, "ensemble: no row below 0.98")
    assert slow.met is False and slow.missed == ("(2, 8) bfloat16 forward+backward: 0.900",)
    assert by_goal(found, "forward + backward under 0.1 GFLOP: 2.5").figure == "1 of 2; worst 1.800"
    assert by_goal(found, "large, fp32").met is None and by_goal(found, "pooling in cache").met is None
    large = [ensemble_row("float32", 20.0, 20.0, 1.0), ensemble_row("bfloat16", 10.0, 20.0, 1.0)]
    found = targets.kernels_on_cpu({"ensemble": large})
    assert by_goal(found, "bf16 over our own fp32").met is True and by_goal(found, "large, bf16").met is True
    assert by_goal(found, "forward + backward under 0.1 GFLOP: 1.5").met is None


def test_rows_of_a_gpu(targets: Any) -> None:
    rows = [
        {"op": "layerwise_ensemble forward+backward", "case": {"L": 2, "B": batch}, "dtype": "bfloat16",
         "plain": {"of_roofline": 0.1, "times_faster_than": {"reference": 9.0}},
         "graph": {"of_roofline": of, "times_faster_than": {"compile": faster}}}
        for batch, faster, of in ((32, 2.9, 0.7), (4096, 1.3, 0.5))
    ]  # fmt: skip
    found = targets.kernels_on_gpu([{"rows": rows}])
    assert by_goal(found, "forward + backward, B ≤ 64").met is False
    assert by_goal(found, "forward + backward, B ≥ 1,024").met is True
    assert by_goal(found, "small batches").met is True
    assert by_goal(found, "token-level").met is None


def test_the_script_reads_what_is_committed_and_says_what_was_not_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "targets.py")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert " met, " in shown.splitlines()[-1] and "frozen engine" in shown
    (tmp_path / "kernels_cpu.json").write_text(json.dumps({"ensemble": [ensemble_row("float32", 10.0, 30.0)]}))
    shown = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1].startswith("3 met, 0 not met")
