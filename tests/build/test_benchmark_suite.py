"""``pytest benchmarks/``: runs, writes what a figure is judged by, and times no wrong result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no benchmarks beside the tests")

WRONG = """
from levi_fast import functional

functional.layerwise_loss = lambda y, *_: y.float().sum()
"""


def suite(selection: str, output: Path, *more: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-q", "-p", "no:cacheprovider", "-k", selection]
    command += ["--benchmark-max-time", "0.01", "--benchmark-json", str(output), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_pytest_without_arguments_leaves_the_benchmarks_alone() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]


@pytest.mark.slow
def test_a_small_selection_runs_and_writes_json(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    selection = "small and float32 and (6x1x2 or 1x64x384 or 6x384x64x128x2x1 or overhead) and not cold"
    ran = suite(selection, output)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    rows = json.loads(output.read_text())["benchmarks"]
    groups: dict[str, set[str]] = {}
    for row in rows:
        assert row["stats"]["rounds"] >= 5 and row["stats"]["min"] > 0
        groups.setdefault(row["group"], set()).add(row["extra_info"]["contender"])
    assert groups["loss 6 1 2 float32 forward+backward"] == {"ours", "eager", "hand-batched"}
    assert groups["ensemble 6 384 64 128 2 1 float32 forward"] == {"ours", "eager", "hand-batched", "grouped-mm"}
    assert groups["head-step 6 384 64 128 2 1 float32 forward+backward"] == {"ours", "eager", "hand-batched"}
    assert groups["pooling 1 64 384 warm float32 forward"] == {"ours", "eager", "sum-over-count", "bmm"}
    assert {"aten_addmm", "ensemble_module"} <= groups["overhead float32"]
    (row,) = (r for r in rows if r["group"].startswith("ensemble") and r["name"].endswith("-f-ours]"))
    info = row["extra_info"]
    assert info["case"] == {"L": 6, "D": 384, "V": 64, "H": 128, "C": 2, "B": 1} and info["pass"] == "forward"
    assert info["flop"] == 2 * 6 * 128 * (384 + 64 + 2) and info["bytes"] > 6 * 384 * 128 * 4
    (tmp_path / "wrong.py").write_text(WRONG)
    output.unlink()
    ran = suite("loss and 6x1x2 and float32", output, "-p", "wrong", path=tmp_path)
    assert ran.returncode == 1 and "WrongResultError" in ran.stdout
    assert not output.exists() or not output.read_text()  # nothing was timed
