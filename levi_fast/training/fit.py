"""Training through transformers' ``Trainer``; the epoch and the blend are chosen on ID validation data alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import (
    EvalPrediction,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from levi_fast.data.encoded import EncodedDataset, collate
from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel
from levi_fast.training.metrics import best_blend, blend_logits, compute_metrics, selection_key
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE

# Called after every epoch with (epoch, epochs, validation scores).
EpochProgress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained.

    Args:
        epochs: passes over the training rows; the best one on validation data is kept.
        batch_size: rows per step.
        learning_rate: AdamW's at its peak; linear warm-up over the first ``warmup_ratio`` of the steps, then cosine
            decay to 0.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of initialisation, dropout and the order of rows.
        blend: weight of the prediction with the view zeroed; None chooses it on validation data, see
            :func:`levi_fast.training.metrics.best_blend`.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.

    Raises:
        DataError: for a value outside its range, named by its command line flag.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0
    blend: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for flag, value, least in (("--epochs", self.epochs, 1), ("--batch-size", self.batch_size, 1)):
            if value < least:
                raise DataError(f"{flag}: expected a whole number of at least {least}, got {value}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed: expected a whole number from 0 to 2**32 - 1, got {self.seed}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise DataError(f"--learning-rate: expected a positive number, got {self.learning_rate}")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise DataError(f"--weight-decay: expected a number of at least 0, got {self.weight_decay}")
        if self.blend is not None and not 0.0 <= self.blend <= 1.0:
            raise DataError(f"--blend: expected 'auto' or a number from 0 to 1, got {self.blend}")
        resolve_device(self.device)


@dataclass
class FitResult:
    """What training chose: the epoch (from 1), the blend, their validation scores, and every epoch's scores."""

    best_epoch: int
    blend: float
    validation: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def resolve_device(device: str) -> torch.device:
    """The torch device behind ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DataError: for another name, or for CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DataError(f"--device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device here; see levi-fast env")
    return torch.device("cuda", 0) if device != "cpu" and torch.cuda.is_available() else torch.device("cpu")


def fit(
    model: LeviModel,
    train: EncodedDataset,
    validation: EncodedDataset,
    options: TrainingOptions,
    *,
    on_epoch: EpochProgress | None = None,
) -> FitResult:
    """Train a model in place; it ends in eval mode with the best epoch's weights and ``config.blend`` set.

    Args:
        model: from ``get_levi_model``. Seed torch before building it: its initial weights are not touched.
        train: encoded rows with labels, with taps attached unless the backbone is to run in every epoch.
        validation: the same of ID validation data.
        options: see :class:`TrainingOptions`.
        on_epoch: called after every epoch.

    Raises:
        ValueError: when no epoch gave finite predictions.
    """
    started = time.perf_counter()
    problem_type = str(model.config.problem_type)
    set_seed(options.seed)
    model.config.blend = 0.0  # logits are those with the view; compute_metrics does the blending
    keeper = _KeepBest(problem_type, options.epochs, on_epoch)

    def score(prediction: EvalPrediction) -> dict[str, float]:
        logits, without_view = _logits_of(prediction.predictions)
        if not np.isfinite(logits).all():
            return {"diverged": 1.0}
        labels = np.asarray(prediction.label_ids)
        if options.blend is None:
            blend, scores = best_blend(logits, without_view, labels, problem_type)
        else:
            blend = options.blend if without_view is not None else 0.0
            scores = compute_metrics(blend_logits(logits, without_view, blend), labels, problem_type)
        return {**scores, "blend": blend}

    # Trainer walks over all modules several times a step; with the taps attached, the backbone's need not be there.
    backbone = model.backbone
    if train.has_taps and validation.has_taps:
        model.backbone = None
    try:
        with train.only(model.reads), validation.only(model.reads):
            _train(model, train, validation, options, score, keeper)
    finally:
        model.backbone = backbone
    if keeper.best is None:
        raise ValueError("training diverged: no epoch gave finite predictions; lower --learning-rate")
    model.load_state_dict(keeper.weights)
    model.config.blend = keeper.best.blend
    model.eval()
    keeper.best.history = keeper.history
    keeper.best.seconds = time.perf_counter() - started
    return keeper.best


def _train(
    model: LeviModel,
    train: EncodedDataset,
    validation: EncodedDataset,
    options: TrainingOptions,
    score: Callable[[EvalPrediction], dict[str, float]],
    keeper: _KeepBest,
) -> None:
    # Trainer wants a folder; nothing is kept there, because the best weights stay in memory (they are small).
    with tempfile.TemporaryDirectory(prefix="levi-fast-") as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(folder, options, num_steps=options.epochs * -(-len(train) // options.batch_size)),
            data_collator=collate,
            train_dataset=train,
            eval_dataset=validation,
            compute_metrics=score,
            callbacks=[keeper],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(ignore_keys_for_eval=["layer_logits", "logits_with_view"])


class _KeepBest(TrainerCallback):
    """Keeps the scores of every epoch and a copy of the best one's trained weights."""

    def __init__(self, problem_type: str, epochs: int, on_epoch: EpochProgress | None) -> None:
        self.problem_type = problem_type
        self.epochs = epochs
        self.on_epoch = on_epoch
        self.best: FitResult | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.history: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reported: dict[str, Any] = kwargs["metrics"]
        own = {name.removeprefix("eval_"): value for name, value in reported.items()}
        dropped = ("loss", "runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        scores = {name: float(value) for name, value in own.items() if name not in dropped}
        self.history.append(scores)
        epoch = len(self.history)
        if "diverged" not in scores and self._is_better(scores):
            best = {name: value for name, value in scores.items() if name != "blend"}
            self.best = FitResult(best_epoch=epoch, blend=scores["blend"], validation=best)
            self.weights = {name: value.detach().clone() for name, value in kwargs["model"].state_dict().items()}
        if self.on_epoch is not None:
            self.on_epoch(epoch, self.epochs, scores)

    def _is_better(self, scores: dict[str, float]) -> bool:
        if self.best is None:
            return True
        return selection_key(scores, self.problem_type) > selection_key(self.best.validation, self.problem_type)


def _arguments(folder: str, options: TrainingOptions, num_steps: int) -> TrainingArguments:
    device = resolve_device(options.device)
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=EVALUATION_BATCH_SIZE,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(options.warmup_ratio * num_steps),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=options.seed,
        data_seed=options.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    # Several GPUs would make Trainer split batches over replicas of a model that costs less than the splitting.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _logits_of(predictions: Any) -> tuple[np.ndarray, np.ndarray | None]:
    if isinstance(predictions, tuple):
        return np.asarray(predictions[0]), np.asarray(predictions[1])
    return np.asarray(predictions), None
