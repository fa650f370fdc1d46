"""Several processes building one cache: each its own shards, the first one the rest.

They meet in the folder, through their lock files: no process group is needed, and a process that died is told from
one that is slow.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from levi_fast.cache.lock import BuilderLock, lock_path, peek, remove_stale
from levi_fast.errors import DataError

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class World:
    """This process among those of its launch; ``torchrun`` sets the variables that it is read from."""

    rank: int = 0
    size: int = 1
    launch: str = ""

    @classmethod
    def from_environment(cls) -> World:
        """RANK and WORLD_SIZE; one process where they are not set.

        Raises:
            DataError: they are no numbers, or RANK is not below WORLD_SIZE.
        """
        rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None or size is None:
            return cls()
        if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
            raise DataError(f"RANK and WORLD_SIZE: expected 0 <= RANK < WORLD_SIZE, got {rank!r} and {size!r}")
        names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
        launch = "/".join([size, *(os.environ.get(name, "") for name in names)])
        return cls(int(rank), int(size), launch)

    @property
    def others(self) -> range:
        return range(1, self.size)


def announce(folder: Path, world: World, lock: BuilderLock) -> None:
    """Rank 0: the plan stands, the others may start. Files of earlier launches are cleared away before."""
    rank = 1
    while rank < world.size or lock_path(folder, rank).exists():
        remove_stale(folder, rank)
        rank += 1
    lock.say("building")


def wait_for_plan(folder: Path, world: World, seconds: float) -> None:
    """The other ranks: until rank 0 of this launch has written the plan.

    Raises:
        DataError: rank 0 failed, is of another launch, or did not come.
    """
    end = time.monotonic() + seconds
    while True:
        held, first = peek(folder, 0)
        if held and first is not None and first.launch != world.launch:
            raise DataError(f"cache: {folder} is being built by {first}, of another launch")
        if held and first is not None and first.state == "building":
            return
        if not held and first is not None and first.launch == world.launch and _since_start(lock_path(folder, 0)):
            _raise_failed(0, first.error, str(first))
        if time.monotonic() > end:
            raise DataError(f"cache: {folder}: rank 0 did not start building within {seconds:g} seconds")
        time.sleep(_POLL_SECONDS)


def check_others(folder: Path, world: World) -> bool:
    """Whether all other ranks are done; rank 0 asks this, others ask whether rank 0 is still there.

    Raises:
        DataError: a rank failed or died; names it and its error.
    """
    if world.rank != 0:
        held, first = peek(folder, 0)
        if not held:
            _raise_failed(0, first.error if first else "", str(first or "unknown process"))
        return False
    done = True
    for rank in world.others:
        held, holder = peek(folder, rank)
        if holder is not None and holder.launch == world.launch:
            if not held:
                _raise_failed(rank, holder.error, str(holder))
            done = done and holder.state == "done"
        else:
            done = False  # not started yet
    return done


def wait_for_others(folder: Path, world: World, seconds: float) -> None:
    """Rank 0: until all others are done.

    Raises:
        DataError: a rank failed, died, or did not start within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not check_others(folder, world):
        missing = [rank for rank in world.others if not peek(folder, rank)[0]]
        if not missing:
            end = time.monotonic() + seconds  # all are there and at work, however long it takes
        elif time.monotonic() > end:
            raise DataError(f"cache: {folder}: ranks {missing} did not start within {seconds:g} seconds")
        time.sleep(_POLL_SECONDS)


def wait_for_end(folder: Path, is_complete: Callable[[], bool]) -> None:
    """The other ranks, when done: until rank 0 has written the manifest.

    Raises:
        DataError: rank 0 failed or died before.
    """
    while True:
        held, first = peek(folder, 0)
        if not held:
            if is_complete():
                return
            _raise_failed(0, first.error if first else "", str(first or "unknown process"))
        time.sleep(_POLL_SECONDS)


def _since_start(path: Path) -> bool:
    """Whether a file was written after this process began: by this launch, not by one that ended before."""
    try:
        return path.stat().st_mtime > psutil.Process().create_time()
    except FileNotFoundError:
        return False


def _raise_failed(rank: int, error: str, holder: str) -> None:
    raise DataError(f"cache: rank {rank} ({holder}) " + (f"failed: {error}" if error else "died"))
