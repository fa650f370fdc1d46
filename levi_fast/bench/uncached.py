"""Epochs with the backbone in every step, estimated from a few of their own batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from levi_fast.bench.methods import lora_adapted, mean_pool
from levi_fast.bench.timing import timed
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.lean import clip_gradients, epoch_rows
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.runs import Splits

STEPS = ("levi", "lora")
HOW = ("each timed batch's seconds per token, padding included, times the epoch's tokens: its steps, and the forward "
       "passes of validation")  # fmt: skip


def make_step(trained: list[nn.Parameter], loss_of: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Any], None]:
    """A whole training step on a batch: forward, backward, clipping, AdamW."""
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(batch: dict[str, Tensor]) -> None:
        loss_of(batch).backward()
        clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def levi_step(levi: LeviModel) -> Callable[[Any], None]:
    """LEVI's step without a cache; the backbone is frozen and runs all the same."""
    levi.train()
    return make_step([p for p in levi.parameters() if p.requires_grad], lambda batch: levi(**batch).loss)


def lora_step(backbone: nn.Module, num_labels: int, regression: bool) -> Callable[[Any], None]:
    """LoRA (r=8; of BERT, query and value) and a linear head on the mean of the last layer.

    Args:
        backbone: whose modules are replaced by peft's: not to be used for anything else.
        num_labels: outputs of the head.
        regression: squared error in place of cross-entropy.
    """
    lora = lora_adapted(backbone)
    head = nn.Linear(int(cast(Any, backbone).config.hidden_size), num_labels)
    both = nn.ModuleList([lora, head])
    both.train()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        hidden = lora(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits = head(mean_pool(hidden, batch["attention_mask"]))
        if regression:
            return nn.functional.mse_loss(logits[:, 0], batch["labels"])
        return nn.functional.cross_entropy(logits, batch["labels"])

    return make_step([p for p in both.parameters() if p.requires_grad], loss)


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
        seconds: of each timed batch, by step, and of the ``forward`` pass alone.
    """

    tokens: list[int]
    all_tokens: int
    validation_tokens: int
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def epochs(self, step: str) -> list[float]:
        """What every timed batch says that an epoch takes, in seconds."""
        return [
            own / tokens * self.all_tokens + forward / tokens * self.validation_tokens
            for own, forward, tokens in zip(self.seconds[step], self.seconds["forward"], self.tokens, strict=True)
        ]

    def estimated_from(self) -> dict[str, int]:
        """How much was timed, and of how much."""
        return {"timed_batches": len(self.tokens), "timed_tokens": sum(self.tokens), "tokens": self.all_tokens,
                "validation_tokens": self.validation_tokens}  # fmt: skip


def sample_batches(
    levi: LeviModel, steps: dict[str, Callable[[Any], None]], splits: Splits, batch_size: int, sampled: int
) -> Sampled:
    """Time a few of an epoch's batches, spread over it; the steps of each batch one after another.

    Args:
        levi: whose backbone scores validation.
        steps: by name.
        splits: without taps.
        batch_size: of training.
        sampled: how many batches; no more than there are.
    """

    def forward(batch: dict[str, Tensor]) -> None:
        with torch.no_grad():
            levi.extract_taps(**batch)

    train, validation = splits.train, splits.validation
    chunks = list(epoch_rows(len(train), 0, 0).split(batch_size))
    scored = torch.arange(len(validation)).split(EVALUATION_BATCH_SIZE)
    everything = {**steps, "forward": forward}
    first = train.__getitems__(chunks[0][:8])
    for step in everything.values():  # warm-up
        step(first)
    found = Sampled([], sum(padded(train, rows) for rows in chunks), sum(padded(validation, rows) for rows in scored))
    found.seconds = {name: [] for name in everything}
    for rows in spread(chunks, min(sampled, len(chunks))):
        batch = train.__getitems__(rows)
        found.tokens.append(padded(train, rows))
        for name, step in everything.items():
            found.seconds[name].append(timed(lambda s=step, b=batch: s(b)))  # type: ignore[misc]
    return found
