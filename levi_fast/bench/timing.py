"""Interleaved timing, ratios with intervals, and the machine's own rates."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 256 * 2**20  # inputs rotate through this much: more than the last-level cache of what we measure on


LONG = 0.3  # seconds: a call that takes this long is warm after one


def timed(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call; on a GPU from when it is idle until it is again."""
    finish = torch.cuda.synchronize if device != "cpu" else lambda: None
    finish()
    start = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - start


def interleaved(
    contenders: Mapping[str, Callable[[int], float]], seconds: float, least: int
) -> dict[str, list[float]]:
    """Times in seconds per contender; every round runs each once, in a new random order.

    Args:
        contenders: each runs once on the inputs that its argument numbers, and returns the seconds that count.
        seconds: how long to go on.
        least: rounds at least, however long they take.
    """
    names, shuffle, index = list(contenders), random.Random(0), 0
    for name in names:
        for _ in range(2):
            took = contenders[name](index)
            index += 1
            if took > LONG:
                break
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while len(times[names[0]]) < least or time.perf_counter() < end:
        shuffle.shuffle(names)
        for name in names:
            times[name].append(contenders[name](index))
            index += 1  # also between contenders: the next must not find its input warm
    return times


def interval_of_median(values: Sequence[float], level: float = 0.95) -> list[float]:
    """The order statistics between which the median lies with at least this probability; no distribution assumed.

    The two extremes where there are too few values for the level.
    """
    from scipy.stats import binom

    ordered, count = sorted(values), len(values)
    low = max(int(binom.ppf((1 - level) / 2, count, 0.5)) - 1, 0)
    return [ordered[low], ordered[count - 1 - low]]


def compared(times: Mapping[str, Sequence[float]], ours: str = "ours", also: Sequence[str] = ()) -> dict[str, Any]:
    """Ours against every peer.

    Args:
        times: seconds of every round, per contender; rounds of equal number ran side by side.
        ours: the contender that the others are divided by.
        also: contenders that are no peers (a roofline, a floor): timed, and never the best peer.

    Returns:
        ``rounds``; per contender ``median_us``, ``quartiles_us`` and ``fastest_us``; per peer
        ``peer_over_ours`` (``median`` of the rounds' own ratios, ``quartiles``, and the median's 95 % ``interval``);
        ``best_peer`` (least median) and ``best_peer_over_ours`` (ratio of medians), where there is a peer.
    """
    median = {name: statistics.median(values) for name, values in times.items()}
    ratios = {}
    for name in times:
        if name != ours:
            each = [peer / own for peer, own in zip(times[name], times[ours], strict=True)]
            ratios[name] = {
                "median": round(statistics.median(each), 3),
                "quartiles": [round(each, 3) for each in quartiles(each)],
                "interval": [round(bound, 3) for bound in interval_of_median(each)],
            }
    found: dict[str, Any] = {
        "rounds": len(times[ours]),
        "median_us": {name: round(value * 1e6, 2) for name, value in median.items()},
        "quartiles_us": {name: [round(q * 1e6, 2) for q in quartiles(values)] for name, values in times.items()},
        "fastest_us": {name: round(min(values) * 1e6, 2) for name, values in times.items()},
        "peer_over_ours": ratios,
    }
    peers = [name for name in ratios if name not in also]
    if peers:
        best = min(peers, key=lambda name: median[name])
        found |= {"best_peer": best, "best_peer_over_ours": round(median[best] / median[ours], 3)}
    return found


def quartiles(values: Sequence[float]) -> list[float]:
    """The three of them; a single value thrice."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3


class Rates:
    """This machine's matrix rate and read bandwidth, measured again and again while a benchmark runs."""

    def __init__(self) -> None:
        self._flat = torch.ones(COLD_BYTES // 4)
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
