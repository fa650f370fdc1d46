"""The script for a GPU, tried out without one: every row of the benchmark, at the smallest sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from levi_fast.kernels.launch_configs import LossConfig, PoolConfig, ProductConfig, RowConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no benchmarks beside the tests")
def test_every_row_can_be_made(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    command = [sys.executable, "benchmarks/gpu/bench.py", "--output", str(output), "--device", "cpu", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["left_out"] == 0 and "failures" not in result
    assert {row["op"].split(",")[0].split(" ")[0] for row in result["rows"]} == {
        "masked_mean_pool",
        "layerwise_ensemble",
        "layerwise_loss",
        "training",
    }
    for row in result["rows"]:
        assert row["ms"]["ours"]["plain"] > 0
        assert all(value < (0.05 if row["dtype"] == "bfloat16" else 1e-5) for value in row["error"].values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no benchmarks beside the tests")
def test_the_tuner_writes_what_the_launchers_read(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu/tune.py", "--output", str(tmp_path), "--device", "cpu", "--quick"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--budget", "40"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "interpreter.json").read_text())
    assert not [line for line in result["refused"] if "other results" in line or "rror:" in line]
    for entry in result["entries"]:  # of the interpreter's times, whatever they are
        kinds = (PoolConfig, RowConfig, ProductConfig, LossConfig)
        assert any(set(entry["config"]) == {field.name for field in fields(kind)} for kind in kinds)


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="no benchmarks beside the tests")
def test_the_session_script_parses() -> None:
    done = subprocess.run(["bash", "-n", "benchmarks/gpu_session.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
