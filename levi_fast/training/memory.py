"""Peak memory of a stretch of work."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil
import torch


class Peak:
    """Bytes: ``resident``, the process's highest resident set; ``cuda``, torch's highest allocation (0: none)."""

    resident: int = 0
    cuda: int = 0


@contextlib.contextmanager
def peak_memory(interval: float = 0.02) -> Iterator[Peak]:
    """Measure inside the ``with`` block; a thread looks at the resident set every ``interval`` seconds."""
    peak, process, stop = Peak(), psutil.Process(), threading.Event()
    peak.resident = process.memory_info().rss

    def look() -> None:
        while not stop.wait(interval):
            peak.resident = max(peak.resident, process.memory_info().rss)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        peak.resident = max(peak.resident, process.memory_info().rss)
        if torch.cuda.is_available():
            peak.cuda = torch.cuda.max_memory_allocated()
