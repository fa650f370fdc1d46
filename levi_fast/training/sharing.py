"""Objects sent to worker processes: small ones through a pipe, tensors in files that every worker maps.

The system keeps one copy of a mapped file in memory, however many processes read it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from levi_fast.cache import CachedTaps
from levi_fast.training.prefetch import fits

# Smaller tensors go through the pipe.
LEAST_BYTES = 4096


def send(value: Any, folder: str | Path) -> bytes:
    """What :func:`receive` makes ``value`` of again, in another process of this program.

    Args:
        value: anything that can be pickled. CPU tensors inside, and a cache's taps where they fit into memory, are
            written to ``folder``, those that share memory once; taps that do not fit are read from the cache there.
        folder: has to stay until the receivers end.

    Raises:
        OSError: the folder cannot be written, or is full.
    """
    stream = io.BytesIO()
    _Sender(stream, Path(folder)).dump(value)
    return stream.getvalue()


def receive(content: bytes) -> Any:
    """The value that a process of this program sent; what is written to its tensors stays in this process.

    Args:
        content: of a pipe, never of a file: it is a pickle.
    """
    return _Receiver(io.BytesIO(content)).load()


class _Sender(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, folder: Path) -> None:
        super().__init__(stream)
        self.folder = folder
        self.written: dict[Any, tuple[str, str, list[int]]] = {}
        self.alive: list[Any] = []  # an address, or an id, means something while its owner lives

    def persistent_id(self, value: Any) -> tuple[str, str, list[int]] | None:
        if isinstance(value, CachedTaps) and fits(value):
            return self._reference(id(value), value, value.chunks(), "float32", list(value.shape))
        if type(value) is Tensor and value.device.type == "cpu" and value.nbytes >= LEAST_BYTES:
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            return self._reference(key, value, [value], str(value.dtype).removeprefix("torch."), list(value.shape))
        return None

    def _reference(
        self, key: Any, owner: Any, parts: Iterable[Tensor], dtype: str, shape: list[int]
    ) -> tuple[str, str, list[int]]:
        if key not in self.written:
            path = self.folder / f"{len(self.written)}.tensor"
            with open(path, "wb") as file:
                for part in parts:
                    file.write(part.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            self.written[key] = (str(path), dtype, shape)
            self.alive.append(owner)
        return self.written[key]


class _Receiver(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.mapped: dict[str, Tensor] = {}

    def persistent_load(self, reference: tuple[str, str, list[int]]) -> Tensor:
        path, dtype, shape = reference
        if path not in self.mapped:
            raw = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
            self.mapped[path] = raw.view(getattr(torch, dtype)).view(shape)
        return self.mapped[path]
