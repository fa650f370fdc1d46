"""What ``levi-fast train`` was asked for, checked before anything expensive starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from levi_fast.backbone_training import BACKBONE_TRAINING
from levi_fast.backbones import DEFAULT_BACKBONE
from levi_fast.cache.manifest import DTYPES
from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.quantization import QUANTIZED, check_backbone_dtype
from levi_fast.report.console import Console
from levi_fast.selection import data_dependent
from levi_fast.training.cached import CacheRequest
from levi_fast.training.checkpoints import CheckpointOptions
from levi_fast.training.digits_task import DigitsTask
from levi_fast.training.fit import TrainingOptions, check_loop, resolve_device
from levi_fast.training.methods import find_method
from levi_fast.training.named_tasks import NAMED_TASKS, NamedTask, load_named_task
from levi_fast.training.tasks import TableFiles, TableTask


@dataclass(frozen=True)
class TrainRequest:
    """All that ``levi-fast train`` was asked for. Either ``files`` and ``columns``, or ``task_name`` and ``data``."""

    output: str
    files: TableFiles | None = None
    columns: Columns = field(default_factory=Columns)
    problem_type: str | None = None
    label_separator: str = "|"
    task_name: str | None = None
    data: str | None = None
    split: str | None = None
    max_train_rows: int | None = None
    max_eval_rows: int | None = None
    ood: Mapping[str, str] = field(default_factory=dict)  # of a named data set; else in files
    backbone: str | None = None
    backbone_dtype: str | None = None
    method: str = "levi"
    task_model: str = "auto"
    max_length: int | None = None
    precompute: bool = True
    cache: str | None = None
    cache_dtype: str | None = None
    include_backbone: bool = False
    backbone_batch_size: int = 32
    loop: str = "auto"
    checkpoints: str | None = None
    save_steps: int | None = None
    model: Mapping[str, Any] = field(default_factory=dict)  # LeviConfig fields
    options: TrainingOptions = field(default_factory=TrainingOptions)

    @property
    def runs_backbone_once(self) -> bool:
        """Whether the taps are computed before training; those of a backbone that is trained change with it."""
        return self.precompute and self.backbone_training == "frozen"

    @property
    def selects_taps(self) -> bool:
        """Whether the training data chooses the layers.

        Raises:
            DataError: "cka:k" without a k.
        """
        try:
            return data_dependent(self.model.get("taps"))
        except ValueError as error:
            raise DataError(f"--{error}") from error

    @property
    def backbone_training(self) -> str:
        """What of the backbone is trained: what the method says, else what was asked for."""
        return find_method(self.method).backbone_training or str(self.model.get("backbone_training", "frozen"))


def load_task(request: TrainRequest) -> NamedTask:
    """Check a request, and read its data.

    Raises:
        DataError: for what cannot be used.
    """
    method = find_method(request.method)
    if method.fixes_taps and "taps" in request.model:
        reads = "reads the last layer" if method.has_backbone else "reads no layer"
        raise DataError(f"--taps: --method {request.method} {reads}; other layers go with levi or taps-only")
    _check_backbone_dtype(request.backbone_dtype, request.options.device)
    if request.model.get("pooling") == "token":
        raise DataError("--pooling: expected mean, cls or last; token classification is for Python, see LeviConfig")
    _check_backbone_training(request)
    if request.selects_taps and not request.runs_backbone_once:
        raise DataError(
            f"--taps {request.model['taps']}: chooses among taps of the frozen backbone that are computed first; "
            "leave out --no-precompute and --backbone-training, or name layers"
        )
    _check_cache(request)
    with_checkpoints = checkpoint_options(request) is not None
    check_loop(request.loop, request.options.device, with_checkpoints=with_checkpoints)
    if method.selects_features and not request.precompute:
        raise DataError(f"--no-precompute: --method {request.method} selects among precomputed taps")
    if request.include_backbone and not method.has_backbone:
        raise DataError(f"--include-backbone: --method {request.method} has no backbone to include")
    if request.backbone_batch_size < 1:
        raise DataError(f"--backbone-batch-size: expected at least 1, got {request.backbone_batch_size}")
    if request.task_name is not None:
        return load_named_task(
            request.task_name,
            request.data,
            split=request.split,
            seed=request.options.seed,
            problem_type=request.problem_type,
            max_train_rows=request.max_train_rows,
            max_eval_rows=request.max_eval_rows,
            ood=request.ood,
        )
    if request.files is None:
        names = ", ".join(NAMED_TASKS)
        raise DataError(f"expected --train FILE with --label-column, or --task-name ({names}) with --data")
    if request.columns.label is None:
        raise DataError("--label-column: expected the name of the column to predict")
    if not request.columns.text and method.has_backbone:
        raise DataError(
            f"--text-column: --method {request.method} reads text with the backbone; name at least one column "
            f"(--method task-model does without)"
        )
    if not (request.columns.text or request.columns.numeric or request.columns.categorical):
        raise DataError("expected at least one of --text-column, --numeric-column, --categorical-column")
    return TableTask.load(
        request.files,
        request.columns,
        problem_type=request.problem_type,
        label_separator=request.label_separator,
        seed=request.options.seed,
    )


def backbone_of(request: TrainRequest, task: NamedTask, console: Console) -> str:
    """Where a request's backbone is: the one that comes with its task, the one it names, or the default.

    Raises:
        DataError: the task's own cannot be used, or another one is named beside it.
    """
    if isinstance(task, DigitsTask):
        if request.backbone is not None:
            raise DataError(f"--backbone: --task-name digits pre-trains its own, got {request.backbone!r}")
        with console.status("pre-training a small ViT on digits"):
            return task.backbone()
    return request.backbone or DEFAULT_BACKBONE


def _check_backbone_training(request: TrainRequest) -> None:
    training, method = request.backbone_training, find_method(request.method)
    asked = request.model.get("backbone_training", "frozen")
    if asked not in BACKBONE_TRAINING:
        raise DataError(f"--backbone-training: expected one of {', '.join(BACKBONE_TRAINING)}, got {asked!r}")
    if asked != "frozen" and not method.has_backbone:
        raise DataError(f"--backbone-training {asked}: --method {request.method} has no backbone")
    if asked not in ("frozen", training):
        raise DataError(f"--backbone-training {asked}: --method {request.method} is {training}")
    if asked != "frozen" and method.selects_features:
        raise DataError(
            f"--backbone-training {asked}: --method {request.method} selects among a frozen one's features"
        )
    if training == "frozen":
        if request.options.backbone_learning_rate is not None:
            raise DataError(
                "--backbone-learning-rate: the backbone is frozen; see --backbone-training and --method fine-tuning"
            )
        return
    if request.cache is not None:
        raise DataError(f"--cache: keeps the taps of a frozen backbone, and here it is trained ({training})")
    if request.include_backbone:
        raise DataError(f"--include-backbone: a trained backbone ({training}) is saved in any case")
    if request.backbone_dtype in QUANTIZED:
        raise DataError(f"--backbone-dtype {request.backbone_dtype}: cannot be trained ({training})")


def checkpoint_options(
    request: TrainRequest, on_note: Callable[[str], None] = lambda text: None
) -> CheckpointOptions | None:
    """Where checkpoints go, or None.

    Raises:
        DataError: a folder that cannot be used.
    """
    if request.checkpoints is None:
        if request.save_steps is not None:
            raise DataError("--save-steps: only with --checkpoints DIR")
        return None
    mine, output = Path(request.checkpoints).resolve(), Path(request.output).resolve()
    if mine == output or mine in output.parents or output in mine.parents:
        raise DataError(f"--checkpoints: expected a folder apart from --output {request.output}, got {mine}")
    return CheckpointOptions(request.checkpoints, request.save_steps, on_note)


def _check_cache(request: TrainRequest) -> None:
    if request.cache is None:
        if request.cache_dtype is not None:
            raise DataError("--cache-dtype: only with --cache")
        return
    if not find_method(request.method).has_backbone:
        raise DataError(f"--cache: --method {request.method} reads no taps")
    if "backbone_layers" in request.model:
        raise DataError(
            "--cache: keeps the encoder's taps; leave out --backbone-layers, or build the cache in Python"
        )
    if not request.precompute:
        raise DataError("--cache: --no-precompute runs the backbone in every epoch; leave out one of them")
    if "://" not in request.cache and request.output:
        cache, output = Path(request.cache).expanduser().resolve(), Path(request.output).resolve()
        if cache == output or cache in output.parents or output in cache.parents:
            raise DataError(f"--cache: expected a folder apart from --output {request.output}, got {request.cache}")
    if request.cache_dtype is not None and request.cache_dtype not in DTYPES:
        raise DataError(f"--cache-dtype: expected one of {', '.join(DTYPES)}, got {request.cache_dtype!r}")


def cache_request(request: TrainRequest, backbone: str, tokenizer: Any, max_length: int | None) -> CacheRequest:
    """The part of a request that its taps depend on; ``backbone`` is what :func:`backbone_of` answers."""
    assert request.cache is not None
    asked = request.model.get("taps", "all")
    return CacheRequest(
        folder=request.cache,
        backbone=backbone,
        backbone_dtype=request.backbone_dtype,
        # a method of the last layer alone finds it in whatever is there, and a selector chooses among that
        taps=None if find_method(request.method).fixes_taps or request.selects_taps else asked,
        pooling=request.model.get("pooling", "mean"),
        tokenizer=tokenizer,
        max_length=max_length,
        dtype=request.cache_dtype,
        batch_size=request.backbone_batch_size,
        device=resolve_device(request.options.device),
    )


def _check_backbone_dtype(dtype: str | None, device: str) -> None:
    try:
        check_backbone_dtype(dtype, "--backbone-dtype")
    except ValueError as error:
        raise DataError(str(error)) from error
    if dtype in QUANTIZED and resolve_device(device).type != "cpu":
        raise DataError(f"--backbone-dtype {dtype} runs on the CPU alone; add --device cpu")
