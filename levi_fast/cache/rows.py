"""Rows of a data set as the cache sees them: their content, their length, and batches of them."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError

DIGEST_BYTES = 16
# How many rows are drawn twice to learn whether a data set draws at random.
_PROBED_ROWS = 3


class RowSource(Protocol):
    """``lengths`` of all rows, and for given rows the backbone's inputs."""

    lengths: list[int]

    def digests(self) -> list[bytes]:
        """What each row holds, in :data:`DIGEST_BYTES` bytes: rows with equal digests give equal taps."""

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Inputs of the backbone, padded to the longest of the rows."""


def row_source(
    name: str, dataset: Any, accepted: frozenset[str], *, views: int | None, view_seed: int, pad_token_id: int
) -> RowSource:
    """The rows of an :class:`EncodedDataset`, or of any data set whose items are mappings of tensors.

    Args:
        name: of the part, for messages.
        dataset: with ``len()`` and items by index.
        accepted: names of the inputs that the backbone takes; others, such as labels, are left out.
        views: fixed draws per row, for a data set that augments at random; None where it does not.
        view_seed: of the draws.
        pad_token_id: fills up shorter ``input_ids``.

    Raises:
        DataError: no rows, items of another kind, or a data set that draws at random without ``views``.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"data {name!r}: expected a data set with len() and items by index, got {type(dataset)}")
    if not len(dataset):
        raise DataError(f"data {name!r}: expected at least one row")
    if isinstance(dataset, EncodedDataset):
        if not dataset.feeds_backbone:
            raise DataError(f"data {name!r}: its rows have no text or images for the backbone to read")
        if views is not None:
            raise DataError(f"data {name!r}: its rows are not drawn at random; views is for data sets that augment")
        return EncodedRows(dataset)
    if views is None and is_random(dataset):
        raise DataError(
            f"data {name!r}: its rows are drawn at random (augmentation), so that a cache would freeze one draw; "
            "ask for a number of fixed draws with views=k, or take the augmentation out"
        )
    return MappingRows(name, dataset, accepted, views or 1, view_seed if views else None, pad_token_id)


def is_random(dataset: Any) -> bool:
    """Whether a data set augments at random: it says so (``is_random``), or its first rows differ by the seed."""
    declared = getattr(dataset, "is_random", None)
    if declared is not None:
        return bool(declared() if callable(declared) else declared)
    for row in range(min(_PROBED_ROWS, len(dataset))):
        drawn = set()
        for seed in (1, 2):
            with _seeded(seed):
                item = dataset[row]
            if not isinstance(item, Mapping):
                return False  # refused later, with the row's number
            drawn.add(_digest({key: torch.as_tensor(value) for key, value in item.items() if _is_numeric(value)}))
        if len(drawn) > 1:
            return True
    return False


class EncodedRows:
    """Token ids or images of an :class:`EncodedDataset`; its other inputs and labels do not reach the backbone."""

    def __init__(self, dataset: EncodedDataset) -> None:
        self.dataset = dataset
        self.lengths: list[int] = dataset.lengths.tolist()

    def digests(self) -> list[bytes]:
        return [_short(row) for row in self.dataset.input_bytes()]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self.dataset.backbone_inputs(torch.tensor(rows))


class MappingRows:
    """Items that are mappings of tensors, ``views`` fixed draws of each: view v of row r is row ``v * N + r``."""

    def __init__(
        self, name: str, dataset: Any, accepted: frozenset[str], views: int, seed: int | None, pad_token_id: int
    ) -> None:
        self.name, self.dataset, self.accepted = name, dataset, accepted
        self.views, self.seed, self.pad_token_id = views, seed, pad_token_id
        self.lengths: list[int] = []
        self._digests: list[bytes] = []
        for place in range(len(dataset) * views):  # one pass: the items themselves may not fit in memory
            item = self._item(place)
            self._digests.append(_digest(item))
            self.lengths.append(_length(item))

    def digests(self) -> list[bytes]:
        return self._digests

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        items = [self._item(row) for row in rows]
        for row, item in zip(rows, items, strict=True):
            if _digest(item) != self._digests[row]:
                raise DataError(
                    f"{self._where(row)}: came out differently the second time; a data set that draws at random "
                    "must draw from torch's, numpy's or random's global generator"
                )
        return {name: self._stack(name, rows, [item[name] for item in items]) for name in items[0]}

    def _item(self, place: int) -> dict[str, Tensor]:
        row = place % len(self.dataset)
        if self.seed is None:
            item = self.dataset[row]
        else:
            seed = _short(f"{self.seed}:{place // len(self.dataset)}:{row}".encode())
            with _seeded(int.from_bytes(seed[:4], "little")):
                item = self.dataset[row]
        if not isinstance(item, Mapping):
            raise DataError(
                f"{self._where(place)}: expected a mapping of input names to tensors, got {type(item).__name__}"
            )
        kept = {}
        for key in sorted(set(item) & self.accepted):
            if not _is_numeric(item[key]):
                raise DataError(f"{self._where(place)}: expected a tensor in {key!r}, got {type(item[key]).__name__}")
            kept[key] = torch.as_tensor(item[key])
        if not kept:
            raise DataError(f"{self._where(place)}: the backbone takes none of {sorted(map(str, item))}")
        if "input_ids" in kept and "attention_mask" in self.accepted:
            kept.setdefault("attention_mask", torch.ones_like(kept["input_ids"], dtype=torch.int64))
        return kept

    def _stack(self, name: str, rows: Sequence[int], values: list[Tensor]) -> Tensor:
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) == 1:
            return torch.stack(values)
        if any(value.dim() != 1 for value in values):
            raise DataError(f"data {self.name!r}: expected {name!r} of one shape in all rows, got {sorted(shapes)}")
        fill = self.pad_token_id if name == "input_ids" else 0
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)

    def _where(self, place: int) -> str:
        row, view = place % len(self.dataset) + 1, place // len(self.dataset)
        return f"row {row} of data {self.name!r}" + (f", view {view}" if self.views > 1 else "")


def _length(item: dict[str, Tensor]) -> int:
    leading = item.get("input_ids", next(iter(item.values())))
    return leading.numel()


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray | int | float):
        return True
    return isinstance(value, list) and all(isinstance(one, int | float | list) for one in value)


def _digest(item: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(item):
        data = item[name].detach().cpu().contiguous()
        digest.update(f"{name}:{data.dtype}:{list(data.shape)}:".encode())
        digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _short(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the three global generators, and put back their states afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
