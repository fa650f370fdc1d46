"""Reading a cache's files: memory-mapped from a folder, or fetched through ``fsspec``."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
from torch import Tensor

from levi_fast.cache.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest
from levi_fast.cache.weights import file_sha256
from levi_fast.errors import DataError


class Store(Protocol):
    """A folder of files, here or elsewhere."""

    path: str
    mapped: bool  # whether tensors are pages of a file, which the system may drop, or this process's own memory

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is none."""

    def read(self, name: str) -> bytes:
        """A whole file."""

    def sha256(self, name: str) -> str:
        """Digest of a file's content."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file; memory-mapped where that is possible."""


def open_store(path: str | os.PathLike[str]) -> Store:
    """A folder, or any ``fsspec`` address (``memory://...``, ``s3://...``).

    Raises:
        DataError: for a protocol that ``fsspec`` does not know, or whose package is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return LocalStore(Path(text).expanduser())
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(text)
    except (ValueError, ImportError) as error:
        raise DataError(f"cache: {text}: {error}") from error
    if "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        return LocalStore(Path(root))
    return RemoteStore(text, system, root)


class LocalStore:
    """A folder on this machine. Files that are links to a place outside of it are refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = str(folder)
        self.mapped = True

    def file(self, name: str) -> Path:
        file = self.folder / name
        inside = os.path.realpath(self.folder)
        if os.path.dirname(os.path.realpath(file)) != inside:
            raise DataError(f"cache: {file} leads out of its folder, to {os.path.realpath(file)}")
        return file

    def size(self, name: str) -> int | None:
        file = self.file(name)
        return file.stat().st_size if file.is_file() else None

    def read(self, name: str) -> bytes:
        return self.file(name).read_bytes()

    def sha256(self, name: str) -> str:
        return file_sha256(self.file(name))

    def tensors(self, name: str) -> dict[str, Tensor]:
        with safetensors.safe_open(self.file(name), framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 (no mapping)


class RemoteStore:
    """Files behind ``fsspec``, fetched whole."""

    def __init__(self, path: str, system: Any, root: str) -> None:
        self.path, self.system, self.root = path, system, root
        self.mapped = False

    def _address(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        try:
            return int(self.system.size(self._address(name)))
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        return bytes(self.system.cat_file(self._address(name)))

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest()

    def tensors(self, name: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = safetensors.torch.load(self.read(name))
        return tensors


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a cache; None where there is none.

    Raises:
        DataError: it cannot be read, is too large, or is not what a manifest should be.
    """
    try:
        size = store.size(MANIFEST_FILE)
        if size is None:
            return None
        if size > MAX_MANIFEST_BYTES:
            raise DataError(
                f"cache: {store.path}/{MANIFEST_FILE}: expected at most {MAX_MANIFEST_BYTES} bytes, got {size}"
            )
        return Manifest.from_json(store.read(MANIFEST_FILE), store.path)
    except OSError as error:
        raise DataError(f"cache: {store.path}/{MANIFEST_FILE} cannot be read: {error}") from error


def damage(store: Store, entry: FileEntry, *, checksum: bool) -> str | None:
    """What is wrong with a file; None where nothing is.

    Args:
        store: the cache's.
        entry: what the manifest says of the file.
        checksum: read it and compare its SHA-256; otherwise its size alone.
    """
    try:
        size = store.size(entry.file)
        if size is None:
            return "missing"
        if entry.sha256 is None:
            return "not finished"
        if size != entry.bytes:
            return f"{size} bytes instead of {entry.bytes}"
        if checksum and store.sha256(entry.file) != entry.sha256:
            return "its checksum differs"
    except OSError as error:
        return f"cannot be read: {error}"
    return None


def read_tensors(store: Store, name: str) -> dict[str, Tensor]:
    """Tensors of a file.

    Raises:
        DataError: it is no safetensors file, or cannot be read.
    """
    try:
        return store.tensors(name)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cache: {store.path}/{name} cannot be read: {error}") from error
