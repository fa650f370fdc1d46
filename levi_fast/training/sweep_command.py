"""What ``levi-fast train --sweep FILE`` does: many heads in one pass, the best saved, a table of all."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from levi_fast.cache.ranks import World
from levi_fast.config import LeviConfig
from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel, get_levi_model
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import write_metrics
from levi_fast.report.tables import METRIC_TITLES, SweepRow, sweep_table
from levi_fast.training.commands import (
    Prepared,
    TrainRequest,
    build_bank,
    build_config,
    document_of,
    prepare,
    write_model,
)
from levi_fast.training.methods import find_method, method_config
from levi_fast.training.metrics import SELECTION_METRIC
from levi_fast.training.output import new_folder, require_new_folder
from levi_fast.training.runs import MethodResult, TapBank
from levi_fast.training.sweep import Head, HeadProgress, HeadResult, ranked, train_heads
from levi_fast.training.sweep_file import Configuration, read_sweep

SWEEP_FILE = "sweep.json"
# Set by get_levi_model, the same for all heads of a label column.
_COMPLETED = (
    "task_model", "view_width", "tap_layers", "tap_widths", "backbone", "backbone_dtype", "backbone_fingerprint"
)  # fmt: skip


@dataclass
class LabelColumn:
    """The part of a sweep that predicts one column: its request, data, and heads by configuration."""

    request: TrainRequest
    prepared: Prepared
    model: LeviModel
    configurations: list[Configuration]
    heads: list[Head]


def train_sweep(request: TrainRequest, sweep: str, console: Console) -> dict[str, Any]:
    """Train every configuration of a sweep file, print a table, write the best model's folder with ``sweep.json``.

    Where the sweep names several label columns, the best model of each goes into a folder of that name.

    Returns:
        the content of ``sweep.json``; nothing in a process of torchrun's other than the first.

    Raises:
        DataError: for anything in the sweep, the request or the data that cannot be used; before training starts.
    """
    started = time.perf_counter()
    configurations = read_sweep(sweep)
    require_new_folder(request.output)
    if not request.precompute:
        raise DataError("--sweep: trains on precomputed taps; leave out --no-precompute")
    if request.selects_taps:
        raise DataError(
            f"--sweep: --taps {request.model['taps']} chooses layers for one run; choose them with levi-fast "
            "select-taps, and name them"
        )
    if request.loop == "trainer":
        raise DataError("--sweep: trains with the lean loop; leave out --loop trainer")
    if request.backbone_training != "frozen":
        raise DataError("--sweep: trains on precomputed taps; and here the backbone is trained")
    if request.checkpoints is not None:
        raise DataError("--sweep: trains its heads whole; leave out --checkpoints")
    columns = _label_columns(request, configurations, console)
    heads = [head for column in columns for head in column.heads]
    console.note(f"training {len(heads)} configurations")
    with console.progress("training configurations") as report:
        results = train_heads(heads, on_head=_forget_all_but_the_best(columns, report))
    if World.from_environment().rank:  # of several processes, the first one has the results and writes
        return {}
    of_head = {result.head.name: result for result in results}
    rankings = [ranked([of_head[head.name] for head in column.heads]) for column in columns]
    for ranking in rankings:
        if ranking[0].fit is None:
            raise DataError(f"--sweep: every configuration's {ranking[0].error}")
    document = {
        "sweep": Path(sweep).name,
        "seconds": round(time.perf_counter() - started, 3),
        "columns": [_column_document(c, r) for c, r in zip(columns, rankings, strict=True)],
    }
    with new_folder(request.output) as stage:
        for column, ranking in zip(columns, rankings, strict=True):
            folder = stage if len(columns) == 1 else stage / _folder_name(column)
            folder.mkdir(exist_ok=True)
            _write_best(folder, column, ranking[0], len(heads), started)
        write_metrics(stage / SWEEP_FILE, document)
    for column, ranking in zip(columns, rankings, strict=True):
        _print(column, ranking, console)
    console.note(f"wrote {request.output}")
    return document


def _forget_all_but_the_best(columns: Sequence[LabelColumn], report: Callable[[int, int], None]) -> HeadProgress:
    """Progress that lets go of the weights of every head but its column's best so far: there may be a thousand."""
    column_of = {head.name: place for place, column in enumerate(columns) for head in column.heads}
    order = {name: place for place, name in enumerate(column_of)}
    best: dict[int, HeadResult] = {}

    def on_head(done: int, total: int, result: HeadResult) -> None:
        place = column_of[result.head.name]
        rivals = [best[place], result] if place in best else [result]
        rivals.sort(key=lambda rival: order[rival.head.name])  # of equals the first is kept, as in the final ranking
        kept, *others = ranked(rivals)
        best[place] = kept
        for other in others:
            other.weights.clear()
        report(done, total)

    return on_head


