"""What several benchmarks share: the real data sets, and what their figures were measured on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from levi_fast import __version__
from levi_fast.data.tables import Columns
from levi_fast.training.named_tasks import MovieLensSplits
from levi_fast.training.tasks import TableFiles, TableTask


def load_task(name: str, data: Path, split: str, seed: int) -> MovieLensSplits | TableTask:
    """The named task, read from ``data``."""
    if name == "movielens":
        return MovieLensSplits.load(str(data), split, seed)
    files = TableFiles(
        str(data / "orig" / "train.tsv"),
        str(data / "orig" / "dev.tsv"),
        str(data / "orig" / "test.tsv"),
        {"new": str(data / "new" / "test.tsv")},
    )
    return TableTask.load(files, Columns(text=("Text",), label="Sentiment"))


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
