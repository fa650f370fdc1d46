"""``CachedTaps``: the stored taps of one data set, gathered row by row from memory-mapped shards."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from levi_fast.cache.manifest import FileEntry, Part
from levi_fast.cache.shards import check_tensors, decode, tap_of_column
from levi_fast.cache.store import Store, damage, read_tensors
from levi_fast.errors import DataError

RESIDENT_BYTES = 2**30
STATM = "/proc/self/statm"  # Linux


class Mapped:
    """The open shards of a part.

    Mapped pages count as this process's memory until they are let go, and the system maps far more than the rows
    asked for. So all shards are closed whenever the mapped pages have come to ``resident_bytes``; what the system
    keeps of the files in its own cache stays, and mapping them again is quick.

    Args:
        store: where the files are.
        shards: in the order of their entries.
        dtype, widths: of the cache.
        check: compare a shard's checksum before its first use.
        resident_bytes: see above.
    """

    def __init__(
        self,
        store: Store,
        shards: Sequence[FileEntry],
        dtype: str,
        widths: Sequence[int],
        *,
        check: bool,
        resident_bytes: int,
    ) -> None:
        self.store, self.shards, self.dtype, self.widths = store, list(shards), dtype, list(widths)
        self.check, self.resident_bytes = check, resident_bytes
        counts = torch.tensor([shard.count for shard in shards], dtype=torch.int64)
        self.starts = counts.cumsum(0) - counts
        self.columns = tap_of_column(widths)
        self._open: dict[int, dict[str, Tensor]] = {}
        self._checked: set[int] = set()
        self._counted = store.mapped and os.path.exists(STATM)  # else sizes decide
        self._baseline = 0
        self._lock = threading.Lock()  # a prefetching thread may read beside the main one

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which opens the files itself."""
        return {**vars(self), "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def gather(self, place: int, rows: Tensor | slice) -> Tensor:
        """Float32 rows of a shard, ``[n, sum of widths]``, numbered within it; a slice may be a view of the file."""
        tensors = self._tensors(place)
        return decode({name: tensor[rows] for name, tensor in tensors.items()}, self.columns)

    def close(self) -> None:
        """Unmap everything; it is mapped again when needed."""
        self._open.clear()

    def _tensors(self, place: int) -> dict[str, Tensor]:
        with self._lock:
            if self._open and self._held(place) > self.resident_bytes:
                self.close()
            tensors = self._open.get(place)
            if tensors is None:
                if not self._open and self._counted:
                    self._baseline = _mapped_bytes()
                tensors = self._open[place] = self._read(place)
            return tensors

    def _held(self, place: int) -> int:
        """Bytes that the open shards may hold, the one asked for included; no more than all of them."""
        whole = sum(self.shards[one].bytes or 0 for one in {*self._open, place})
        if whole <= self.resident_bytes or not self._counted:
            return whole
        return min(whole, _mapped_bytes() - self._baseline)

    def _read(self, place: int) -> dict[str, Tensor]:
        entry = self.shards[place]
        found = damage(self.store, entry, checksum=self.check and place not in self._checked)
        if found is not None:
            raise DataError(
                f"cache: {self.store.path}/{entry.file} is damaged: {found}; building the cache again with the same "
                "arguments rebuilds what is damaged"
            )
        tensors = read_tensors(self.store, entry.file)
        check_tensors(tensors, entry.count, self.dtype, self.widths, f"cache: {self.store.path}/{entry.file}")
        self._checked.add(place)
        return tensors


class CachedTaps:
    """Taps of one data set: indexed like a float32 tensor ``[U, sum of tap widths]`` of its U stored entries.

    ``taps[rows]`` takes an int64 tensor of entries and answers with a float32 tensor in memory, whatever the
    stored dtype; only the rows asked for are read. :meth:`load` reads everything.

    Attributes:
        rows: int64 ``[N]``, which entry each row of the data set uses (``[views, N]`` where views > 1).
        layers, widths: of the taps that are in the columns.
        shape: ``(U, sum of widths)``.
        dtype: what they are stored as: "float32", "bfloat16" or "int8".
    """

    def __init__(self, mapped: Mapped, rows: Tensor, digests: Tensor, layers: list[int], wanted: list[int]) -> None:
        missing = sorted(set(wanted) - set(layers))
        if missing:
            raise ValueError(f"layers: expected some of {layers}, got {missing}")
        self.mapped, self.rows, self.digests, self._all_layers = mapped, rows, digests, layers
        self.dtype = mapped.dtype
        self.layers = list(wanted)
        widths = dict(zip(layers, mapped.widths, strict=True))
        self.widths = [widths[layer] for layer in wanted]
        self._columns: Tensor | None = None
        if self.layers != layers:
            column = torch.arange(sum(mapped.widths))
            places = [layers.index(layer) for layer in wanted]
            self._columns = torch.cat([column[mapped.columns == place] for place in places])
        self.shape = torch.Size((sum(shard.count for shard in mapped.shards), sum(self.widths)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), self.shape[1])
        shard_of = torch.bucketize(rows, self.mapped.starts, right=True) - 1
        for place in shard_of.unique().tolist():
            here = (shard_of == place).nonzero().flatten()
            out[here] = self._narrow(self.mapped.gather(place, rows[here] - self.mapped.starts[place]))
        return out

    def select(self, layers: list[int]) -> CachedTaps:
        """The same entries with the columns of some layers only, sharing the open files.

        Raises:
            ValueError: a layer that is not stored.
        """
        return CachedTaps(self.mapped, self.rows, self.digests, self._all_layers, layers)

    def load(self) -> Tensor:
        """All entries in memory, float32 ``[U, sum of widths]``; shards are unmapped one by one."""
        out = torch.empty(self.shape)
        start = 0
        for chunk in self.chunks():
            out[start : start + len(chunk)] = chunk
            start += len(chunk)
        return out

    def chunks(self) -> Iterator[Tensor]:
        """Float32 entries in stored order, a shard at a time, at the disk's speed; not to be written to."""
        for place in range(len(self.mapped.shards)):
            yield self._narrow(self.mapped.gather(place, slice(None)))
            self.mapped.close()

    def _narrow(self, taps: Tensor) -> Tensor:
        return taps if self._columns is None else taps[:, self._columns]


def _mapped_bytes() -> int:
    """Pages of files in this process's memory."""
    with open(STATM, "rb") as file:
        return int(file.read().split()[2]) * mmap.PAGESIZE


def open_part(
    store: Store, part: Part, dtype: str, layers: list[int], widths: list[int], *, check: bool, resident_bytes: int
) -> CachedTaps:
    """Open a part: its index is read and checked, its shards wait until rows are asked for.

    Raises:
        DataError: the index is damaged, or points outside the part.
    """
    where = f"cache: {store.path}/{part.index.file}"
    found = damage(store, part.index, checksum=True)
    if found is not None:
        raise DataError(f"{where} is damaged: {found}")
    tensors = read_tensors(store, part.index.file)
    rows, digests = tensors.get("rows"), tensors.get("digests")
    if rows is None or rows.dtype != torch.int64 or list(rows.shape) != [part.views, part.rows]:
        raise DataError(f"{where}: expected rows int64 [{part.views}, {part.rows}]")
    if digests is None or digests.dtype != torch.uint8 or list(digests.shape) != [part.entries, 16]:
        raise DataError(f"{where}: expected digests uint8 [{part.entries}, 16]")
    if int(rows.min()) < 0 or int(rows.max()) >= part.entries:
        raise DataError(f"{where}: expected rows from 0 to {part.entries - 1}, got {int(rows.min())}..{rows.max()}")
    rows = rows.clone()  # in memory: the file may be rebuilt under us
    mapped = Mapped(store, part.shards, dtype, widths, check=check, resident_bytes=resident_bytes)
    return CachedTaps(mapped, rows[0] if part.views == 1 else rows, digests.clone(), layers, layers)
