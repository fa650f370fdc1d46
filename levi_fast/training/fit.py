"""Training by Trainer or the lean loop; the epoch and the blend are chosen on ID validation data alone."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from levi_fast.training.best_epoch import BestEpoch, EpochProgress, FitResult
from levi_fast.training.blending import Logits
from levi_fast.training.checkpoints import CheckpointOptions, Checkpoints
from levi_fast.training.cross_fitting import cross_fit, is_asked_for, sizes_allow
from levi_fast.training.lean import ClippedApart, make_optimizer, train_lean
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.prefetch import resident

# Of a backbone that is trained: what fine-tuning BERT-sized models and LoRA usually take.
BACKBONE_LEARNING_RATES = {"frozen": None, "full": 5e-5, "lora": 5e-4}

LOOPS = ("auto", "trainer", "lean", "graph")


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is trained.

    Args:
        epochs: passes over the training rows; the best one on validation data is kept.
        batch_size: rows per step, in each process.
        learning_rate: AdamW's at its peak; linear warm-up over the first ``warmup_ratio`` of the steps, then cosine
            decay to 0.
        backbone_learning_rate: the peak for a backbone that is trained; None is 5e-5 for "full" and 5e-4 for "lora".
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: gradients are scaled down to this norm; those of a standalone task model by themselves.
        seed: of initialisation, dropout and the order of rows.
        blend: weight of the prediction with the view zeroed; None chooses it on validation data, see
            :func:`levi_fast.training.blending.choose_blend`. A number leaves the view's own prediction out.
        cross_fit: folds of the training rows. Where few validation rows choose a blend that leans on the task model,
            each is predicted by a model trained on the others, and they choose with the validation rows
            (:mod:`levi_fast.training.cross_fitting`); with precomputed taps, in one process. 0 leaves it out.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.

    Raises:
        DataError: for a value outside its range, named by its command line flag.
    """

    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    backbone_learning_rate: float | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    seed: int = 0
    blend: float | None = None
    cross_fit: int = 4
    device: str = "auto"

    def __post_init__(self) -> None:
        for flag, value, least in (("--epochs", self.epochs, 1), ("--batch-size", self.batch_size, 1)):
            if value < least:
                raise DataError(f"{flag}: expected a whole number of at least {least}, got {value}")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"--seed: expected a whole number from 0 to 2**32 - 1, got {self.seed}")
        if not 0.0 < self.learning_rate < float("inf"):
            raise DataError(f"--learning-rate: expected a positive number, got {self.learning_rate}")
        rate = self.backbone_learning_rate
        if rate is not None and not 0.0 < rate < float("inf"):
            raise DataError(f"--backbone-learning-rate: expected a positive number, got {rate}")
        if not 0.0 <= self.weight_decay < float("inf"):
            raise DataError(f"--weight-decay: expected a number of at least 0, got {self.weight_decay}")
        if self.blend is not None and not 0.0 <= self.blend <= 1.0:
            raise DataError(f"--blend: expected 'auto' or a number from 0 to 1, got {self.blend}")
        if self.cross_fit < 0 or self.cross_fit == 1:
            raise DataError(f"--cross-fit: expected 0 or at least 2 folds, got {self.cross_fit}")
        resolve_device(self.device)


