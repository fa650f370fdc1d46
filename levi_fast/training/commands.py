"""What ``levi-fast train`` and ``levi-fast evaluate`` do, apart from reading the command line."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from levi_fast.backbones import (
    DEFAULT_BACKBONE,
    BackboneRecord,
    load_backbone,
    load_backbone_config,
    load_tokenizer,
)
from levi_fast.cache.manifest import DTYPES
from levi_fast.config import LeviConfig
from levi_fast.data.preprocessing import TableProcessor, warn_truncated
from levi_fast.data.tables import Columns, read_table
from levi_fast.errors import DataError
from levi_fast.model_folder import portable_name
from levi_fast.modeling import LeviModel
from levi_fast.quantization import check_backbone_dtype
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import METRICS_FILE, versions, write_metrics
from levi_fast.report.model_card import model_card
from levi_fast.report.tables import split_table
from levi_fast.storage import write_atomic
from levi_fast.training.cached import CacheRequest, cached_taps
from levi_fast.training.fit import TrainingOptions, check_loop, resolve_device
from levi_fast.training.output import new_folder, require_new_folder
from levi_fast.training.prediction import predict, readable_predictions
from levi_fast.training.runs import METHODS, MethodResult, Splits, TapBank, method_config, move, run_method, score
from levi_fast.training.tasks import MovieLensSplits, TableFiles, TableTask, saved_task

NAMED_TASKS = ("movielens",)


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
    split: str = "genres"
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
    model: Mapping[str, Any] = field(default_factory=dict)  # LeviConfig fields
    options: TrainingOptions = field(default_factory=TrainingOptions)


def train(request: TrainRequest, console: Console) -> dict[str, Any]:
    """Train, print the table of ID and OOD metrics, write the model folder.

    Returns:
        the content of ``metrics.json``.

    Raises:
        DataError: for anything in the request or the data that cannot be used; before training starts.
    """
    started = time.perf_counter()
    require_new_folder(request.output)
    prepared = prepare(request, console)
    result = _run(request, prepared, console)
    trained, total = result.model.num_parameters_by_part()
    loaded = f" of {total:,}" if request.cache is None else "; the backbone's taps came from the cache"
    console.note(f"trained parameters: {trained:,}{loaded}")
    document = document_of(request, prepared, result, started)
    with new_folder(request.output) as stage:
        write_model(stage, request, prepared, result, document)
    splits = prepared.splits
    rows = [(f"ID ({splits.id_split})", _id_rows(splits), result.id)]
    rows += [(f"OOD {name}", len(splits.ood[name]), scores) for name, scores in result.ood.items()]
    blend = f", blend {result.model.config.blend:g}" if result.fit.blend or "levi" in result.method else ""
    title = (
        f"{request.method}, epoch {result.fit.best_epoch} of {request.options.epochs}{blend}, chosen on ID validation"
    )
    console.table(split_table(title, rows))
    if splits.test is None:
        console.note("no --test file: the ID figures are those of the validation rows that chose the epoch")
    console.note(f"wrote {request.output}")
    return document


@dataclass
class Prepared:
    """What a request's data and backbone came to, before anything is trained.

    Args:
        name: of the backbone.
        backbone: frozen; None for a method without one; a record of it where its taps come from a cache (None before
            :func:`build_bank` has opened that).
        tokenizer: None where no text is read.
        task, splits: the data.
        spec: of the task model, or None.
        config: of LEVI for this task.
    """

    name: str
    backbone: nn.Module | BackboneRecord | None
    tokenizer: Any
    task: TableTask | MovieLensSplits
    splits: Splits
    spec: dict[str, Any] | None
    config: LeviConfig

    @property
    def loaded_backbone(self) -> nn.Module | None:
        return self.backbone if isinstance(self.backbone, nn.Module) else None

    @property
    def reads_text(self) -> bool:
        return bool(self.task.processor.columns.text)


def prepare(request: TrainRequest, console: Console, *, beside: Prepared | None = None) -> Prepared:
    """Read and encode the data, and load the backbone and its tokenizer, or take them from ``beside``.

    Raises:
        DataError: for anything in the request or the data that cannot be used.
    """
    task = load_task(request)
    labels = task.processor.labels
    assert labels is not None
    if isinstance(task, TableTask):
        known = f", {labels.num_labels} labels: {_listed(labels.names)}" if labels.names else ""
        origin = f"inferred from column {labels.column!r}" if task.inferred else f"column {labels.column!r}"
        console.note(f"problem type: {labels.problem_type} ({origin}){known}")
    name = request.backbone or DEFAULT_BACKBONE
    if beside is not None:
        tokenizer, backbone = beside.tokenizer, beside.backbone
    else:
        tokenizer = load_tokenizer(name) if task.processor.columns.text else None
        backbone = None
        # where its taps come from a cache, only a folder that is to hold the backbone needs it
        if request.method != "task-model" and (request.cache is None or request.include_backbone):
            with console.status(f"loading {name}"):
                backbone = load_backbone(name, dtype=request.backbone_dtype)
    backbone_config = getattr(backbone, "config", None) if request.cache is None else load_backbone_config(name)
    with console.status("reading texts"):
        splits = task.encode(tokenizer, max_length=request.max_length, backbone_config=backbone_config)
    console.note(f"rows: {_sizes(splits)}")
    spec = task.task_model(request.task_model, None if tokenizer is None else len(tokenizer))
    config = build_config(task.processor, spec, request.model)
    return Prepared(name, backbone, tokenizer, task, splits, spec, config)


def document_of(request: TrainRequest, prepared: Prepared, result: MethodResult, started: float) -> dict[str, Any]:
    """``metrics.json`` of a trained model; ``started`` is when the command did, by ``time.perf_counter``."""
    named = portable_name(prepared.name, Path(request.output)) if prepared.backbone is not None else None
    return {
        **run_document(result, prepared.splits, request.options.seed),
        "backbone": named,
        "task": request.task_name or "table",
        "max_length": prepared.task.processor.max_length if prepared.reads_text else None,
        "trained_parameters": result.model.num_parameters_by_part()[0],
        "seconds": round(time.perf_counter() - started, 3),
        "versions": versions(),
    }


def write_model(
    stage: Path, request: TrainRequest, prepared: Prepared, result: MethodResult, document: Mapping[str, Any]
) -> None:
    """Write a model folder's files: the model, what reads its data, ``metrics.json`` and the model card."""
    result.model.save_pretrained(stage, include_backbone=request.include_backbone)
    if prepared.tokenizer is not None:
        # what a pipeline cuts its texts to with truncation=True
        prepared.tokenizer.model_max_length = prepared.task.processor.max_length
        prepared.tokenizer.save_pretrained(stage)
    prepared.task.save(stage)
    write_metrics(stage / METRICS_FILE, document)
    saved = LeviConfig.from_pretrained(stage)
    columns = prepared.task.processor.columns
    reads = (*columns.text, *columns.numeric, *columns.categorical)
    write_atomic(stage / "README.md", model_card(document, saved, reads, request.include_backbone))


