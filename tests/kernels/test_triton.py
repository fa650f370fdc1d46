"""Runs triton_cases.py: on a GPU and in Triton's interpreter; and compiles for GPUs that are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; `pip install levi_fast[gpu]` brings it",
)


def run(*command: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """A Python of its own: Triton decides at its import whether kernels are interpreted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "LEVI_FAST_"))}
    # Said aloud, because Triton warns where it is not: products and sums may be fused, as in every release so far.
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *command], cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )


def run_cases(marker: str, *, interpret: bool) -> None:
    if interpret and Version(version("triton")) < Version("3.7") and Version(version("numpy")) >= Version("2.4"):
        pytest.skip("the interpreter of Triton 3.6 does not take numpy 2.4")
    command = ["-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    result = run(*command, interpret=interpret)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def compiled(target: str, dtype: str, size: str, *only: str) -> list[dict[str, object]]:
    """The gate's lines for one target; an error where a kernel spills, asks too much shared memory or fails."""
    result = run(str(HERE / "triton_compile.py"), "--target", target, "--dtype", dtype, "--size", size, *only)
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows, result.stderr[-3000:]
    assert result.returncode == 0, [row for row in rows if not row.get("fits", True)]
    assert rows[-1]["compiled"] == len(rows) - 1
    return rows[:-1]


@pytest.mark.timeout(900)
def test_kernels_in_the_interpreter() -> None:
    run_cases("not slow", interpret=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_drawn_shapes_in_the_interpreter() -> None:
    run_cases("slow", interpret=True)


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_on_the_gpu() -> None:
    run_cases("not slow", interpret=False)


@pytest.mark.timeout(600)
def test_the_large_product_compiles_for_hopper() -> None:
    rows = compiled("sm_90", "bfloat16", "large", "--only", "first_product_kernel")
    assert {row["kernel"] for row in rows} == {"first_product_kernel"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("size", ["small", "middle", "large"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_fits(target: str, size: str) -> None:
    # Every size with its own dtype for each target: all pairs of dtype and target, and of size and target.
    dtypes = ["float32", "bfloat16", "float16"]
    turn = ["sm_80", "sm_90", "sm_100", "gfx942"].index(target) + ["small", "middle", "large"].index(size)
    rows = compiled(target, dtypes[turn % 3], size)
    assert len({row["kernel"] for row in rows}) > 15
