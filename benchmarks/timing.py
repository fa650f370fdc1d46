"""What the CPU benchmarks share: interleaved timing, the machine's own rates, and the facts a figure is judged by."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 128 * 2**20  # inputs rotate through this much: more than the last-level cache of what we measure on


def interleaved(contenders: dict[str, Callable[[int], float]], seconds: float, least: int) -> dict[str, list[float]]:
    """Times in seconds per contender; every round runs each once, in a new random order.

    Args:
        contenders: each runs once on the inputs that its argument numbers, and returns the seconds that count.
        seconds: how long to go on.
        least: rounds at least, however long they take.
    """
    names, shuffle, index = list(contenders), random.Random(0), 0
    for name in names:
        for _ in range(2):
            contenders[name](index)
            index += 1
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while len(times[names[0]]) < least or time.perf_counter() < end:
        shuffle.shuffle(names)
        for name in names:
            times[name].append(contenders[name](index))
            index += 1  # also between contenders: the next must not find its input warm
    return times


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def best_peer(times: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Ours against every other contender: medians, and quartiles of the rounds' own ratios."""
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {}
    for name in times:
        if name != ours:
            each = [peer / own for peer, own in zip(times[name], times[ours], strict=True)]
            ratios[name] = [round(q, 3) for q in statistics.quantiles(each, n=4)]
    best = min(ratios, key=lambda name: median[name])
    return {
        "rounds": len(times[ours]),
        "median_us": {name: round(value * 1e6, 2) for name, value in median.items()},
        "fastest_us": {name: round(min(values) * 1e6, 2) for name, values in times.items()},
        "peer_over_ours_quartiles": ratios,
        "best_peer": best,
        "best_peer_over_ours": round(median[best] / median[ours], 3),
    }


class Rates:
    """This machine's matrix rate and read bandwidth, measured again and again while a benchmark runs."""

    def __init__(self) -> None:
        self._flat = torch.ones(256 * 2**20 // 4)
        self._square: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def gemm(self, dtype: torch.dtype) -> float:
        """GFLOP/s of torch's own 1024-cubed product: the median of nine."""
        if dtype not in self._square:
            self._square[dtype] = (torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype))
        a, b = self._square[dtype]
        a @ b
        return 2 * 1024**3 / statistics.median(timed(lambda: a @ b) for _ in range(9)) / 1e9

    def read(self) -> float:
        """GB/s of a plain sum over 256 MB: the median of five."""
        return self._flat.nbytes / statistics.median(timed(self._flat.sum) for _ in range(5)) / 1e9
