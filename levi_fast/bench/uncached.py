"""Epochs with the backbone in every step, estimated from a few of their own batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from levi_fast.bench.methods import FLOOR, Method
from levi_fast.data.encoded import EncodedDataset
from levi_fast.training.lean import epoch_rows
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.runs import Splits

HOW = ("each timed batch's seconds per token, padding included, times the epoch's tokens: its steps, and the bare "
       "forward passes of validation")  # fmt: skip


def padded(dataset: EncodedDataset, rows: Tensor) -> int:
    """Tokens of a batch with its padding."""
    return len(rows) * int(dataset.lengths[rows].max())


def spread(chunks: Sequence[Tensor], count: int) -> list[Tensor]:
    """A few batches, evenly over the epoch."""
    return [chunks[round(place * (len(chunks) - 1) / max(count - 1, 1))] for place in range(count)]


@dataclass
class Sampled:
    """The batches that were timed.

    Args:
        tokens: of each timed batch, padding included.
        all_tokens: of the epoch's training batches.
        validation_tokens: of the batches in which validation is scored.
        seconds: of each timed batch, by method.
    """

    tokens: list[int]
    all_tokens: int
    validation_tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def epochs(self, name: str) -> list[float]:
        """What every timed batch says that a method's epoch takes, in seconds."""
        return [
            own / tokens * self.all_tokens + forward / tokens * self.validation_tokens
            for own, forward, tokens in zip(self.seconds[name], self.seconds[FLOOR], self.tokens, strict=True)
        ]

    def estimated_from(self) -> dict[str, int]:
        """How much was timed, and of how much."""
        return {"timed_batches": len(self.tokens), "timed_tokens": sum(self.tokens), "tokens": self.all_tokens,
                "validation_tokens": self.validation_tokens}  # fmt: skip


def sample_batches(methods: Mapping[str, Method], splits: Splits, batch_size: int, sampled: int) -> Sampled:
    """Time a few of an epoch's batches, spread over it; the methods' steps on each batch one after another.

    Args:
        methods: by name, the bare forward among them.
        splits: without taps.
        batch_size: of training.
        sampled: how many batches; no more than there are.
    """
    train, validation = splits.train, splits.validation
    chunks = list(epoch_rows(len(train), 0, 0).split(batch_size))
    scored = torch.arange(len(validation)).split(EVALUATION_BATCH_SIZE)
    first = train.__getitems__(chunks[0][:8])
    for method in methods.values():  # warm-up
        method.seconds(first)
    found = Sampled([], sum(padded(train, rows) for rows in chunks), sum(padded(validation, rows) for rows in scored))
    found.seconds = {name: [] for name in methods}
    for rows in spread(chunks, min(sampled, len(chunks))):
        batch = train.__getitems__(rows)
        found.tokens.append(padded(train, rows))
        for name, method in methods.items():
            found.seconds[name].append(method.seconds(batch))
    return found
