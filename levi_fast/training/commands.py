"""What ``levi-fast train`` does, apart from reading the command line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from levi_fast.backbones import (
    DEFAULT_BACKBONE,
    BackboneRecord,
    load_backbone,
    load_backbone_config,
)
from levi_fast.cache.ranks import World
from levi_fast.config import LeviConfig
from levi_fast.data.preprocessing import TableProcessor
from levi_fast.errors import DataError
from levi_fast.model_folder import portable_name
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import METRICS_FILE, versions, write_metrics
from levi_fast.report.model_card import model_card
from levi_fast.report.tables import split_table
from levi_fast.storage import write_atomic
from levi_fast.training.cached import cached_taps
from levi_fast.training.checkpoints import Checkpoints
from levi_fast.training.fit import resolve_device, rows_and_options
from levi_fast.training.methods import find_method, method_config
from levi_fast.training.named_tasks import NamedTask
from levi_fast.training.output import new_folder, require_new_folder
from levi_fast.training.request import (
    TrainRequest,
    backbone_of,
    cache_request,
    checkpoint_options,
    load_task,
)
from levi_fast.training.runs import MethodResult, Splits, TapBank, run_method
from levi_fast.training.tap_selection import TapSelection, select_taps
from levi_fast.training.tasks import TableTask


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
    if World.from_environment().rank:  # of several processes, the first one writes
        return document
    with new_folder(request.output) as stage:
        write_model(stage, request, prepared, result, document)
    checkpoints = checkpoint_options(request)
    if checkpoints is not None:
        checkpoints.clear()
    splits = prepared.splits
    rows = [(f"ID ({splits.id_split})", _id_rows(splits), result.id)]
    rows += [(f"OOD {name}", len(splits.ood[name]), scores) for name, scores in result.ood.items()]
    blend = f", blend {result.fit.weights}" if result.fit.blend or "levi" in result.method else ""
    held_out = " and held-out training rows" if result.fit.blend_rows > len(splits.validation) else ""
    title = (
        f"{request.method}, epoch {result.fit.best_epoch} of {request.options.epochs}{blend}, chosen on ID validation"
        f"{held_out}"
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
        tokenizer: or the image processor; None where the backbone reads neither.
        task, splits: the data.
        spec: of the task model, or None.
        config: of LEVI for this task.
    """

    name: str
    backbone: nn.Module | BackboneRecord | None
    tokenizer: Any
    task: NamedTask
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
    has_backbone = find_method(request.method).has_backbone
    # a method without one has no use for a pre-training either
    name = backbone_of(request, task, console) if has_backbone else request.backbone or DEFAULT_BACKBONE
    if beside is not None:
        tokenizer, backbone = beside.tokenizer, beside.backbone
    else:
        tokenizer = task.load_preprocessor(name)
        backbone = None
        # where its taps come from a cache, only a folder that is to hold the backbone needs it
        if has_backbone and (request.cache is None or request.include_backbone):
            with console.status(f"loading {name}"):
                backbone = load_backbone(name, dtype=request.backbone_dtype)
    backbone_config = getattr(backbone, "config", None) if request.cache is None else load_backbone_config(name)
    with console.status("reading the data"):
        splits = task.encode(tokenizer, max_length=request.max_length, backbone_config=backbone_config)
    console.note(f"rows: {_sizes(splits)}")
    spec = task.task_model(request.task_model, len(tokenizer) if task.processor.columns.text else None)
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
        if prepared.reads_text:  # what a pipeline cuts its texts to with truncation=True
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
    """A LeviConfig for a label space; with a standalone task model unless ``fields`` say otherwise.

    Raises:
        DataError: for a field out of range.
    """
    labels = processor.labels
    assert labels is not None
    default = {"standalone_view": task_model is not None and not fields.get("view_loss")}
    try:
        return LeviConfig(task_model=task_model, **labels.config_fields(), **{**default, **fields})
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
        "view_blend": result.fit.view_blend,
        "blend_rows": result.fit.blend_rows,
        "choices": result.choices,
        "best_epoch": result.fit.best_epoch,
        "view_epoch": result.fit.view_epoch,
        "epochs": len(result.fit.history),
        "seed": seed,
        "sizes": splits.sizes(),
    }


def _run(request: TrainRequest, prepared: Prepared, console: Console) -> MethodResult:
    _check_checkpoints(request, prepared)
    try:
        method_config(request.method, prepared.config)  # refuses a method without what it needs
        bank = build_bank(request, prepared, console) if request.runs_backbone_once else None
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
                checkpoints=checkpoint_options(request, console.note),
                on_epoch=on_epoch,
                on_note=console.note,
            )
    except ValueError as error:  # a tap out of range, a backbone without layers, a training that diverged
        if isinstance(error, DataError):
            raise
        raise DataError(str(error)) from error


def _check_checkpoints(request: TrainRequest, prepared: Prepared) -> None:
    """Refuse checkpoints of other data or options before the backbone runs; :func:`fit` compares the rest."""
    options = checkpoint_options(request)
    if options is None:
        return
    known = rows_and_options(prepared.splits.train, prepared.splits.validation, request.options)
    if find_method(request.method).starts_from_probe:
        del known["option learning_rate"]  # that of its second stage is another
    Checkpoints(options, known).check()


def build_bank(request: TrainRequest, prepared: Prepared, console: Console) -> TapBank | None:
    """The taps that a request's method reads, of all splits; None for a method without a backbone.

    Where the training data chooses the layers, ``prepared.config`` has its choice afterwards.

    Raises:
        DataError: a method without what it needs, before the backbone runs; a cache of something else.
        ValueError: a tap out of range, a backbone without layers.
    """
    selector = prepared.config.taps if request.selects_taps else None
    if selector is not None:
        prepared.config.taps = "all"
    bank = _read_taps(request, prepared, console)
    if isinstance(selector, str) and bank is not None:
        apply_selection(select(selector, request, prepared, bank, console), request, prepared, console)
    return bank


def select(selector: str, request: TrainRequest, prepared: Prepared, bank: TapBank, console: Console) -> TapSelection:
    """What a selector chooses among a bank's layers."""
    with console.status(f"choosing taps by {selector}"):
        return select_taps(selector, bank, prepared.splits, prepared.config, seed=request.options.seed)


def apply_selection(selection: TapSelection, request: TrainRequest, prepared: Prepared, console: Console) -> None:
    """Have the config say the layers; of a backbone that was not loaded, what its last one is must be known."""
    prepared.config.taps, prepared.config.tap_selection = selection.layers, selection.as_dict()
    console.note(f"taps: {selection.selector} chose layers {', '.join(map(str, selection.layers))}")
    backbone = prepared.backbone
    if isinstance(backbone, BackboneRecord) and selection.layers[-1] != backbone.layers[-1]:
        # The record's fingerprint is of the weights up to the cache's last layer, and this model ends below that.
        with console.status(f"loading {prepared.name}"):
            prepared.backbone = load_backbone(prepared.name, dtype=request.backbone_dtype)


def _read_taps(request: TrainRequest, prepared: Prepared, console: Console) -> TapBank | None:
    config = method_config(request.method, prepared.config)
    if request.cache is not None:
        max_length = prepared.task.processor.max_length if prepared.reads_text else None
        wanted = cache_request(request, prepared.name, prepared.tokenizer, max_length)
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


def _id_rows(splits: Splits) -> int:
    return len(splits.validation if splits.test is None else splits.test)


def _sizes(splits: Splits) -> str:
    return ", ".join(f"{len(dataset):,} {name}" for name, dataset in splits.named())


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
