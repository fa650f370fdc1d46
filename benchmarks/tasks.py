"""What several benchmarks' figures were measured on."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch
import transformers

from levi_fast import __version__


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "levi_fast": __version__,
        "commit": commit,
        "uncommitted_changes": any(not line.startswith("??") for line in dirty.splitlines()),
    }
