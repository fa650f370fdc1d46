"""A training step as transformers' Trainer takes it, timed from inside its loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

Batch = Mapping[str, Tensor]


class TrainerSteps:
    """One Trainer around modules and an optimizer that exist already.

    It logs, saves and evaluates nothing, keeps the learning rate, and clips at 1: the least it can do.

    Args:
        held: the modules.
        loss: of a batch, computed by them.
        optimizer: of their trained parameters.
    """

    def __init__(self, held: nn.Module, loss: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._folder = TemporaryDirectory(prefix="levi-fast-bench-")  # Trainer makes one whether it saves or not
        arguments = TrainingArguments(
            output_dir=self._folder.name,
            per_device_train_batch_size=1,  # the dataset's one item is a batch
            max_steps=1,
            max_grad_norm=1.0,
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=next(held.parameters()).device.type == "cpu",
        )
        self._clock = _Clock()
        self._dataset = _OneBatch()
        self._trainer = Trainer(
            cast(Any, _WithLoss(held, loss)),
            arguments,
            data_collator=lambda items: items[0],
            train_dataset=self._dataset,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            callbacks=[self._clock],
        )
        self._trainer.remove_callback(PrinterCallback)  # it would print a line for every step

    def seconds(self, batch: Batch) -> float:
        """Train on one batch: seconds from the start of the epoch to the end of the step."""
        self._dataset.batch = dict(batch)
        self._trainer.train()
        return self._clock.seconds


class _OneBatch(Dataset[Any]):
    batch: dict[str, Tensor]

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch


class _WithLoss(nn.Module):
    accepts_loss_kwargs = False  # the loss is a mean over the batch

    def __init__(self, held: nn.Module, loss: Callable[[Batch], Tensor]) -> None:
        super().__init__()
        self.held, self._loss = held, loss

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self._loss(batch)}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds = self._started = 0.0

    def on_epoch_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        _finish(args)
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
        _finish(args)
        self.seconds = time.perf_counter() - self._started


def _finish(args: TrainingArguments) -> None:
    if args.device.type == "cuda":
        torch.cuda.synchronize()