def build_config(
    processor: TableProcessor, task_model: dict[str, Any] | None, fields: Mapping[str, Any]
) -> LeviConfig:
    """A LeviConfig for a label space.

    Raises:
        DataError: for a field out of range.
    """
    labels = processor.labels
    assert labels is not None
    try:
        return LeviConfig(task_model=task_model, **labels.config_fields(), **fields)
    except (ValueError, TypeError) as error:
        raise DataError(str(error)) from error


def run_document(result: MethodResult, splits: Splits, seed: int) -> dict[str, Any]:
    """The part of ``metrics.json`` that a method and its data decide."""
    return {
        "id": result.id,
        "ood": result.ood,
        "id_split": splits.id_split,
        "validation": result.fit.validation,
        "method": result.method,
        "problem_type": result.model.config.problem_type,
        "blend": result.fit.blend,
        "best_epoch": result.fit.best_epoch,
        "epochs": len(result.fit.history),
        "seed": seed,
        "sizes": splits.sizes(),
    }


def evaluate(
    model_folder: str,
    data: str,
    console: Console,
    *,
    output: str | None = None,
    predictions: str | None = None,
    backbone: str | None = None,
    backbone_batch_size: int = 32,
    device: str = "auto",
) -> dict[str, Any]:
    """Run a saved model on a file (or, for a named task, on the folder of its data) and print its metrics.

    Args:
        model_folder: what ``levi-fast train`` wrote.
        data: the file. Without the label column there are predictions only.
        console: where to print.
        output: JSON file for the metrics.
        predictions: CSV file for the predictions, one line per row of the data.
        backbone: in place of the one that the folder names.
        backbone_batch_size: texts per forward pass of the backbone.
        device: "auto", "cpu" or "cuda".

    Raises:
        DataError: for a folder, file, column or row that cannot be used.
        BackboneMismatchError: the backbone is not the one that the model was trained on.
    """
    target_device = resolve_device(device)
    for flag, path in (("--output", output), ("--predictions", predictions)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise DataError(f"{flag}: {Path(path).absolute().parent} is no folder")
    processor = TableProcessor.load(model_folder)
    named = saved_task(model_folder)
    if named is not None:
        if predictions is not None:
            raise DataError("--predictions: only for models trained on your own files")
        return _evaluate_named(named, model_folder, data, processor, console, output, backbone, target_device)
    table = read_table(data, processor.columns, label_required=predictions is None)
    processor.check(table)
    model = _load_model(model_folder, backbone, console)
    move(model, target_device)
    tokenizer = load_tokenizer(model_folder) if processor.columns.text else None
    dataset = processor.encode(table, tokenizer)
    warn_truncated([dataset], processor.max_length)
    with console.progress("backbone") as report:
        found = predict(model, dataset, backbone_batch_size=backbone_batch_size, progress=report)
    document: dict[str, Any] = {"data": data, "rows": len(dataset), "method_config": _brief(model.config)}
    assert processor.labels is not None
    if dataset.labels is not None:
        from levi_fast.training.metrics import compute_metrics

        metrics = compute_metrics(found.logits, dataset.labels.numpy(), processor.labels.problem_type)
        document["metrics"] = metrics
        console.table(split_table(f"{model_folder} on {data}", [(Path(data).name, len(dataset), metrics)]))
    document["versions"] = versions()
    if predictions is not None:
        write_atomic(predictions, _csv(readable_predictions(found.logits, processor.labels)))
        console.note(f"wrote {predictions}")
    if output is not None:
        write_metrics(output, document)
        console.note(f"wrote {output}")
    return document


def load_task(request: TrainRequest) -> TableTask | MovieLensSplits:
    """Check a request, and read its data.

    Raises:
        DataError: for what cannot be used.
    """
    if request.method not in METHODS:
        raise DataError(f"--method: expected one of {', '.join(METHODS)}, got {request.method!r}")
    if request.method == "linear-probe" and "taps" in request.model:
        raise DataError("--taps: the linear probe reads the last layer; use --method taps-only for other layers")
    _check_backbone_dtype(request.backbone_dtype, request.options.device)
    _check_cache(request)
    check_loop(request.loop, request.method != "task-model" and not request.precompute)
    if request.include_backbone and request.method == "task-model":
        raise DataError("--include-backbone: --method task-model has no backbone to include")
    if request.backbone_batch_size < 1:
        raise DataError(f"--backbone-batch-size: expected at least 1, got {request.backbone_batch_size}")
    if request.task_name is not None:
        if request.task_name not in NAMED_TASKS:
            raise DataError(f"--task-name: expected {', '.join(NAMED_TASKS)}, got {request.task_name!r}")
        if request.data is None:
            raise DataError("--task-name movielens needs --data, the folder with ratings.csv and movies.csv")
        return MovieLensSplits.load(request.data, request.split, request.options.seed)
    if request.files is None:
        raise DataError("expected --train FILE with --label-column, or --task-name movielens with --data DIR")
    if request.columns.label is None:
        raise DataError("--label-column: expected the name of the column to predict")
    if not request.columns.text and request.method != "task-model":
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


def _check_cache(request: TrainRequest) -> None:
    if request.cache is None:
        if request.cache_dtype is not None:
            raise DataError("--cache-dtype: only with --cache")
        return
    if request.method == "task-model":
        raise DataError("--cache: --method task-model reads no taps")
    if not request.precompute:
        raise DataError("--cache: --no-precompute runs the backbone in every epoch; leave out one of them")
    if request.cache_dtype is not None and request.cache_dtype not in DTYPES:
        raise DataError(f"--cache-dtype: expected one of {', '.join(DTYPES)}, got {request.cache_dtype!r}")


def cache_request(request: TrainRequest, tokenizer: Any, max_length: int) -> CacheRequest:
    """The part of a request that its taps depend on."""
    assert request.cache is not None
    return CacheRequest(
        folder=request.cache,
        backbone=request.backbone or DEFAULT_BACKBONE,
        backbone_dtype=request.backbone_dtype,
        # the linear probe reads the last layer of whatever is there
        taps=None if request.method == "linear-probe" else request.model.get("taps", "all"),
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
    if dtype == "int8" and resolve_device(device).type != "cpu":
        raise DataError("--backbone-dtype int8 runs on the CPU alone; add --device cpu")


def _run(request: TrainRequest, prepared: Prepared, console: Console) -> MethodResult:
    try:
        method_config(request.method, prepared.config)  # refuses a method without what it needs
        bank = build_bank(request, prepared, console) if request.precompute else None
        with console.epochs(request.method, request.options.epochs) as on_epoch:
            return run_method(
                request.method,
                prepared.config,
                prepared.splits,
                request.options,
                backbone=prepared.backbone,
                bank=bank,
                backbone_batch_size=request.backbone_batch_size,
                loop=request.loop,
                on_epoch=on_epoch,
            )
    except ValueError as error:  # a tap out of range, a backbone without layers, a training that diverged
        if isinstance(error, DataError):
            raise
        raise DataError(str(error)) from error


def build_bank(request: TrainRequest, prepared: Prepared, console: Console) -> TapBank | None:
    """The taps that a request's method reads, of all splits; None for a method without a backbone.

    Raises:
        DataError: a method without what it needs, before the backbone runs; a cache of something else.
        ValueError: a tap out of range, a backbone without layers.
    """
    config = method_config(request.method, prepared.config)
    if request.cache is not None:
        wanted = cache_request(request, prepared.tokenizer, prepared.task.processor.max_length)
        record, bank = cached_taps(wanted, prepared.splits, console)
        prepared.backbone = prepared.backbone or record
        return bank
    if not isinstance(prepared.backbone, nn.Module):
        return None
    with console.split_progress({name: len(data) for name, data in prepared.splits.named()}) as report:
        return TapBank.build(
            prepared.backbone,
            config,
            prepared.splits,
            batch_size=request.backbone_batch_size,
            device=resolve_device(request.options.device),
            progress=report,
        )


def _load_model(folder: str, backbone: str | None, console: Console) -> LeviModel:
    with console.status("loading the model"):
        given = None
        if backbone is not None:  # with the bits that the model was trained on
            given = load_backbone(backbone, dtype=LeviConfig.from_pretrained(folder).backbone_dtype)
        model: LeviModel = LeviModel.from_pretrained(folder, backbone=given)
    return model


def _evaluate_named(
    named: dict[str, Any],
    folder: str,
    data: str,
    processor: TableProcessor,
    console: Console,
    output: str | None,
    backbone: str | None,
    device: torch.device,
) -> dict[str, Any]:
    task = MovieLensSplits.load(data, named["split"], named["seed"])
    model = _load_model(folder, backbone, console)
    move(model, device)
    tokenizer = load_tokenizer(folder)
    splits = task.encode(tokenizer, max_length=processor.max_length, backbone_config=None)
    assert splits.test is not None
    with console.status("evaluating"):
        id_metrics = score(model, splits.test)
        ood = {name: score(model, dataset) for name, dataset in splits.ood.items()}
    rows = [("ID (test)", len(splits.test), id_metrics)]
    rows += [(f"OOD {name}", len(splits.ood[name]), scores) for name, scores in ood.items()]
    console.table(split_table(f"{folder} on movielens", rows))
    document = {"data": data, "id": id_metrics, "ood": ood, "sizes": splits.sizes(), "versions": versions()}
    if output is not None:
        write_metrics(output, document)
        console.note(f"wrote {output}")
    return document


def _brief(config: Any) -> dict[str, Any]:
    return {"backbone": config.backbone, "tap_layers": config.tap_layers, "blend": config.blend}


def _csv(columns: Mapping[str, list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", *columns])
    writer.writerows([place, *cells] for place, cells in enumerate(zip(*columns.values(), strict=True), start=1))
    return text.getvalue()


def _id_rows(splits: Splits) -> int:
    return len(splits.validation if splits.test is None else splits.test)


def _sizes(splits: Splits) -> str:
    return ", ".join(f"{len(dataset):,} {name}" for name, dataset in splits.named())


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
