"""A training loop of our own: what ``Trainer`` computes, without what it does beside computing.

A step on cached taps takes a few milliseconds, and Trainer's bookkeeping about as much again. This loop draws the
same rows in the same order and the same random numbers, uses the same optimizer and schedule, and so ends with the
same bits (fp32, on the CPU). It knows one device and no gradient accumulation. With checkpoints it goes on where an
earlier process was killed, again with the same bits.

There is no CUDA graph: it would need a GPU to be tested on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_scheduler

from levi_fast.backbone_training import PREFIX
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.checkpoints import Checkpoints, TrainingState
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.prefetch import prefetched, resident

# Of a scheduler: the rest follows from the options.
SCHEDULER_STATE = ("last_epoch", "_step_count", "_last_lr", "base_lrs")


def train_lean(
    model: LeviModel,
    train: EncodedDataset,
    validation: EncodedDataset,
    arguments: TrainingArguments,
    best: BestEpoch,
    checkpoints: Checkpoints | None = None,
    backbone_learning_rate: float | None = None,
) -> None:
    """Train a model in place, scoring every epoch.

    Taps that are memory-mapped are read into memory first where they fit; otherwise a background thread gathers the
    next batches while a step computes. Without taps the backbone runs in every step.

    Args:
        model: on its device, its backbone taken off where taps are attached. torch's random generator is where it is
            to start.
        train, validation: encoded rows with labels.
        arguments: what Trainer would be given: batch size, optimizer, schedule, clipping and seeds are read.
        best: takes in every epoch's scores.
        checkpoints: written to, and gone on from where there is one already.
        backbone_learning_rate: of a backbone that is trained.
    """
    device = next(p for p in model.parameters() if p.requires_grad).device
    per_epoch = -(-len(train) // arguments.per_device_train_batch_size)
    epochs = int(arguments.num_train_epochs)
    optimizer = make_optimizer(model, arguments, backbone_learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(per_epoch * epochs),
        num_training_steps=per_epoch * epochs,
    )
    run = Resumable(model, optimizer, scheduler, best, device)
    first_epoch, done = (0, 0) if checkpoints is None else run.resume(checkpoints)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with resident(train), resident(validation):
        for epoch in range(first_epoch, epochs):
            model.train()
            for step, batch in enumerate(epoch_batches(train, arguments, epoch, device, done), done + 1):
                model(**batch).loss.backward()
                if arguments.max_grad_norm > 0:
                    clip_gradients(parameters, arguments.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                if checkpoints is not None and checkpoints.due(step, per_epoch, epoch * per_epoch + step):
                    checkpoints.save(run.state(epoch, step), epoch * per_epoch + step)
            best.record(score_epoch(model, validation, best, device), model)
            done = 0
            if checkpoints is not None:
                checkpoints.save(run.state(epoch + 1, 0), (epoch + 1) * per_epoch)


class Resumable:
    """Everything that a step changes, as a checkpoint's content and back."""

    def __init__(
        self,
        model: LeviModel,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        best: BestEpoch,
        device: torch.device,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.best, self.device = best, device

    def state(self, epoch: int, step: int) -> TrainingState:
        """The content of a checkpoint after ``step`` steps of ``epoch``."""
        scores, weights = self.best.state()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors.update({f"best.{name}": value for name, value in weights.items()})
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value for name, value in values.items()})
        tensors["generator.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state(self.device)
        known = self.scheduler.state_dict()
        scores["scheduler"] = {name: known[name] for name in SCHEDULER_STATE}
        return TrainingState(epoch, step, tensors, scores)

    def resume(self, checkpoints: Checkpoints) -> tuple[int, int]:
        """Go on from the newest checkpoint, if there is one; the epoch and the step in it that are next."""
        state = checkpoints.newest()
        if state is None:
            return 0, 0
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}, "generator": {}}
        for name, value in state.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        self.best.resume(state.scores, {k: v.to(self.device) for k, v in parts["best"].items()})
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        scheduler = {**self.scheduler.state_dict(), **state.scores["scheduler"]}
        for group, rate in zip(groups, scheduler["_last_lr"], strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scheduler.load_state_dict(scheduler)
        torch.set_rng_state(parts["generator"]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["generator"]["cuda"], self.device)
        return state.epoch, state.step


def make_optimizer(
    model: LeviModel, arguments: TrainingArguments, backbone_learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """Trainer's own choice of optimizer, with its two groups: weight decay on matrices alone.

    Where the backbone is trained, its parameters make two more, with a learning rate of their own.
    """
    # The method reads nothing of the Trainer it is called on.
    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)

    def groups(named: list[tuple[str, torch.nn.Parameter]], **rate: float) -> list[dict[str, Any]]:
        return [
            {"params": [p for name, p in named if name in decayed], "weight_decay": arguments.weight_decay, **rate},
            {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0, **rate},
        ]

    parts = groups([(name, p) for name, p in trained if not name.startswith(PREFIX)])
    inside = [(name, p) for name, p in trained if name.startswith(PREFIX)]
    if inside:
        parts += groups(inside, lr=backbone_learning_rate or settings["lr"])
    optimizer: torch.optim.Optimizer = kind([group for group in parts if group["params"]], **settings)
    return optimizer


def epoch_rows(size: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's rows, int64 ``[size]``: what accelerate's seedable sampler draws under Trainer."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed + epoch))


def epoch_batches(
    dataset: EncodedDataset, arguments: TrainingArguments, epoch: int, device: torch.device, done: int = 0
) -> Iterator[dict[str, Tensor]]:
    """An epoch's shuffled batches on a device, but for the first ``done``, which an earlier process has seen."""
    if done == 0:
        _draw_as_a_data_loader()
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    chunks = epoch_rows(len(dataset), seed, epoch).split(arguments.per_device_train_batch_size)
    for batch in prefetched(dataset, chunks[done:]):
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