def resolve_device(device: str) -> torch.device:
    """The torch device behind ``auto``, ``cpu`` or ``cuda``.

    Raises:
        DataError: for another name, or for CUDA where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise DataError(f"--device: expected auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no CUDA device here; see levi-fast env")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # torchrun: each process its own


def fit(
    model: LeviModel,
    train: EncodedDataset,
    validation: EncodedDataset,
    options: TrainingOptions,
    *,
    loop: str = "auto",
    checkpoints: CheckpointOptions | None = None,
    alone: bool = False,
    on_epoch: EpochProgress | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> FitResult:
    """Train a model in place; it ends in eval mode with the best epoch's weights and ``config.blend`` set.

    A standalone task model (``config.standalone_view``) keeps an epoch of its own, and stays only where its
    prediction gets a weight.

    Args:
        model: from ``get_levi_model``. Seed torch before building it: its initial weights are not touched.
        train: encoded rows with labels, with taps attached unless the backbone is to run in every epoch.
        validation: the same of ID validation data.
        options: see :class:`TrainingOptions`.
        loop: ``"trainer"``: transformers' Trainer; ``"lean"``: the loop of :mod:`levi_fast.training.lean`, with the
            same results; ``"graph"``: the same loop, its steps replayed as CUDA graphs
            (:mod:`levi_fast.training.graphed_step`), which no GPU has run yet; one by one, with a warning, where the
            backbone runs in every step, several processes train together, or something cannot be captured;
            ``"auto"``: lean, but Trainer where the backbone runs in every step or several processes train together,
            unless checkpoints are asked for.
        checkpoints: where to write checkpoints, and to go on from if there are any; by the lean loop.
        alone: each of torchrun's processes trains a model of its own.
        on_epoch: called after every epoch; after going on from a checkpoint, for the epochs before it too.
        on_note: told that cross-fitting begins, which takes up to ``options.cross_fit - 1`` times as long again.

    Raises:
        DataError: for an unknown loop, one that cannot serve, or checkpoints of another run.
        DivergedError: when no epoch gave finite predictions.
    """
    started = time.perf_counter()
    backbone = model.backbone
    runs_backbone = model.extractor is not None and not (train.has_taps and validation.has_taps)
    backbone_rate = options.backbone_learning_rate or BACKBONE_LEARNING_RATES[model.config.backbone_training]
    check_loop(loop, options.device, with_checkpoints=checkpoints is not None)
    if options.blend is not None and model.standalone is not None:
        model.drop_standalone()  # it would never get a weight
    set_seed(options.seed)
    model.config.blend = model.config.view_blend = 0.0  # logits are those with the view; scoring does the blending
    has_standalone = model.standalone is not None
    best = BestEpoch(str(model.config.problem_type), options.epochs, options.blend, on_epoch, has_standalone)
    several = _processes() > 1 and not alone
    can_cross_fit = not (runs_backbone or several) and sizes_allow(train, validation, options.cross_fit)
    initial = {name: value.detach().clone() for name, value in model.state_dict().items()} if can_cross_fit else {}
    # Trainer walks over all modules several times a step; with the taps attached, the backbone's need not be there.
    if not runs_backbone:
        model.backbone = None
    try:
        # Trainer wants a folder; nothing is kept there, because the best weights stay in memory (they are small).
        with tempfile.TemporaryDirectory(prefix="levi-fast-") as folder:
            rows_per_step = options.batch_size * (1 if alone else _processes())
            num_steps = options.epochs * -(-len(train) // rows_per_step)
            # A backbone that is trained whole has weights behind its last tap (BERT's pooler), which get no gradient.
            arguments = _arguments(folder, options, num_steps, model.config.backbone_training == "full")
            lean_serves = checkpoints is not None or not (runs_backbone or several)
            if loop == "graph" and (runs_backbone or several):
                reason = "the backbone runs in every step" if runs_backbone else "several processes train together"
                warnings.warn(f"--loop graph: steps run without a graph, as {reason}", stacklevel=2)
                loop = "lean"
            with train.only(model.reads), validation.only(model.reads):
                if loop in ("lean", "graph") or (loop == "auto" and lean_serves):
                    kept = None
                    if checkpoints is not None:
                        kept = Checkpoints(checkpoints, _run_of(model, train, validation, options))
                    graph = loop == "graph"
                    train_lean(model, train, validation, arguments, best, kept, backbone_rate, alone, graph)
                else:
                    train_with_trainer(model, train, validation, arguments, best, backbone_rate)
        held_out = None
        if can_cross_fit and is_asked_for(best.choose(), train, validation, options.cross_fit):
            on_note(
                f"{len(validation):,} validation rows let the blend lean on the task model; now {options.cross_fit} "
                f"folds of the {len(train):,} training rows are asked too (--cross-fit)"
            )
            again = partial(_fit_fold, model, validation, options, graph=loop == "graph")
            with resident([train, validation], next(model.parameters()).device):  # once for all folds
                held_out = cross_fit(model, initial, train, options.cross_fit, options.seed, again)
    finally:
        model.backbone = backbone
    return best.restore(model, time.perf_counter() - started, held_out)


def _fit_fold(
    model: LeviModel, validation: EncodedDataset, options: TrainingOptions, train: EncodedDataset, *, graph: bool
) -> BestEpoch:
    """Train a model in place on some of the rows, as :func:`fit` does on all, by the lean loop."""
    set_seed(options.seed)
    has_standalone = model.standalone is not None
    best = BestEpoch(str(model.config.problem_type), options.epochs, options.blend, None, has_standalone)
    num_steps = options.epochs * -(-len(train) // options.batch_size)
    with tempfile.TemporaryDirectory(prefix="levi-fast-") as folder:
        arguments = _arguments(folder, options, num_steps, False)
        with train.only(model.reads), validation.only(model.reads):
            train_lean(model, train, validation, arguments, best, alone=True, cuda_graph=graph)
    return best


def check_loop(loop: str, device: str, *, with_checkpoints: bool = False) -> None:
    """Raise DataError unless ``loop`` is known and can serve on ``device``, as TrainingOptions names it."""
    if loop not in LOOPS:
        raise DataError(f"--loop: expected one of {', '.join(LOOPS)}, got {loop!r}")
    if with_checkpoints and loop == "trainer":
        raise DataError("--checkpoints: written by the lean loop alone; leave out --loop trainer")
    if loop == "graph" and resolve_device(device).type != "cuda":
        raise DataError(f"--loop graph: replays CUDA graphs, and --device {device} is the CPU here")


def _run_of(
    model: LeviModel, train: EncodedDataset, validation: EncodedDataset, options: TrainingOptions
) -> dict[str, Any]:
    """What makes a run the one it is. Where the backbone lies may change, its fingerprint may not."""
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in ("backbone", "transformers_version")}
    initial = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        initial.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return {
        **rows_and_options(train, validation, options),
        **{f"config {name}": value for name, value in config.items()},
        "taps": train.tap_dtype,
        "initial weights": initial.hexdigest()[:16],
    }


def rows_and_options(train: EncodedDataset, validation: EncodedDataset, options: TrainingOptions) -> dict[str, Any]:
    """The part of what makes a run that is known before a backbone has run."""
    given = dataclasses.asdict(options)
    if not given["cross_fit"]:
        del given["cross_fit"]  # as in a checkpoint from before there was one
    return {
        **{f"option {name}": value for name, value in given.items()},
        "processes": _processes(),
        "training rows": train.content_digest()[:16],
        "validation rows": validation.content_digest()[:16],
    }


def _processes() -> int:
    """How many processes torchrun, or accelerate, started: each gets a batch of every step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def train_with_trainer(
    model: LeviModel,
    train: EncodedDataset,
    validation: EncodedDataset,
    arguments: TrainingArguments,
    best: BestEpoch,
    backbone_learning_rate: float | None = None,
) -> None:
    """Train a model in place through transformers' Trainer, scoring every epoch."""

    def score(prediction: EvalPrediction) -> dict[str, float]:
        return best.score(_logits_of(prediction.predictions), np.asarray(prediction.label_ids))

    known = set(vars(model.config))
    callbacks: list[TrainerCallback] = [_Recorder(best)]
    if model.standalone is not None:
        callbacks.append(_Clipper(model, arguments.max_grad_norm))
        arguments = copy.copy(arguments)
        arguments.max_grad_norm = 0.0
    trainer = Trainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=score,
        optimizers=(make_optimizer(model, arguments, backbone_learning_rate), None),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train(ignore_keys_for_eval=["layer_logits", "logits_with_view"])
    for name in set(vars(model.config)) - known:  # use_cache, which is no setting of this model
        delattr(model.config, name)


