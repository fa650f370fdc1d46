"""Shared by the kernel tests: what the native library allows, and a way to run Python in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from levi_fast.kernels import native

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not native.load().loaded:
        for item in items:
            if item.get_closest_marker("native"):
                item.add_marker(pytest.mark.skip(reason=native.load().reason))


@pytest.fixture(params=[pytest.param("cpp", marks=pytest.mark.native), "eager"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def restore_isa() -> Iterator[None]:
    before = native.cpu_isa()
    yield
    native.set_cpu_isa(before)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a fresh process and returns it; ``environment`` is added to this process's own."""

    def run(script: str, *, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LEVI_FAST_")}
        return subprocess.run(
            [sys.executable, "-c", script],
            cwd=cwd,
            env={**inherited, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run
