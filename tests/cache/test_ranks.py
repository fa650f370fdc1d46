"""Several processes build one cache: each its own shards, the same bits as one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast import ActivationCache, DataError
from levi_fast.cache.ranks import World
from levi_fast.data.encoded import EncodedDataset

SCRIPT = Path(__file__).with_name("rank_builder.py")
SMALL = {"batch_size": 4, "batches_per_shard": 2}
Folder = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def whole(
    tmp_path: Path, counting: Callable[..., Any], texts: Callable[..., EncodedDataset], read_folder: Folder
) -> dict[str, bytes]:
    """The files of a build by one process with one thread: 13 batches."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = {"train": texts(40, 0, 0), "test": texts(9, 1, 0)}
        ActivationCache.build(tmp_path / "whole", counting(), data, **SMALL)
    finally:
        torch.set_num_threads(threads)
    return read_folder(tmp_path / "whole")


@pytest.fixture
def launch(tiny_bert_dir: str) -> Callable[..., list[list[int]]]:
    """``launch((folder, ranks, trouble...), ...)``: builds one after another; exit statuses of the ranks of each."""

    def run(*builds: tuple[Any, ...]) -> list[list[int]]:
        ran = subprocess.run(
            [sys.executable, str(SCRIPT), tiny_bert_dir, *(":".join(map(str, build)) for build in builds)],
            env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")},
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
        return [[int(status) for status in line.split()] for line in ran.stdout.splitlines()]

    return run


def said(folder: Path, rank: int) -> str:
    return Path(f"{folder}.{rank}.txt").read_text()


def batches(folder: Path, rank: int) -> int:
    found = re.search(r"ran \d+ (\d+)", said(folder, rank))
    assert found is not None
    return int(found[1])


def test_two_processes_give_the_bits_of_one_even_after_a_failure(
    tmp_path: Path, launch: Callable[..., Any], whole: dict[str, bytes], read_folder: Folder
) -> None:
    two, broken = tmp_path / "two", tmp_path / "broken"
    ended = launch((two, 2), (broken, 2, "fail", 1))
    assert ended[0] == [0, 0], said(two, 0) + said(two, 1)
    assert batches(two, 0) + batches(two, 1) == 13 and min(batches(two, 0), batches(two, 1)) >= 5  # no batch twice
    assert read_folder(two) == whole
    assert ended[1] == [1, 1]
    assert re.search(r"rank 1 \(process \d+ on .*\) failed: this rank is out of luck", said(broken, 0))
    with pytest.raises(DataError, match="not finished"):
        ActivationCache.open(broken)
    assert launch((broken, 1)) == [[0]]
    assert read_folder(broken) == whole


@pytest.mark.slow
def test_killed_ranks_are_named_and_others_go_on_later(
    tmp_path: Path, launch: Callable[..., Any], whole: dict[str, bytes], read_folder: Folder
) -> None:
    three, dead, headless = tmp_path / "three", tmp_path / "dead", tmp_path / "headless"
    ended = launch((three, 3), (dead, 3, "die", 1), (headless, 2, "die", 0))
    assert ended == [[0, 0, 0], [1, -9, 1], [-9, 1]]
    assert read_folder(three) == whole
    assert re.search(r"rank 1 \(process \d+ on .*\) died", said(dead, 0))
    assert re.search(r"rank 0 \(process \d+ on .*\) died", said(headless, 1))
    # as many processes as one likes go on later; then there is nothing left to do
    assert launch((dead, 2), (dead, 2), (headless, 3)) == [[0, 0], [0, 0], [0, 0, 0]]
    for folder in (dead, headless):
        assert read_folder(folder) == whole
    assert batches(dead, 0) == batches(dead, 1) == 0


@pytest.mark.slow
def test_torchrun(tmp_path: Path, tiny_bert_dir: str, whole: dict[str, bytes], read_folder: Folder) -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
            *(str(SCRIPT), tiny_bert_dir, str(tmp_path / "c")),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert sorted(re.findall(r"ran (\d)", ran.stdout)) == ["0", "1", "2"]
    assert read_folder(tmp_path / "c") == whole


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, "")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (World.from_environment().rank, World.from_environment().size) == (2, 4)
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(DataError, match="expected 0 <= RANK < WORLD_SIZE, got '4' and '4'"):
        World.from_environment()


def test_a_first_rank_that_never_comes(
    tmp_path: Path,
    counting: Callable[..., Any],
    texts: Callable[..., EncodedDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"rank 0 did not start building within 0\.2 seconds"):
        ActivationCache.build(tmp_path / "c", counting(), texts(), wait_seconds=0.2, **SMALL)


def test_a_later_rank_that_never_comes(
    tmp_path: Path,
    counting: Callable[..., Any],
    texts: Callable[..., EncodedDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DataError, match=r"ranks \[1\] did not start within 0\.2 seconds"):
        ActivationCache.build(tmp_path / "c", counting(), texts(), wait_seconds=0.2, **SMALL)