class _Recorder(TrainerCallback):
    """Hands every epoch's scores to a :class:`BestEpoch`."""

    def __init__(self, best: BestEpoch) -> None:
        self.best = best

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index:  # all were seeded alike, to begin with the same model; their dropout is to differ
            torch.manual_seed(args.seed + args.process_index)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        reported: dict[str, Any] = kwargs["metrics"]
        own = {name.removeprefix("eval_"): value for name, value in reported.items()}
        dropped = ("loss", "runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")
        scores = {name: float(value) for name, value in own.items() if name not in dropped}
        self.best.record(scores, kwargs["model"])


class _Clipper(TrainerCallback):
    """Clips as the lean loop does, where Trainer would clip all gradients by one norm."""

    def __init__(self, model: LeviModel, max_grad_norm: float) -> None:
        self.clip = ClippedApart(model, max_grad_norm)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clip()


def _arguments(folder: str, options: TrainingOptions, num_steps: int, some_unused: bool) -> TrainingArguments:
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
        ddp_find_unused_parameters=some_unused,  # else every trained parameter has a part in every step
    )
    # Several GPUs would make Trainer split batches over replicas of a model that costs less than the splitting.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _logits_of(predictions: Any) -> Logits:
    parts = predictions if isinstance(predictions, tuple) else (predictions,)
    return Logits(*(np.asarray(part) for part in parts))
