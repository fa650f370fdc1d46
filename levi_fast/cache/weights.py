"""The files that hold a backbone's weights: told from others without loading them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from levi_fast.backbones import resolve_backbone

_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")


def weight_files(name: str) -> list[Path]:
    """The weight files behind a folder or a hub id that is on this machine; [] where they cannot be found."""
    folder = Path(resolve_backbone(name))
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            folder = Path(str(cached_file(name, "config.json"))).parent
        except OSError:
            return []
    for pattern in _PATTERNS:  # transformers prefers safetensors where there are both
        found = sorted(file for file in folder.glob(pattern) if file.is_file())
        if found:
            return found
    return []


def describe_files(files: list[Path]) -> list[dict[str, Any]]:
    """Name, marks of the file system and SHA-256 of every file, as the manifest keeps them."""
    return [{"name": file.name, **_marks(file), "sha256": file_sha256(file)} for file in files]


def same_files(recorded: list[dict[str, Any]], files: list[Path]) -> bool:
    """Whether the files are still those that were recorded.

    A file whose size, inode and times (that of its last change of any kind among them) are the recorded ones is not
    read; any other is hashed.
    """
    if not recorded or [entry["name"] for entry in recorded] != [file.name for file in files]:
        return False
    return all(
        _marks(file) == {key: entry[key] for key in ("size", "mtime_ns", "ctime_ns", "inode")}
        or (file.stat().st_size == entry["size"] and file_sha256(file) == entry["sha256"])
        for entry, file in zip(recorded, files, strict=True)
    )


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marks(file: Path) -> dict[str, int]:
    found = os.stat(file)
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }
