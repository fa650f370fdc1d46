"""A training loop of our own: what ``Trainer`` computes, without what it does beside computing.

A step on cached taps takes a few milliseconds, and Trainer's bookkeeping about as much again. This loop draws the
same rows in the same order and the same random numbers, uses the same optimizer and schedule, and so ends with the
same bits (fp32, on the CPU, in one process or two: a sum over more has an order). It knows one device a process and
no gradient accumulation. With checkpoints it goes on where an earlier run was killed, with the same bits however many
processes there are.

On a GPU a step can be replayed as a CUDA graph (:mod:`levi_fast.training.graphed_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, get_scheduler

from levi_fast.backbone_training import PREFIX
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.blending import Logits
from levi_fast.training.checkpoints import Checkpoints, TrainingState
from levi_fast.training.graphed_step import CudaGraphs, GraphedStep
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.prefetch import prefetched, resident
from levi_fast.training.replicas import Replicas, moving_buffers, trained

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
    alone: bool = False,
    cuda_graph: bool = False,
) -> None:
    """Train a model in place, scoring every epoch; among the processes of its launch, unless ``alone``.

    Taps are copied to a GPU that trains where they fit there, memory-mapped ones else into memory where they fit;
    what stays on disk is gathered by a background thread while a step computes. Without taps the backbone runs in
    every step.

    Args:
        model: on its device, its backbone taken off where taps are attached. torch's random generator is where it is
            to start.
        train, validation: encoded rows with labels.
        arguments: what Trainer would be given: batch size, optimizer, schedule, clipping and seeds are read.
        best: takes in every epoch's scores.
        checkpoints: written to, and gone on from where there is one already.
        backbone_learning_rate: of a backbone that is trained.
        alone: others that ``torchrun`` started train models of their own.
        cuda_graph: replay steps as CUDA graphs: of a model on a GPU without its backbone, trained by one process with
            torch's fused AdamW (Trainer's default).
    """
    device = trained(model)[0].device
    replicas = Replicas() if alone else Replicas.of(arguments, device)
    per_epoch = replicas.steps(len(train), arguments.per_device_train_batch_size)
    epochs = int(arguments.num_train_epochs)
    optimizer = make_optimizer(model, arguments, backbone_learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(per_epoch * epochs),
        num_training_steps=per_epoch * epochs,
    )
    replicas.begin_alike(model)
    if replicas.rank:  # all were seeded alike, to begin with the same model; their dropout is to differ
        torch.manual_seed(arguments.seed + replicas.rank)
    run = Resumable(model, optimizer, scheduler, best, device, replicas)
    first_epoch, done = (0, 0) if checkpoints is None else run.resume(checkpoints)
    take: Callable[[Mapping[str, Tensor]], object] = TrainingStep(model, optimizer, arguments.max_grad_norm, replicas)
    if cuda_graph:
        take = GraphedStep(take, optimizer, CudaGraphs(device), device)
    with resident([train, validation], device):
        for epoch in range(first_epoch, epochs):
            model.train()
            for step, batch in enumerate(epoch_batches(train, arguments, epoch, replicas, done), done + 1):
                take(batch)
                scheduler.step()
                if checkpoints is not None and checkpoints.due(step, per_epoch, epoch * per_epoch + step):
                    run.save(checkpoints, epoch, step, epoch * per_epoch + step)
            best.record(score_epoch(model, validation, best, replicas), model)
            done = 0
            if checkpoints is not None:
                run.save(checkpoints, epoch + 1, 0, (epoch + 1) * per_epoch)


class TrainingStep:
    """A step of training on a batch: forward, backward, clipping, optimizer. It waits for no GPU.

    Args:
        model: in training mode where it is called, on its device.
        optimizer: of its trained parameters, without gradients before and after a step.
        max_grad_norm: gradients are scaled down to this norm, part by part; 0 leaves them.
        replicas: those who take the same step.
    """

    def __init__(
        self, model: LeviModel, optimizer: torch.optim.Optimizer, max_grad_norm: float, replicas: Replicas
    ) -> None:
        self.model, self.optimizer, self.replicas = model, optimizer, replicas
        self.parameters, self.buffers = trained(model), moving_buffers(model)
        self.clip = ClippedApart(model, max_grad_norm)

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        self.replicas.follow(self.buffers)
        self.model(**_moved(batch, self.parameters[0].device)).loss.backward()
        self.replicas.average_gradients(self.parameters)
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Resumable:
    """Everything that a step changes, as a checkpoint's content and back."""

    def __init__(
        self,
        model: LeviModel,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        best: BestEpoch,
        device: torch.device,
        replicas: Replicas,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.best, self.device, self.replicas = best, device, replicas

    def save(self, checkpoints: Checkpoints, epoch: int, step: int, steps_done: int) -> None:
        """Write a checkpoint after ``step`` steps of ``epoch``; called by all processes, written by the first."""
        generators = {"cpu": self.replicas.gather_states(torch.get_rng_state())}
        if self.device.type == "cuda":
            generators["cuda"] = self.replicas.gather_states(torch.cuda.get_rng_state(self.device))
        if self.replicas.rank == 0:
            checkpoints.save(self.state(epoch, step, generators), steps_done)

    def state(self, epoch: int, step: int, generators: dict[str, list[Tensor]]) -> TrainingState:
        """The content of a checkpoint; of the processes only the random generators differ."""
        scores, weights, validation = self.best.state()
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors.update({f"best.{name}": value for name, value in weights.items()})
        tensors.update({f"validation.{name}": value for name, value in validation.items()})
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors.update({f"optimizer.{index}.{name}": value for name, value in values.items()})
        for kind, states in generators.items():
            tensors.update({f"generator.{kind}.{rank}": state for rank, state in enumerate(states)})
        known = self.scheduler.state_dict()
        scores["scheduler"] = {name: known[name] for name in SCHEDULER_STATE}
        return TrainingState(epoch, step, tensors, scores)

    def resume(self, checkpoints: Checkpoints) -> tuple[int, int]:
        """Go on from the newest checkpoint, if there is one; the epoch and the step in it that are next."""
        state = self.replicas.read_alike(checkpoints.newest)
        if state is None:
            return 0, 0
        parts: dict[str, dict[str, Tensor]] = {
            name: {} for name in ("model", "best", "validation", "optimizer", "generator")
        }
        for name, value in state.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"])
        weights = {name: value.to(self.device) for name, value in parts["best"].items()}
        self.best.resume(state.scores, weights, parts["validation"])
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
        rank = self.replicas.rank
        torch.set_rng_state(parts["generator"][f"cpu.{rank}"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(parts["generator"][f"cuda.{rank}"], self.device)
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
    dataset: EncodedDataset, arguments: TrainingArguments, epoch: int, replicas: Replicas, done: int = 0
) -> Iterator[dict[str, Tensor]]:
    """An epoch's shuffled batches of this process, but for the first ``done``, which an earlier one has seen."""
    if done == 0:
        _draw_as_a_data_loader()
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    chunks = replicas.rows(epoch_rows(len(dataset), seed, epoch), arguments.per_device_train_batch_size)
    yield from prefetched(dataset, chunks[done:])


def score_epoch(
    model: LeviModel, validation: EncodedDataset, best: BestEpoch, replicas: Replicas
) -> dict[str, float]:
    """Scores of the validation rows, in the batches of every evaluation of a head; the same in all processes."""
    _draw_as_a_data_loader()
    model.eval()
    parts: dict[str, list[Tensor]] = {"both": [], "without_view": [], "without_taps": []}
    with torch.no_grad():
        for batch in prefetched(validation, replicas.rows(torch.arange(len(validation)), EVALUATION_BATCH_SIZE)):
            batch.pop("labels", None)
            output = model(**_moved(batch, replicas.device))
            found = (output.logits, output.logits_without_view, output.logits_without_taps)
            for part, logits in zip(parts.values(), found, strict=True):
                if logits is not None:
                    part.append(logits.float())

    def whole(part: list[Tensor]) -> np.ndarray:
        found: np.ndarray = replicas.gather_predictions(part, len(validation)).cpu().numpy()
        return found

    assert validation.labels is not None
    logits = Logits(**{name: whole(part) for name, part in parts.items() if part})
    return best.score(logits, validation.labels.numpy())


class ClippedApart:
    """Clips a standalone task model's gradients by their norm, and all others by theirs, when called.

    Clipped together, a large gradient of the one would shorten the other's steps.

    Args:
        model: whose trained parameters they are of.
        max_norm: gradients are scaled down to this norm; 0 leaves them.
    """

    def __init__(self, model: LeviModel, max_norm: float) -> None:
        own = set() if model.standalone is None else {id(parameter) for parameter in model.standalone.parameters()}
        parameters = trained(model)
        parts = [p for p in parameters if id(p) not in own], [p for p in parameters if id(p) in own]
        self.parts, self.max_norm = [part for part in parts if part], max_norm

    def __call__(self) -> None:
        if self.max_norm > 0:
            for part in self.parts:
                clip_gradients(part, self.max_norm)


def clip_gradients(parameters: list[torch.nn.Parameter], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_``; on the CPU it leaves out the product with 1 where nothing is to be clipped.

    Returns:
        the norm before clipping.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    on_gpu = norm.device.type != "cpu"  # which would have to be waited for: more than the products cost
    if on_gpu or not max_norm / (float(norm) + 1e-6) >= 1.0:  # so that NaN goes on to every gradient, as in torch
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _moved(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A batch on a device; a GPU is not waited for, so that the host gathers the next batch while it computes."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _draw_as_a_data_loader() -> None:
    """Take one number from torch's generator: a DataLoader draws its workers' seed even where it has no workers."""
    torch.empty((), dtype=torch.int64).random_()
