"""``manifest.json``: what a cache holds and what it was made from. Read with distrust, as any file from elsewhere."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from levi_fast.errors import DataError

MANIFEST_FILE = "manifest.json"
FORMAT = "levi_fast activation cache"
VERSION = 1
DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Name of a stored dtype -> bytes per number."""

# Nothing real comes near these; a manifest beyond them is broken or hostile, and must not make us allocate.
MAX_MANIFEST_BYTES = 64 * 2**20
_MAX_COUNT = 2**40
_MAX_WIDTH = 2**20
_MAX_HEADER_BYTES = 2**16  # what a shard may hold beside its numbers
_FILE_NAME = re.compile(r"(shard|rows)-[0-9]{3,9}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file of the cache: ``count`` rows in ``bytes`` bytes; both of the latter are None until it is written."""

    file: str
    count: int
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Part:
    """A data set in the cache: ``rows`` of the user's, the index from rows to stored entries, the entries' shards."""

    rows: int
    views: int
    index: FileEntry
    shards: tuple[FileEntry, ...]

    @property
    def entries(self) -> int:
        return sum(shard.count for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """Everything about a cache but its numbers.

    Attributes:
        key: see :mod:`levi_fast.cache.key`.
        backbone: name, number of layers, widths of the taps, weight files where it was loaded by name.
        layout: batch_size and batches_per_shard, which decide what is computed together.
        environment: what else the last bits may depend on.
        parts: by name.
        complete: False while it is being built.
    """

    key: dict[str, Any]
    backbone: dict[str, Any]
    layout: dict[str, int]
    environment: dict[str, Any]
    parts: dict[str, Part]
    complete: bool = field(default=False)

    @property
    def layers(self) -> list[int]:
        return list(self.key["taps"])

    @property
    def widths(self) -> list[int]:
        return list(self.backbone["widths"])

    @property
    def dtype(self) -> str:
        return str(self.key["dtype"])

    def files(self) -> list[FileEntry]:
        """Every file but the manifest itself."""
        return [entry for part in self.parts.values() for entry in (part.index, *part.shards)]

    def to_json(self) -> str:
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: bytes, path: str) -> Manifest:
        """Parse and check.

        Args:
            text: content of the file.
            path: of the cache, for messages.

        Raises:
            DataError: naming the field that is missing, of another type or out of range.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise DataError(f"cache: {path}/{MANIFEST_FILE} is no JSON: {error}") from None
        reader = _Reader(f"cache: {path}/{MANIFEST_FILE}")
        reader.expect(isinstance(document, dict) and document.get("format") == FORMAT, "format", FORMAT, document)
        if document.get("version") != VERSION:
            raise DataError(f"{reader.where}: expected version {VERSION}, got {document.get('version')!r}")
        return reader.manifest(document)


def row_bytes(dtype: str, widths: list[int]) -> int:
    """Bytes of one stored entry: int8 has a float32 scale per tap."""
    return DTYPES[dtype] * sum(widths) + (4 * len(widths) if dtype == "int8" else 0)


class _Reader:
    """Takes a parsed document apart, and names what does not fit."""

    def __init__(self, where: str) -> None:
        self.where = where

    def expect(self, fits: bool, name: str, expected: str, got: Any) -> None:
        if not fits:
            text = repr(got)
            shown = text if len(text) <= 80 else f"{text[:77]}..."
            raise DataError(f"{self.where}: {name}: expected {expected}, got {shown}")

    def mapping(self, value: Any, name: str) -> dict[str, Any]:
        self.expect(isinstance(value, dict), name, "an object", value)
        return dict(value)

    def count(self, value: Any, name: str, least: int = 0, most: int = _MAX_COUNT) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        self.expect(fits, name, f"a whole number from {least} to {most}", value)
        return int(value)

    def counts(self, value: Any, name: str, most: int) -> list[int]:
        self.expect(isinstance(value, list) and 0 < len(value) <= 4096, name, "a list of 1 to 4096 numbers", value)
        return [self.count(one, f"{name}[{place}]", most=most) for place, one in enumerate(value)]

    def text(self, value: Any, name: str) -> str:
        self.expect(isinstance(value, str) and len(value) <= 4096, name, "text", value)
        return str(value)

    def manifest(self, document: dict[str, Any]) -> Manifest:
        key = self.mapping(document.get("key"), "key")
        backbone = self.mapping(document.get("backbone"), "backbone")
        self.key(key)
        widths = self.counts(backbone.get("widths"), "backbone.widths", _MAX_WIDTH)
        self.expect(len(widths) == len(key["taps"]), "backbone.widths", "one width per tap", widths)
        self.count(backbone.get("num_layers"), "backbone.num_layers", 1, _MAX_WIDTH)
        self.expect(max(key["taps"]) < backbone["num_layers"], "key.taps", "layers of the backbone", key["taps"])
        for name in ("name", "loaded_as"):
            if backbone.get(name) is not None:
                self.text(backbone[name], f"backbone.{name}")
        self.weight_files(backbone.get("files"))
        layout = self.mapping(document.get("layout"), "layout")
        for name in ("batch_size", "batches_per_shard"):
            self.count(layout.get(name), f"layout.{name}", 1)
        complete = document.get("complete")
        self.expect(isinstance(complete, bool), "complete", "true or false", complete)
        parts = self.mapping(document.get("parts"), "parts")
        self.expect(set(parts) == set(key["data"]), "parts", "the names in key.data", list(parts))
        size = row_bytes(key["dtype"], widths)
        read = {name: self.part(part, f"parts[{name!r}]", bool(complete), size) for name, part in parts.items()}
        for name, part in read.items():
            self.expect(part.views == key["views"], f"parts[{name!r}].views", f"{key['views']}", part.views)
        names = [entry.file for part in read.values() for entry in (part.index, *part.shards)]
        self.expect(len(set(names)) == len(names), "parts", "every file once", sorted(names))
        environment = self.mapping(document.get("environment"), "environment")
        return Manifest(key, backbone, layout, environment, read, bool(complete))

    def key(self, key: dict[str, Any]) -> None:
        self.text(key.get("fingerprint"), "key.fingerprint")
        self.mapping(key.get("config"), "key.config")
        for name in ("preprocessor", "backbone_dtype"):
            if key.get(name) is not None:
                self.text(key[name], f"key.{name}")
        taps = self.counts(key.get("taps"), "key.taps", _MAX_WIDTH)
        self.expect(taps == sorted(set(taps)), "key.taps", "ascending layers", taps)
        self.text(key.get("pooling"), "key.pooling")
        if key.get("max_length") is not None:
            self.count(key["max_length"], "key.max_length", 1)
        dtype = key.get("dtype")
        self.expect(isinstance(dtype, str) and dtype in DTYPES, "key.dtype", f"one of {', '.join(DTYPES)}", dtype)
        self.count(key.get("views"), "key.views", 1)
        self.count(key.get("view_seed"), "key.view_seed")
        for name, digest in self.mapping(key.get("data"), "key.data").items():
            self.text(digest, f"key.data[{name!r}]")

    def weight_files(self, files: Any) -> None:
        self.expect(isinstance(files, list), "backbone.files", "a list", files)
        for place, entry in enumerate(files):
            name = f"backbone.files[{place}]"
            entry = self.mapping(entry, name)
            for field_name in ("name", "sha256"):
                self.text(entry.get(field_name), f"{name}.{field_name}")
            for field_name in ("size", "mtime_ns", "ctime_ns", "inode"):
                self.count(entry.get(field_name), f"{name}.{field_name}", most=2**64)

    def part(self, value: Any, name: str, complete: bool, size: int) -> Part:
        part = self.mapping(value, name)
        rows = self.count(part.get("rows"), f"{name}.rows", 1)
        views = self.count(part.get("views"), f"{name}.views", 1)
        index = self.file(part.get("index"), f"{name}.index", "rows", True, 8)
        self.expect(
            index.count == rows * views, f"{name}.index.count", f"{rows} rows times {views} views", index.count
        )
        shards = part.get("shards")
        self.expect(isinstance(shards, list) and len(shards) > 0, f"{name}.shards", "a list of shards", shards)
        assert isinstance(shards, list)
        read = [
            self.file(shard, f"{name}.shards[{i}]", "shard", complete, size, slack=_MAX_HEADER_BYTES)
            for i, shard in enumerate(shards)
        ]
        result = Part(rows, views, index, tuple(read))
        self.expect(result.entries <= index.count, f"{name}.shards", f"at most {index.count} entries", result.entries)
        return result

    def file(self, value: Any, name: str, kind: str, written: bool, size: int, slack: int = 2**50) -> FileEntry:
        entry = self.mapping(value, name)
        file = entry.get("file")
        fits = isinstance(file, str) and bool(_FILE_NAME.fullmatch(file)) and file.startswith(kind)
        self.expect(fits, f"{name}.file", f"a name such as {kind}-00000.safetensors in this folder", file)
        count = self.count(entry.get("count"), f"{name}.count", 1)
        if not written and entry.get("bytes") is None and entry.get("sha256") is None:
            return FileEntry(str(file), count)
        length = self.count(entry.get("bytes"), f"{name}.bytes", most=2**50)
        fits = count * size <= length <= count * size + slack
        self.expect(fits, f"{name}.bytes", f"about {count * size} for {count} rows of {size}", length)
        sha256 = self.text(entry.get("sha256"), f"{name}.sha256")
        self.expect(bool(_SHA256.fullmatch(sha256)), f"{name}.sha256", "64 hexadecimal digits", sha256)
        return FileEntry(str(file), count, length, sha256)
