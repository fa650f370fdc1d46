"""Size and time of a build, from its plan and a few timed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PROBES = 4


@dataclass(frozen=True)
class Estimate:
    """What a build will cost.

    Attributes:
        rows: of all data sets.
        entries: distinct rows, each stored once.
        entries_left: those that are not stored yet.
        bytes: of the whole cache.
        bytes_left: still to be written.
        seconds: for ``entries_left``, on one process like this.
    """

    rows: int
    entries: int
    entries_left: int
    bytes: int
    bytes_left: int
    seconds: float

    def __str__(self) -> str:
        left = "" if self.entries_left == self.entries else f", {self.entries_left:,} of them still to be run"
        return (
            f"{self.rows:,} rows, {self.entries:,} different ones{left}; "
            f"{readable_bytes(self.bytes)} on disk; about {readable_seconds(self.seconds)}"
        )


def probe_places(count: int) -> list[int]:
    """Which of ``count`` batches, ordered by length, to time: the ends and some between."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(PROBES, count)).tolist()})


def total_seconds(costs: Sequence[int], probed: Sequence[tuple[int, float]]) -> float:
    """Seconds for all batches.

    Args:
        costs: padded tokens of every batch.
        probed: (padded tokens, seconds) of the timed ones; seconds are interpolated between them, and beyond them in
            proportion.
    """
    if not costs or not probed:
        return 0.0
    known: dict[int, list[float]] = {}
    for cost, seconds in probed:
        known.setdefault(cost, []).append(seconds)
    tokens = np.array(sorted(known), dtype=np.float64)
    times = np.array([np.median(known[int(cost)]) for cost in tokens])
    wanted = np.asarray(costs, dtype=np.float64)
    between = np.interp(wanted, tokens, times)
    between = np.where(wanted < tokens[0], times[0] * wanted / tokens[0], between)
    between = np.where(wanted > tokens[-1], times[-1] * wanted / tokens[-1], between)
    return float(between.sum())


def readable_bytes(count: int) -> str:
    """2048 -> "2.0 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def readable_seconds(seconds: float) -> str:
    """90 -> "1.5 min"."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
