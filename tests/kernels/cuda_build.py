"""Builds the CUDA C++ kernels where no GPU is: for the CPU, to run them, or by nvcc, to see that they fit.

    python tests/kernels/cuda_build.py      # compiles for sm_80, sm_90a and sm_100; fails on spills and warnings

The program prints a line of JSON for each kernel and architecture: registers, bytes of stack, spills, shared memory.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
NO_NVCC = "needs nvcc: put it on PATH, or name its toolkit in CUDA_HOME"
ARCHITECTURES = ("80", "90a", "100")


def missing_tools() -> str | None:
    """What these builds need and this machine lacks, or None."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "no sources beside the tests"
    for package in ("cmake", "ninja"):
        if importlib.util.find_spec(package) is None:
            return f"needs the {package} package"
    return None if shutil.which("c++") or shutil.which("g++") else "needs a C++ compiler"


def find_nvcc() -> str | None:
    """nvcc as CMake will look for it."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        (found for home in homes if home and (found := shutil.which("nvcc", path=f"{home}/bin"))), None
    )


def _build(folder: Path, target: str, *options: str, jobs: int = 2) -> str:
    """Configure and build one target; what the compilers said. One build at a time in a folder."""
    import cmake
    import ninja

    tool = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    configure = [tool, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", *options]
    configure += [f"-DLEVI_FAST_TORCH_ROOT={Path(torch.__file__).parent}"]
    folder.mkdir(parents=True, exist_ok=True)
    text = ""
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [tool, "--build", str(folder), "--target", target, "-j", str(jobs)]):
            done = subprocess.run(command, capture_output=True, text=True)
            text = done.stdout + done.stderr
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{text[-6000:]}")
    return text


def build_emulation(folder: Path | None = None, *, sanitize: bool = False) -> Path:
    """The kernels as a library for the CPU, whose ops are ``torch.ops.levi_fast_cuda_emulated.*``."""
    folder = folder or ROOT / "build" / "cuda-emulation"
    flags = ["-DCMAKE_CXX_FLAGS_RELEASE=-O1", f"-DLEVI_FAST_SANITIZE={'ON' if sanitize else 'OFF'}"]
    said = _build(folder, "levi_fast_cuda_emulated", "-DLEVI_FAST_CUDA_ONLY=emulation", *flags)
    if "warning:" in said and not sanitize:  # the sanitizers' own code sets GCC's warnings off
        raise RuntimeError(said[-6000:])
    return folder / "liblevi_fast_cuda_emulated.so"


def compile_for_gpus(folder: Path, architectures: tuple[str, ...] = ARCHITECTURES, jobs: int = 2) -> str:
    """nvcc's and ptxas' words on all sources, linked into ``liblevi_fast_cuda.so`` in ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)  # an object that is up to date says nothing
    options = ["-DLEVI_FAST_CUDA_ONLY=cuda", "-DLEVI_FAST_CUDA=on"]
    options += [f"-DLEVI_FAST_CUDA_ARCHITECTURES={';'.join(architectures)}"]
    return _build(folder, "levi_fast_cuda", *options, jobs=jobs)


_KERNEL = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?:(?P<shared>\d+) bytes smem)?\n",
    re.DOTALL,
)


def kernels(said: str) -> Iterator[dict[str, Any]]:
    """What ptxas reports, a kernel at a time."""
    for found in _KERNEL.finditer(said):
        short = re.search(r"[a-z][a-z_]*_kernelI?.*?(?=EE?v)|[a-z][a-z_]*_kernel", found["kernel"])
        yield {
            "kernel": short[0] if short else found["kernel"],
            "architecture": found["architecture"],
            "registers": int(found["registers"]),
            "stack": int(found["stack"]),
            "spills": int(found["stores"]) + int(found["loads"]),
            "shared": int(found["shared"] or 0),
        }


def main(arguments: list[str]) -> int:
    """Compile for all architectures, print, and return how many kernels spill or are kept in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "cuda-gate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2)
    parsed = parser.parse_args(arguments)
    reason = missing_tools() or (
        None if find_nvcc() else "needs nvcc: put it on PATH or name its toolkit in CUDA_HOME"
    )
    if reason is not None:
        print(f"cannot compile the CUDA kernels: {reason}", file=sys.stderr)
        return 2
    said = compile_for_gpus(parsed.folder, jobs=parsed.jobs)
    rows = list(kernels(said))
    warnings = [line for line in said.splitlines() if "warning" in line.lower()]
    bad = [row for row in rows if row["spills"] or row["stack"]]
    for row in rows:
        print(json.dumps(row))
    for line in warnings:
        print(line, file=sys.stderr)
    print(json.dumps({"compiled": len(rows), "spilling": len(bad), "warnings": len(warnings)}))
    return 1 if bad or warnings or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
