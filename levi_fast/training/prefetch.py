"""Where taps lie during training: on the GPU or in memory where they fit, else on disk, read ahead by a thread."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from levi_fast.data.encoded import EncodedDataset
from levi_fast.training.device_bank import DeviceTaps, on_device

# Batches gathered ahead: enough to ride out one slow read, few enough to be no memory to speak of.
DEPTH = 4
# Of the memory that is available, the share that a data set's taps may take.
MEMORY_SHARE = 0.5


@contextlib.contextmanager
def resident(datasets: Iterable[EncodedDataset], device: torch.device) -> Iterator[None]:
    """Have the taps of data sets where their rows are gathered fastest; they are put back afterwards.

    That is on a GPU where they fit there (:func:`levi_fast.training.device_bank.device_room`), else in memory where
    they fit. Taps that several data sets share are moved once.

    Args:
        datasets: in the order in which they take their room.
        device: of the model.
    """
    moved: dict[int, Any] = {}  # by what they were: its id is its own, as the data set still holds it
    with contextlib.ExitStack() as stack:
        for dataset in datasets:
            taps = dataset.tap_source()
            if id(taps) not in moved:
                moved[id(taps)] = _nearest(taps, device)
            stack.enter_context(dataset.taps_from(moved[id(taps)]))
        yield


def _nearest(taps: Any, device: torch.device) -> Any:
    """Taps as they are gathered fastest for a model on ``device``: themselves, or a copy."""
    if taps is None or _is_on_gpu(taps):
        return taps
    bank = on_device(taps, device)
    if bank is not None:
        return bank
    if not _is_on_disk(taps) or not fits(taps):
        return taps
    return taps.clone() if isinstance(taps, Tensor) else taps.load()


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
    if taps is None or _is_on_gpu(taps):
        return False
    return not isinstance(taps, Tensor) or taps.untyped_storage().filename is not None


def _is_on_gpu(taps: Any) -> bool:
    return isinstance(taps, DeviceTaps) or (isinstance(taps, Tensor) and taps.device.type != "cpu")
