"""Finding a data set's rows in a cache by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from levi_fast.cache.key import data_key
from levi_fast.cache.manifest import Manifest
from levi_fast.cache.reading import CachedTaps, Mapped
from levi_fast.errors import DataError


def find_rows(
    parts: Mapping[str, CachedTaps], manifest: Manifest, digests: Sequence[bytes], name: str
) -> tuple[CachedTaps, Tensor]:
    """Where the rows with the given digests are stored.

    The part of that name serves if it holds these very rows. Otherwise each row is looked for in all parts: a data
    set that was split in another way, reordered or cut down is served too. (Its taps were then computed in other
    batches than those of a run without a cache: equal up to rounding.)

    Args:
        parts: of the cache.
        manifest: of the cache.
        digests: of every row, see ``RowSource.digests``.
        name: of the data set.

    Returns:
        taps, and int64 ``[N]``: which of their entries each row uses.

    Raises:
        DataError: rows that are in no part.
    """
    if manifest.key["data"].get(name) == data_key(digests):
        return parts[name], parts[name].rows
    joined = join(list(parts.values()))
    entry_of = {bytes(digest): entry for entry, digest in enumerate(joined.digests.numpy())}
    rows = [entry_of.get(digest, -1) for digest in digests]
    missing = [row for row, entry in enumerate(rows) if entry < 0]
    if missing:
        raise DataError(
            f"data {name!r}: {len(missing)} of {len(rows)} rows are not in the cache, the first is row "
            f"{missing[0] + 1}; the cache holds {', '.join(map(repr, parts))}"
        )
    return joined, torch.tensor(rows, dtype=torch.int64)


def join(parts: list[CachedTaps]) -> CachedTaps:
    """The entries of several parts of one cache, one after the other."""
    first = parts[0].mapped
    mapped = Mapped(
        first.store,
        [shard for part in parts for shard in part.mapped.shards],
        first.dtype,
        first.widths,
        check=first.check,
        resident_bytes=first.resident_bytes,
    )
    digests = torch.cat([part.digests for part in parts])
    return CachedTaps(mapped, torch.empty(0, dtype=torch.int64), digests, parts[0].layers, parts[0].layers)
