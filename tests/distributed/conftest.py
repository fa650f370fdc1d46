"""Starting processes under torchrun, and a command to start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

WORDS = ["the", "film", "was", "very", "story", "plot", "long", "music"]
JUDGEMENTS = ["good", "great", "fine", "bad", "poor", "dull"]


Job = subprocess.Popen[str]
Ended = subprocess.CompletedProcess[str]


def _start(arguments: list[str], ranks: int) -> Job:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _launch(arguments: list[str], ranks: int) -> Ended:
    process = _start(arguments, ranks)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _kill_all(process: Job) -> None:
    whole = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in whole:
        one.kill()
    process.communicate(timeout=60)
    psutil.wait_procs(whole, timeout=60)


@pytest.fixture(scope="session")
def start() -> Callable[[list[str], int], Job]:
    """``start(arguments, ranks)``: a program that has begun, under torchrun where there are several ranks."""
    return _start


@pytest.fixture(scope="session")
def launch() -> Callable[[list[str], int], Ended]:
    """``launch(arguments, ranks)``: the same, when it has ended."""
    return _launch


@pytest.fixture(scope="session")
def kill_all() -> Callable[[Job], None]:
    """``kill_all(job)``: kill -9 of torchrun and of every process it started, as when a machine goes."""
    return _kill_all


@pytest.fixture
def command(tiny_bert_dir: str, tmp_path: Path) -> list[str]:
    words = [*WORDS, *JUDGEMENTS]
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 80), ("validation", 31), ("new", 27)):
        drawn = torch.randint(0, 8, (count, 6), generator=generator).tolist()
        rows = [f"{' '.join(words[w] for w in row)} {words[8 + i % 6]},{'pos' if i % 6 < 3 else 'neg'}" for i, row in
                enumerate(drawn)]  # fmt: skip
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    files = ["--train", str(tmp_path / "train.csv"), "--validation", str(tmp_path / "validation.csv")]
    files += ["--ood", f"new={tmp_path / 'new.csv'}", "--text-column", "text", "--label-column", "label"]
    return ["-m", "levi_fast", "train", *files, "--backbone", tiny_bert_dir, "--hidden-width", "8", "--epochs", "3"]
