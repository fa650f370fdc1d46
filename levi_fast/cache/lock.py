"""One builder per folder: a lock that the system lets go when its process dies, and that says who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from levi_fast.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: a cache can be read there
    fcntl = None  # type: ignore[assignment]

# Somebody who only looks whether the lock is held (see `peek`) holds it himself for a moment.
_PATIENCE_SECONDS = 0.5
_MAX_BYTES = 2**16


@dataclass(frozen=True)
class Holder:
    """What stands in a lock file.

    Attributes:
        pid, host: of the process.
        launch: tells one launch of several processes from another.
        state: "waiting", "building", "done" or "failed".
        error: of a process that failed.
    """

    pid: int
    host: str
    launch: str
    state: str = "building"
    error: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class BuilderLock:
    """Holds ``builder-RANK.lock`` in a folder, by ``flock``: a killed process leaves a file, but no lock.

    Raises (on entering):
        DataError: another process holds it (named), or the folder cannot be written.
    """

    def __init__(self, folder: Path, rank: int, launch: str) -> None:
        self.path = lock_path(folder, rank)
        self.holder = Holder(os.getpid(), socket.gethostname(), launch)
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        if fcntl is None:
            raise DataError("cache: building needs a system with file locks (flock), such as Linux")
        end = time.monotonic() + _PATIENCE_SECONDS
        while (descriptor := _lock(self.path)) is None:
            if time.monotonic() > end:
                raise DataError(
                    f"cache: {self.path.parent} is being built by {_read(self.path) or 'another process'}; "
                    "wait until it is done, or stop it: a later build goes on from there"
                )
            time.sleep(0.02)
        self._descriptor = descriptor
        try:
            self.say("waiting")
        except OSError:  # a full disk
            os.close(descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        assert self._descriptor is not None
        try:
            if error is None:
                self.path.unlink(missing_ok=True)
            else:  # what the others will read
                with contextlib.suppress(OSError):
                    self.say("failed", str(error) or type(error).__name__)
        finally:
            os.close(self._descriptor)
            self._descriptor = None

    def say(self, state: str, error: str = "") -> None:
        """Change what the file says."""
        assert self._descriptor is not None
        self.holder = replace(self.holder, state=state, error=error[:2000])
        text = json.dumps(vars(self.holder)).encode()
        os.pwrite(self._descriptor, text.ljust(_read_size(self._descriptor)), 0)  # no moment with an empty file


def lock_path(folder: Path, rank: int) -> Path:
    """The lock file of a rank."""
    return folder / f"builder-{rank}.lock"


def peek(folder: Path, rank: int) -> tuple[bool, Holder | None]:
    """Whether a rank's lock is held, and what its file says (None where it says nothing)."""
    path = lock_path(folder, rank)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False, None
    try:
        holder = _read(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, holder
        return False, holder
    finally:
        os.close(descriptor)


def remove_stale(folder: Path, rank: int) -> None:
    """Remove a lock file that nobody holds."""
    path = lock_path(folder, rank)
    if path.exists() and (descriptor := _lock(path)) is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Open and lock a file; None where another process holds it, or removed it just now."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _read(path: Path) -> Holder | None:
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_MAX_BYTES))
        return Holder(**{name: type(default)(document[name]) for name, default in vars(_EMPTY).items()})
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


_EMPTY = Holder(0, "", "")
