"""A bank of taps on the GPU: copied there once where it fits, then gathered there, batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Of a GPU's free memory, the share that a data set's taps may take: the rest is for the model, its optimizer and what
# a step computes, and for the taps of the next data set, which may take the same share of what is left then.
DEVICE_SHARE = 0.5


class DeviceTaps:
    """Taps ``[U, sum of tap widths]`` on a device: indexed by rows on the host, they answer there.

    Attributes:
        shape, dtype: of the taps.
    """

    def __init__(self, taps: Tensor) -> None:
        self.taps, self.shape, self.dtype = taps, taps.shape, taps.dtype

    def __len__(self) -> int:
        return len(self.taps)

    def __getitem__(self, rows: Tensor) -> Tensor:
        # The host goes on at once: it need not wait for the steps before to gather for the next one.
        return self.taps.index_select(0, rows.to(self.taps.device, non_blocking=True))


def on_device(taps: Any, device: torch.device) -> DeviceTaps | None:
    """A copy of taps on a device, or None where :func:`device_room` is too small for it (on the CPU it always is).

    Args:
        taps: a tensor ``[U, sum of tap widths]``, which keeps its dtype, or a cache's, which are read shard by shard
            and become float32.
    """
    dtype = taps.dtype if isinstance(taps, Tensor) else torch.float32
    if math.prod(taps.shape) * dtype.itemsize > device_room(device):
        return None
    try:
        bank = torch.empty(taps.shape, dtype=dtype, device=device)
    except torch.OutOfMemoryError:  # another process was faster
        return None
    start = 0
    for part in [taps] if isinstance(taps, Tensor) else taps.chunks():
        bank[start : start + len(part)].copy_(part)
        start += len(part)
    return DeviceTaps(bank)


def device_room(device: torch.device) -> int:
    """Bytes that the taps of a data set may take on a device: :data:`DEVICE_SHARE` of what is free; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it to hand it out
    return int(DEVICE_SHARE * (free + unused))
