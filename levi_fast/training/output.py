"""The folder that a training run writes: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from levi_fast.errors import DataError
from levi_fast.storage import fsync_directory, umask


def require_new_folder(path: str | Path) -> Path:
    """Check that ``path`` can become the folder of a new run: it does not exist, or is an empty folder.

    Raises:
        DataError: it is a file or a folder with content, or its parent cannot be written.
    """
    folder = Path(path)
    if folder.is_symlink() and not folder.exists():
        raise DataError(f"--output: {folder} is a link to nothing")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output: expected a new folder, but {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"--output: expected a new or empty folder, but {folder} exists and is not empty")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise DataError(f"--output: cannot write into {parent}")
    return folder


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that takes its place at the end; on an exception nothing is left.

    Every file is flushed to disk before the rename, so ``path`` holds everything or does not exist.

    Raises:
        DataError: see :func:`require_new_folder`; checked again at the end.
    """
    folder = require_new_folder(path)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        with _terminated_as_exception():
            yield stage
            for file in sorted(stage.rglob("*")):
                if file.is_file():
                    file.chmod(0o666 & ~umask())  # some writers make 0600; a shared model folder wants the usual mode
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            require_new_folder(folder)
            stage.chmod(0o777 & ~umask())
            if folder.exists():
                folder.rmdir()  # empty: checked above; rmdir refuses anything else
            os.rename(stage, folder)
            fsync_directory(folder.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the temporary folder is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
