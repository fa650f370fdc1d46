"""From data sets to shards: what is computed with what, as a function of the data alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from levi_fast.cache.key import data_key
from levi_fast.cache.manifest import FileEntry
from levi_fast.cache.rows import DIGEST_BYTES, RowSource, row_source
from levi_fast.data.batching import length_batches
from levi_fast.errors import DataError
from levi_fast.taps import TapExtractor

BATCH_SIZE = 32
BATCHES_PER_SHARD = 64


@dataclass(frozen=True)
class Source:
    """A data set, its distinct rows found.

    Attributes:
        rows: where the backbone's inputs come from.
        views: fixed draws per row.
        first: for every distinct row, where it stands first.
        which: for every row, which of the distinct ones it equals.
        digests: of the distinct rows.
    """

    rows: RowSource
    views: int
    first: list[int]
    which: list[int]
    digests: list[bytes]

    def data_key(self) -> str:
        """Digest of the content: of all rows in order."""
        return data_key(self.digests[place] for place in self.which)


@dataclass(frozen=True)
class ShardPlan:
    """A shard before it is computed: row numbers per batch. Its entries stand in this order."""

    part: str
    file: str
    batches: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return sum(len(batch) for batch in self.batches)


@dataclass(frozen=True)
class PartPlan:
    """A data set's shards, and its index file: which entry each row uses, and each entry's digest."""

    rows: int
    views: int
    shards: tuple[ShardPlan, ...]
    index_file: str
    index: bytes


def find_sources(
    data: Mapping[str, Any], extractor: TapExtractor, *, views: int | None, view_seed: int, pad_token_id: int
) -> dict[str, Source]:
    """Read every data set once, and find its distinct rows.

    Raises:
        DataError: see :func:`levi_fast.cache.rows.row_source`; no data set at all; ``views`` below 1.
    """
    if not data:
        raise DataError("data: expected at least one data set, got none")
    if views is not None and (isinstance(views, bool) or not isinstance(views, int) or views < 1):
        raise DataError(f"views: expected a whole number of at least 1, got {views!r}")
    sources = {}
    for name, dataset in sorted(data.items()):  # the shards' numbers are not to depend on the order of a dict
        rows = row_source(
            name, dataset, extractor.input_names, views=views, view_seed=view_seed, pad_token_id=pad_token_id
        )
        seen: dict[bytes, int] = {}
        first: list[int] = []
        which: list[int] = []
        for row, digest in enumerate(rows.digests()):
            place = seen.setdefault(digest, len(first))
            if place == len(first):
                first.append(row)
            which.append(place)
        sources[name] = Source(rows, views or 1, first, which, list(seen))
    return sources


def plan_parts(sources: Mapping[str, Source], batch_size: int, batches_per_shard: int) -> dict[str, PartPlan]:
    """Batches of like length, a fixed number of them per shard; shards are numbered through all parts."""
    parts = {}
    number = 0
    for ordinal, (name, source) in enumerate(sources.items()):
        batches = length_batches([source.rows.lengths[row] for row in source.first], batch_size)
        shards = []
        for start in range(0, len(batches), batches_per_shard):
            chosen = batches[start : start + batches_per_shard]
            rows = tuple(tuple(source.first[place] for place in batch) for batch in chosen)
            shards.append(ShardPlan(name, f"shard-{number:05d}.safetensors", rows))
            number += 1
        order = torch.tensor([place for batch in batches for place in batch], dtype=torch.int64)
        entry_of = torch.empty_like(order)
        entry_of[order] = torch.arange(len(order))
        which = torch.tensor(source.which, dtype=torch.int64)
        rows_index = entry_of[which].view(source.views, -1)
        digests = torch.frombuffer(bytearray(b"".join(source.digests)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
        index = safetensors.torch.save({"rows": rows_index, "digests": digests[order].contiguous()})
        parts[name] = PartPlan(
            rows_index.shape[1], source.views, tuple(shards), f"rows-{ordinal:03d}.safetensors", index
        )
    return parts


def written(plan: ShardPlan, data: bytes | None = None) -> FileEntry:
    """The manifest's entry for a shard: unfinished, or with its content."""
    if data is None:
        return FileEntry(plan.file, plan.count)
    return FileEntry(plan.file, plan.count, len(data), hashlib.sha256(data).hexdigest())


def padded_tokens(source: RowSource, batch: tuple[int, ...]) -> int:
    """How much a batch costs: rows times the longest of them."""
    return len(batch) * max(source.lengths[row] for row in batch)


def stacked(taps: Tensor | list[Tensor]) -> Tensor:
    """An extractor's answer as float32 ``[B, sum of widths]`` on the CPU."""
    return torch.cat(list(taps), dim=1).float().cpu()
