"""Rows ready for a model: token ids or images, further inputs and labels, gathered a batch at a time."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from levi_fast.errors import DataError

# The further input that a backbone reads too.
PIXELS = "pixel_values"


class TapSource(Protocol):
    """Taps ``[U, sum of tap widths]``: a tensor, or what is indexed like one and answers with tensors in memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class EncodedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Encoded rows, kept as a few flat tensors.

    A ``DataLoader`` hands the indices of a whole batch to ``__getitems__``, which answers with the finished batch:
    one gather per tensor. Use :func:`collate` as its ``collate_fn``.

    Args:
        name: of the file or split, for messages.
        token_ids: token ids of every text, unpadded; None for rows without text.
        pad_token_id: fills up shorter texts of a batch, on the right.
        features: further model inputs, each ``[N, ...]``. Rows without text may have images for the backbone among
            them: float ``pixel_values`` ``[N, channels, height, width]``.
        labels: int64 ``[N]``, float32 ``[N, C]`` or float32 ``[N]``; None when unknown.
        num_truncated: how many texts were cut to the maximal length.

    Attributes:
        classes: int64, the classes among which predictions are made; None for all.

    Raises:
        DataError: naming the first row whose text has no token at all: it would be all padding.
    """

    def __init__(
        self,
        name: str,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        pad_token_id: int = 0,
        features: Mapping[str, Tensor] | None = None,
        labels: Tensor | None = None,
        num_truncated: int = 0,
    ) -> None:
        self.name = name
        self.pad_token_id = pad_token_id
        self.features = dict(features or {})
        self.labels = labels
        self.num_truncated = num_truncated
        self.classes: Tensor | None = None
        self.token_ids: Tensor | None = None  # [tokens of all rows]
        self.starts = self.lengths = torch.empty(0, dtype=torch.int64)
        if token_ids is not None:
            self.lengths = torch.tensor([len(row) for row in token_ids], dtype=torch.int64)
            empty = (self.lengths == 0).nonzero()
            if len(empty):
                raise DataError(f"row {int(empty[0]) + 1} of {name}: its text has no token: it would be all padding")
            self.starts = self.lengths.cumsum(0) - self.lengths
            parts = [np.asarray(row, dtype=np.int32) for row in token_ids]
            self.token_ids = torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int32), *parts]))
        elif PIXELS in self.features:  # all of one size, and as long as each other
            images = self.features[PIXELS]
            self.lengths = torch.full((len(images),), images[0].numel() if len(images) else 0)
        self._taps: TapSource | None = None
        self._tap_rows: Tensor | None = None
        self._wanted: Callable[[str], bool] | None = None
        sizes = {key: len(value) for key, value in self.features.items()}
        if token_ids is not None:
            sizes["token_ids"] = len(token_ids)
        if labels is not None:
            sizes["labels"] = len(labels)
        if len(set(sizes.values())) != 1:
            raise ValueError(f"{name}: expected as many rows everywhere, got {sizes}")
        self._size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self._size

    @property
    def has_taps(self) -> bool:
        return self._taps is not None

    @property
    def feeds_backbone(self) -> bool:
        """Whether the rows have something that a backbone reads: text or images."""
        return self.token_ids is not None or PIXELS in self.features

    def set_taps(self, taps: TapSource | None, rows: Tensor | None = None, *, keep_inputs: bool = True) -> None:
        """Attach precomputed taps, so that batches carry ``taps`` and the backbone is not needed.

        Args:
            taps: ``[U, sum of tap widths]``; None takes them off again.
            rows: ``[N]`` int64, which of the U each row uses; None when U = N.
            keep_inputs: False leaves token ids and images out of the batches, for a model whose task model reads
                neither.
        """
        if taps is not None and len(taps if rows is None else rows) != len(self):
            raise ValueError(f"taps: expected {len(self)} rows, got {len(taps if rows is None else rows)}")
        self._taps, self._tap_rows = taps, rows
        self._keep_inputs = keep_inputs

    def taps(self) -> Tensor:
        """The attached taps, ``[N, sum of tap widths]``."""
        if self._taps is None:
            raise ValueError(f"{self.name}: no taps are attached")
        return self._taps[torch.arange(len(self)) if self._tap_rows is None else self._tap_rows]

    @property
    def tap_dtype(self) -> str | None:
        """What the attached taps are stored as, such as "float32" or a cache's "int8"; None without taps."""
        if self._taps is None:
            return None
        return str(getattr(self._taps, "dtype", "float32")).removeprefix("torch.")

    def tap_source(self) -> Any:
        """What taps are gathered from, ``[U, sum of tap widths]``: a tensor, or a cache's taps; None without taps."""
        return self._taps

    @contextlib.contextmanager
    def taps_from(self, source: Any) -> Iterator[None]:
        """Inside the ``with`` block, gather the same taps from ``source``: those of :meth:`tap_source` elsewhere."""
        previous, self._taps = self._taps, source
        try:
            yield
        finally:
            self._taps = previous

    @contextlib.contextmanager
    def only(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        """Inside the ``with`` block, batches carry only those further inputs whose name ``wanted`` accepts.

        A baseline without the task model reads the same rows as LEVI, but has no use for what only that reads.
        """
        previous, self._wanted = self._wanted, wanted
        try:
            yield
        finally:
            self._wanted = previous

    def content_digest(self) -> str:
        """SHA-256 of all rows: token ids, further inputs and labels; taps, which follow from them, are left out."""
        digest = hashlib.sha256()
        named = {"token_ids": self.token_ids, "lengths": self.lengths, "labels": self.labels}
        for name, values in {**named, **self.features}.items():
            if values is not None:
                digest.update(f"{name}:{values.dtype}:{list(values.shape)}:".encode())
                digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def unique_inputs(self) -> tuple[list[int], Tensor]:
        """Rows that show a text or an image for the first time, and for every row which of those it equals, ``[N]``
        int64."""
        seen: dict[bytes, int] = {}
        first: list[int] = []
        which = torch.empty(len(self), dtype=torch.int64)
        for row, key in enumerate(self.input_bytes()):
            place = seen.setdefault(key, len(first))
            if place == len(first):
                first.append(row)
            which[row] = place
        return first, which

    def input_bytes(self) -> Iterator[bytes]:
        """Every row's token ids (int32) or pixels as bytes: equal bytes are equal inputs of a backbone."""
        if self.token_ids is None:
            yield from (image.contiguous().numpy().tobytes() for image in self.features[PIXELS])
            return
        data = self.token_ids.numpy().tobytes()
        for start, length in zip((4 * self.starts).tolist(), (4 * self.lengths).tolist(), strict=True):
            yield data[start : start + length]

    def _text(self, row: int) -> Tensor:
        assert self.token_ids is not None
        start = int(self.starts[row])
        return self.token_ids[start : start + int(self.lengths[row])]

    def backbone_inputs(self, rows: Tensor) -> dict[str, Tensor]:
        """What a backbone reads of the given rows: :meth:`tokens`, or ``pixel_values``."""
        if self.token_ids is None and PIXELS in self.features:
            return {PIXELS: self.features[PIXELS][rows]}
        return self.tokens(rows)

    def tokens(self, rows: Tensor) -> dict[str, Tensor]:
        """Token ids ``[B, T]`` and attention mask ``[B, T]`` (int64), padded to the longest of the given rows."""
        if self.token_ids is None:
            return {}
        lengths = self.lengths[rows]
        positions = torch.arange(int(lengths.max()) if len(rows) else 0)
        mask = positions < lengths[:, None]
        where = (self.starts[rows, None] + positions).clamp_(max=max(len(self.token_ids) - 1, 0))
        ids = self.token_ids[where].to(torch.int64).masked_fill_(~mask, self.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask.to(torch.int64)}

    def __getitems__(self, indices: Sequence[int] | Tensor) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices, dtype=torch.int64)
        batch = {}
        if self._carries_inputs:
            batch.update(self.backbone_inputs(rows))
        if self._taps is not None:
            batch["taps"] = self._taps[rows if self._tap_rows is None else self._tap_rows[rows]]
        further = [key for key in self.features if key not in batch and self._carries(key)]
        batch.update({key: self.features[key][rows] for key in further})
        if self.labels is not None:
            batch["labels"] = self.labels[rows]
        return batch

    @property
    def _carries_inputs(self) -> bool:
        return self._taps is None or self._keep_inputs

    def _carries(self, name: str) -> bool:
        """Whether batches have a further input."""
        if name == PIXELS and not self._carries_inputs:
            return False
        return self._wanted is None or self._wanted(name)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return {key: value[0] for key, value in self.__getitems__([index % len(self)]).items()}

    def subset(self, rows: Sequence[int], name: str) -> EncodedDataset:
        """The given rows as a data set of their own, without taps."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return EncodedDataset(
            name,
            token_ids=None if self.token_ids is None else [self._text(int(row)).tolist() for row in index],
            pad_token_id=self.pad_token_id,
            features={key: value[index] for key, value in self.features.items()},
            labels=None if self.labels is None else self.labels[index],
        )

    def subset_with_taps(self, rows: Sequence[int], name: str) -> EncodedDataset:
        """The same with the taps that are attached here."""
        if self._taps is None:
            raise ValueError(f"{self.name}: no taps are attached")
        found = self.subset(rows, name)
        index = torch.as_tensor(rows, dtype=torch.int64)
        own = index if self._tap_rows is None else self._tap_rows[index]
        found.set_taps(self._taps, own, keep_inputs=self._keep_inputs)
        return found

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Batches in row order."""
        for start in range(0, len(self), batch_size):
            yield self.__getitems__(range(start, min(start + batch_size, len(self))))


def collate(batch: Any) -> dict[str, Tensor]:
    """Pass on what :class:`EncodedDataset` made of a whole batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(f"expected a finished batch from EncodedDataset, got {type(batch).__name__}")
    return dict(batch)
