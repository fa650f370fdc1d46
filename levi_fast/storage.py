"""Writing files so that a crash leaves either the old content or the new, never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def fsync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk, so that a rename inside it survives a power loss."""
    if os.name == "nt":  # Windows cannot open a directory for fsync
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write ``data`` to ``path`` through a temporary file in the same folder, fsynced, then renamed.

    Args:
        path: the file to create or replace; its folder must exist.
        data: bytes, or text that is encoded as UTF-8.

    Raises:
        OSError: if the folder is missing or cannot be written.
    """
    path = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp makes 0600; a shared model folder wants the usual mode
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


@contextlib.contextmanager
def staged_directory(directory: str | Path) -> Iterator[Path]:
    """Yield an empty folder inside ``directory``; on success its files are fsynced and renamed into place.

    Files of the same name, those in subfolders too, are replaced one by one, each atomically; on an exception nothing
    is moved.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".staged-", dir=directory) as name:
        stage = Path(name)
        yield stage
        folders = {directory}
        for source in sorted(path for path in stage.rglob("*") if path.is_file()):
            with open(source, "rb") as file:
                os.fsync(file.fileno())
            target = directory / source.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            folders |= {target.parent, target.parent.parent} if target.parent != directory else set()
    for folder in folders:
        fsync_directory(folder)


def umask() -> int:
    """The process's file mode mask, which the system tells only to whoever sets it."""
    current = os.umask(0)
    os.umask(current)
    return current
