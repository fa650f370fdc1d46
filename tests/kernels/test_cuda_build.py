"""The CUDA library by nvcc, without a GPU; and the emulated kernels under sanitizers and other orders of threads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cuda_build
import pytest

from levi_fast.kernels.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(cuda_build.missing_tools() is not None, reason=str(cuda_build.missing_tools()))
Run = Callable[..., subprocess.CompletedProcess[str]]

LOADS = """
import ctypes, sys, torch
from levi_fast.kernels import native
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
library.levi_fast_cuda_schemas.restype = ctypes.c_char_p
print(library.levi_fast_cuda_schemas().decode())
assert native.load().loaded
hidden = torch.ones(1, 2, 3)
try:
    torch.ops.levi_fast_cuda.masked_mean_pool(hidden)
except NotImplementedError as error:
    assert "CUDA" in str(error), error
else:
    raise AssertionError("served a CPU tensor")
assert library.levi_fast_cuda_serve() == 0 and library.levi_fast_cuda_serve() == 0
for key in ("CUDA", "CPU"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key("levi_fast::layerwise_ensemble", key), key
assert torch.equal(torch.ops.levi_fast.masked_mean_pool(hidden), torch.ones(1, 3))  # the CPU's kernels still serve
"""


@pytest.mark.slow
@pytest.mark.native
@pytest.mark.timeout(1500)
@pytest.mark.skipif(cuda_build.find_nvcc() is None, reason=cuda_build.NO_NVCC)
def test_every_kernel_fits_and_the_library_loads_without_a_gpu(tmp_path: Path) -> None:
    said = cuda_build.compile_for_gpus(tmp_path / "gate")
    rows = list(cuda_build.kernels(said))
    assert {row["architecture"] for row in rows} == {f"sm_{a}" for a in cuda_build.ARCHITECTURES}
    assert len(rows) > 300
    assert not [row for row in rows if row["spills"] or row["stack"]]
    assert not [line for line in said.splitlines() if "warning" in line.lower()]
    library = tmp_path / "gate" / "liblevi_fast_cuda.so"
    done = subprocess.run([sys.executable, "-c", LOADS, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-2] == list(SCHEMAS.values())


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_emulated_kernels_under_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("this compiler has no sanitizer libraries")
    library = cuda_build.build_emulation(tmp_path / "build", sanitize=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": found,
        # Python's own allocations look like leaks; a fiber's stack is not the one the sanitizer knows.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:verify_asan_link_order=0",
        "OMP_NUM_THREADS": "1",
        "LEVI_FAST_EMULATED_LIBRARY": str(library),
    }
    tests = "test_pool or test_ensemble or test_loss or test_one_gradient or test_a_nan"
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        tests,
        str(HERE / "test_cuda.py"),
    ]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    assert " passed" in done.stdout and "runtime error" not in done.stderr