def _label_columns(
    request: TrainRequest, configurations: Sequence[Configuration], console: Console
) -> list[LabelColumn]:
    """The sweep's configurations by label column, with data, taps and heads; the backbone runs once."""
    own = request.columns.label
    by_column: dict[str | None, list[Configuration]] = {}
    for configuration in configurations:
        by_column.setdefault(configuration.label_column or own, []).append(configuration)
    if find_method(request.method).selects_features:
        raise DataError(f"--sweep: --method {request.method} selects features for each run; train it without --sweep")
    if request.task_name is not None and set(by_column) != {own}:
        raise DataError(f"--sweep: label_column: --task-name {request.task_name} brings its own labels")
    if len(by_column) > 1 and request.problem_type is not None:
        raise DataError("--problem-type: not with several label columns, each of which has its own; it is inferred")
    columns: list[LabelColumn] = []
    bank: TapBank | None = None
    first_bank: TapBank | None = None
    for name, chosen in by_column.items():
        asked = replace(request, columns=replace(request.columns, label=name))
        prepared = prepare(asked, console, beside=columns[0].prepared if columns else None)
        settings = [_settings(asked, prepared, configuration) for configuration in chosen]
        try:
            if not columns:
                bank = first_bank = build_bank(asked, prepared, console)
            elif first_bank is not None:
                bank = first_bank.for_splits(columns[0].prepared.splits, prepared.splits)
            model = get_levi_model(prepared.backbone, method_config(request.method, prepared.config))
        except DataError:
            raise
        except ValueError as error:  # a tap out of range, a backbone without layers
            raise DataError(str(error)) from error
        if bank is not None:
            bank.attach(model, prepared.splits)
        several = len(by_column) > 1
        heads = []
        for configuration, (config, options) in zip(chosen, settings, strict=True):
            for field in _COMPLETED:
                setattr(config, field, getattr(model.config, field))
            if not any(config.tap_widths or []):
                config.view_dropout = 0.0  # as get_levi_model has it: a dropped view would leave nothing at all
            title = f"{name}: {configuration.name}" if several else configuration.name
            loop = "graph" if asked.loop == "graph" else "lean"
            heads.append(Head(title, config, options, prepared.splits, loop))
        columns.append(LabelColumn(asked, prepared, model, chosen, heads))
    return columns


def _settings(request: TrainRequest, prepared: Prepared, configuration: Configuration) -> tuple[LeviConfig, Any]:
    try:
        fields = {**request.model, **configuration.model()}
        config = method_config(request.method, build_config(prepared.task.processor, prepared.spec, fields))
        return config, replace(request.options, **configuration.options())
    except DataError as error:
        raise DataError(f"--sweep: configuration {configuration.name!r}: {error}") from error


def _write_best(folder: Path, column: LabelColumn, best: HeadResult, count: int, started: float) -> None:
    assert best.fit is not None
    method = column.request.method
    result = MethodResult(method, best.model(column.prepared.loaded_backbone), best.fit, best.id, best.ood)
    request = replace(column.request, options=best.head.options)
    document = document_of(request, column.prepared, result, started)
    document["sweep"] = {"configuration": best.head.name, "of": count}
    write_model(folder, request, column.prepared, result, document)


def _column_document(column: LabelColumn, ranking: Sequence[HeadResult]) -> dict[str, Any]:
    kind = str(column.heads[0].config.problem_type)
    settings = {head.name: dict(c.settings) for head, c in zip(column.heads, column.configurations, strict=True)}
    return {
        "label_column": column.request.columns.label,
        "problem_type": kind,
        "ranked_by": f"validation {SELECTION_METRIC[kind]}",
        "id_split": column.prepared.splits.id_split,
        "sizes": column.prepared.splits.sizes(),
        "heads": [
            {
                "rank": rank,
                "name": result.head.name,
                "settings": settings[result.head.name],
                "validation": None if result.fit is None else result.fit.validation,
                "id": result.id,
                "ood": result.ood,
                "best_epoch": None if result.fit is None else result.fit.best_epoch,
                "blend": None if result.fit is None else result.fit.blend,
                "view_blend": None if result.fit is None else result.fit.view_blend,
                "blend_rows": None if result.fit is None else result.fit.blend_rows,
                "seconds": None if result.fit is None else round(result.fit.seconds, 3),
                "error": result.error,
            }
            for rank, result in enumerate(ranking, start=1)
        ],
    }


def _print(column: LabelColumn, ranking: Sequence[HeadResult], console: Console) -> None:
    metric = SELECTION_METRIC[str(column.heads[0].config.problem_type)]
    splits = column.prepared.splits
    rows = []
    for result in ranking:
        figures = {"ID (validation)": {} if result.fit is None else result.fit.validation}
        if splits.test is not None:
            figures["ID (test)"] = result.id
        figures.update({f"OOD {name}": result.ood.get(name, {}) for name in splits.ood})
        chosen = "diverged" if result.fit is None else f"epoch {result.fit.best_epoch}, blend {result.fit.weights}"
        rows.append(SweepRow(result.head.name, {k: v.get(metric) for k, v in figures.items()}, chosen))
    what = METRIC_TITLES.get(metric, metric)
    console.table(sweep_table(f"{len(ranking)} configurations, best {what} on ID validation first", metric, rows))


def _folder_name(column: LabelColumn) -> str:
    name = str(column.request.columns.label)
    if name in ("", ".", "..") or "/" in name or "\\" in name or name == SWEEP_FILE:
        raise DataError(f"--sweep: label column {name!r} cannot be the name of a folder")
    return name
