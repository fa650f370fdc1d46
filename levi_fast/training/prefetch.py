"""Batches of rows whose taps may lie on disk: read into memory where they fit, else gathered ahead by a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
from torch import Tensor

from levi_fast.data.encoded import EncodedDataset

# Batches gathered ahead: enough to ride out one slow read, few enough to be no memory to speak of.
DEPTH = 4
# Of the memory that is available, the share that a data set's taps may take.
MEMORY_SHARE = 0.5


@contextlib.contextmanager
def resident(dataset: EncodedDataset) -> Iterator[None]:
    """Have a data set's taps in memory, if they are not and there is room; they are put back afterwards."""
    taps = dataset.tap_source()
    if not _is_on_disk(taps) or not fits(taps):
        yield
        return
    with dataset.taps_from(taps.clone() if isinstance(taps, Tensor) else taps.load()):
        yield


def fits(taps: Any) -> bool:
    """Whether taps ``[U, sum of widths]`` may be read into memory, as float32."""
    return 4 * taps.shape[0] * taps.shape[1] <= MEMORY_SHARE * psutil.virtual_memory().available


def prefetched(dataset: EncodedDataset, chunks: Sequence[Tensor]) -> Iterator[dict[str, Tensor]]:
    """The batches of the given rows, in order; where taps lie on disk, a thread gathers :data:`DEPTH` of them ahead.

    Raises:
        whatever gathering a batch raises, in place of that batch.
    """
    if not _is_on_disk(dataset.tap_source()):
        for rows in chunks:
            yield dataset.__getitems__(rows)
        return
    ready: queue.Queue[dict[str, Tensor] | BaseException | None] = queue.Queue(DEPTH)
    stopped = threading.Event()

    def put(item: dict[str, Tensor] | BaseException | None) -> None:
        while not stopped.is_set():  # with a time limit, so that an abandoned loop does not leave the thread waiting
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def gather() -> None:
        try:
            for rows in chunks:
                if stopped.is_set():
                    return
                put(dataset.__getitems__(rows))
            put(None)
        except BaseException as error:  # raised again where the batch is asked for
            put(error)

    thread = threading.Thread(target=gather, name="levi-fast-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()


def _is_on_disk(taps: Any) -> bool:
    """Whether taps are read from disk when indexed: a cache's, or those of ``torch.from_file(..., shared=True)``."""
    if taps is None:
        return False
    return not isinstance(taps, Tensor) or (taps.device.type == "cpu" and taps.untyped_storage().filename is not None)
