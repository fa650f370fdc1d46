"""A training loop for precomputed taps: what ``Trainer`` computes, without what it does beside computing.

A step on cached taps takes a few milliseconds, and Trainer's bookkeeping about as much again. This loop draws the
same rows in the same order and the same random numbers, uses the same optimizer and schedule, and so ends with the
same bits (fp32, on the CPU). It knows one device and no gradient accumulation.

There is no CUDA graph: it would need a GPU to be tested on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_scheduler

from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.prefetch import prefetched, resident


def train_lean(
    model: LeviModel,
    train: EncodedDataset,
    validation: EncodedDataset,
    arguments: TrainingArguments,
    best: BestEpoch,
) -> None:
    """Train a model in place on attached taps (or without a backbone), scoring every epoch.

    Taps that are memory-mapped are read into memory first where they fit; otherwise a background thread gathers the
    next batches while a step computes.

    Args:
        model: on its device, its backbone taken off. torch's random generator is where it is to start.
        train, validation: encoded rows with labels.
        arguments: what Trainer would be given: batch size, optimizer, schedule, clipping and seeds are read.
        best: takes in every epoch's scores.
    """
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, arguments)
    steps = -(-len(train) // arguments.per_device_train_batch_size) * int(arguments.num_train_epochs)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with resident(train), resident(validation):
        for epoch in range(int(arguments.num_train_epochs)):
            model.train()
            for batch in epoch_batches(train, arguments, epoch, device):
                model(**batch).loss.backward()
                if arguments.max_grad_norm > 0:
                    clip_gradients(parameters, arguments.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            best.record(score_epoch(model, validation, best, device), model)


def make_optimizer(model: LeviModel, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Trainer's own choice of optimizer, with its two groups: weight decay on matrices alone."""
    # The method reads nothing of the Trainer it is called on.
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    groups = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": arguments.weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


def epoch_rows(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's rows, int64 ``[size]``: what accelerate's seedable sampler draws under Trainer."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))


def epoch_batches(
    dataset: EncodedDataset, arguments: TrainingArguments, epoch: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """An epoch's shuffled batches on a device."""
    _draw_as_a_data_loader()
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    chunks = epoch_rows(len(dataset), seed, epoch).split(arguments.per_device_train_batch_size)
    for batch in prefetched(dataset, chunks):
        yield {name: value.to(device) for name, value in batch.items()}


def score_epoch(
    model: LeviModel, validation: EncodedDataset, best: BestEpoch, device: torch.device
) -> dict[str, float]:
    """Scores of the validation rows, in the batches that every evaluation of a head takes."""
    _draw_as_a_data_loader()
    model.eval()
    logits, without_view = [], []
    with torch.no_grad():
        for batch in prefetched(validation, torch.arange(len(validation)).split(EVALUATION_BATCH_SIZE)):
            batch.pop("labels", None)
            output = model(**{name: value.to(device) for name, value in batch.items()})
            logits.append(output.logits.float().cpu().numpy())
            if output.logits_without_view is not None:
                without_view.append(output.logits_without_view.float().cpu().numpy())
    assert validation.labels is not None
    zeroed = np.concatenate(without_view) if without_view else None
    return best.score(np.concatenate(logits), zeroed, validation.labels.numpy())


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``, which multiplies by 1 where nothing is to be clipped; this leaves that out.

    Returns:
        the norm before clipping.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if not max_norm / (float(norm) + 1e-6) >= 1.0:  # so that NaN goes on to every gradient, as in torch
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _draw_as_a_data_loader() -> None:
    """Take one number from torch's generator: a DataLoader draws its workers' seed even where it has no workers."""
    torch.empty((), dtype=torch.int64).random_()
