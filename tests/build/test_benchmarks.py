"""The benchmark scripts import what the library has: they are run by hand, and would else break unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("folder", [".", "evidence", "gpu"])
def test_every_script_is_importable(folder: str) -> None:
    if folder == "evidence":
        pytest.importorskip("matplotlib")
    if folder == "gpu":
        pytest.importorskip("triton")
    names = [file.stem for file in sorted((BENCHMARKS / folder).glob("*.py"))]
    assert names
    script = f"import sys; sys.path.insert(0, {str(BENCHMARKS / folder)!r}); import {', '.join(names)}"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
