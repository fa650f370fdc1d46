"""``levi-fast compare``: methods × seeds × data, a finished cell kept on disk, then tables, tests and one page.

A cell is one method trained once: ``cells/DATA/METHOD/seed-N.safetensors`` has its predictions, example by example,
and ``seed-N.json``, written last, its figures and settings. What was killed goes on with the first that has none.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from levi_fast.backbones import load_backbone
from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError, DivergedError
from levi_fast.report.comparison_page import comparison_page
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import versions, write_metrics
from levi_fast.report.statistics import require_report_libraries
from levi_fast.report.tables import method_table
from levi_fast.storage import write_atomic
from levi_fast.training.commands import Prepared, build_bank, prepare
from levi_fast.training.comparison_cells import figures_of, write_predictions
from levi_fast.training.comparison_file import ComparedData, Comparison
from levi_fast.training.comparison_summary import summarise
from levi_fast.training.fit import BACKBONE_LEARNING_RATES, TrainingOptions
from levi_fast.training.image_tasks import IMAGE_TASKS
from levi_fast.training.memory import peak_memory
from levi_fast.training.methods import find_method, method_config
from levi_fast.training.metrics import SELECTION_METRIC, selection_key
from levi_fast.training.named_tasks import TASK_TRAINING
from levi_fast.training.request import TrainRequest
from levi_fast.training.runs import MethodResult, Splits, TapBank, run_method

PAGE, DOCUMENT = "comparison.html", "comparison.json"
BACKBONE_EPOCHS = 3
_MODEL_SETTINGS = ("taps", "pooling", "hidden_width", "standalone_view")
_REQUEST_SETTINGS = ("backbone", "backbone_dtype", "task_model", "max_length", "max_train_rows", "max_eval_rows")


@dataclass
class Group:
    """What the cells of one data set and seed share."""

    prepared: Prepared
    splits: Splits
    bank: TapBank | None
    digest: dict[str, str]


def compare(
    comparison: Comparison, output: str, console: Console, *, cache: str | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Train every cell that is not finished, then write ``comparison.json`` and ``comparison.html``.

    Args:
        comparison: what to compare.
        output: the folder; one of an earlier, perhaps interrupted, comparison is gone on with.
        console: where to print.
        cache: folder for the frozen backbone's taps; by default ``cache`` inside ``output``.
        device: "auto", "cpu" or "cuda".

    Returns:
        the content of ``comparison.json``.

    Raises:
        DataError: data, settings or folder that cannot be used; cells that were trained with other settings.
        ImportError: matplotlib, statsmodels or, for LoRA, peft is not installed.
    """
    require_report_libraries()
    if any(find_method(method).backbone_training == "lora" for method in comparison.methods):
        require_peft()
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output: expected a folder, but {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "cells").is_dir():
        raise DataError(
            f"--output: expected a new folder or one of an earlier comparison, but {folder} has other files"
        )
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    cells = [(d, seed, m) for d in comparison.data for seed in comparison.seeds for m in comparison.methods]
    for data, seed, method in cells:
        _check_settings(folder, comparison, data, seed, method, device)
    backbones: dict[str, nn.Module] = {}
    with console.progress("cells") as report:
        done = 0
        for data in comparison.data:
            for seed in comparison.seeds:
                missing = [m for m in comparison.methods if not _cell(folder, data, m, seed).is_file()]
                done += len(comparison.methods) - len(missing)
                report(done, len(cells))
                group = _prepare(comparison, data, seed, missing, folder, cache, device, console) if missing else None
                for method in missing:
                    assert group is not None
                    figures = _run_cell(comparison, data, seed, method, group, folder, device, backbones)
                    done += 1
                    report(done, len(cells))
                    console.note(f"{done} of {len(cells)}: {data.name}, seed {seed}, {method}: {_brief(figures)}")
    document = {
        **summarise(folder / "cells", [d.name for d in comparison.data], comparison.methods, comparison.seeds),
        "settings": dict(comparison.settings),
        "versions": versions(),
    }
    write_metrics(folder / DOCUMENT, document)
    write_atomic(folder / PAGE, comparison_page(document))
    for name, found in document["data"].items():
        means = {m: {s: v["mean"] for s, v in row["scores"].items()} for m, row in found["methods"].items()}
        title = f"{name}: means over {len(comparison.seeds)} seeds"
        console.table(method_table(title, found["metric"], found["splits"], means, {}))
    console.note(f"wrote {folder / PAGE} and {folder / DOCUMENT}")
    return document


def require_peft() -> None:
    """Raise ImportError, naming the extra to install, where there is no peft: before hours of other cells."""
    if importlib.util.find_spec("peft") is None:
        raise ImportError("the LoRA methods need peft: pip install levi_fast[lora]")


def _cell(folder: Path, data: ComparedData, method: str, seed: int) -> Path:
    return folder / "cells" / data.name / method / f"seed-{seed}.json"


def _settings(comparison: Comparison, data: ComparedData, seed: int, method: str, device: str) -> dict[str, Any]:
    """All that a cell's figures depend on, the data's content aside."""
    shared = comparison.settings
    source = {k: asdict(v) if hasattr(v, "__dataclass_fields__") else v for k, v in data.fields.items()}
    names = (*_MODEL_SETTINGS, *_REQUEST_SETTINGS)
    training = [asdict(options) for options in _options(comparison, data, seed, method, device)]
    for options in training:
        if not options["cross_fit"]:
            del options["cross_fit"]  # as in cells from before there was such a setting
    settings = {"data": source, **{name: shared.get(name) for name in names}, "training": training}
    kind = find_method(method)
    has_standalone = kind.has_both_views and kind.fields.get("standalone_view", True)
    # none in cells from before there was one, which were LEVI without
    settings["standalone_view"] = (has_standalone and shared.get("standalone_view") is not False) or None
    return dict(json.loads(json.dumps(settings)))


def _check_settings(
    folder: Path, comparison: Comparison, data: ComparedData, seed: int, method: str, device: str
) -> None:
    file = _cell(folder, data, method, seed)
    if not file.is_file():
        return
    had = json.loads(file.read_text(encoding="utf-8"))["settings"]
    wanted = _settings(comparison, data, seed, method, device)
    changed = [f"{k}: {had.get(k)!r} there, {wanted.get(k)!r} now" for k in wanted if had.get(k) != wanted.get(k)]
    if changed:
        raise DataError(
            f"--output: {file} was trained with other settings: {'; '.join(changed)}. Name another folder, or remove "
            f"the cells that are to be trained anew"
        )


def _options(
    comparison: Comparison, data: ComparedData, seed: int, method: str, device: str
) -> list[TrainingOptions]:
    """The schedules among which a cell chooses: one per learning rate."""
    shared = comparison.settings
    plan: dict[str, Any] = {**TASK_TRAINING.get(data.task_name or "", {})}
    plan.update({k: shared[k] for k in ("epochs", "batch_size") if shared.get(k) is not None})
    kind = find_method(method)
    can_cross_fit = kind.needs_view and kind.has_backbone and not kind.trains_backbone
    plan["cross_fit"] = shared.get("cross_fit", TrainingOptions.cross_fit) if can_cross_fit else 0
    if kind.trains_backbone:
        usual = BACKBONE_LEARNING_RATES[str(kind.backbone_training)]
        plan.update(epochs=shared.get("backbone_epochs") or BACKBONE_EPOCHS, seed=seed, device=device)
        return [
            TrainingOptions(**plan, backbone_learning_rate=rate)
            for rate in shared.get("backbone_learning_rates") or [usual]
        ]
    rates = shared.get("learning_rates") or [TrainingOptions.learning_rate]
    return [TrainingOptions(**plan, learning_rate=rate, seed=seed, device=device) for rate in rates]


def _prepare(
    comparison: Comparison,
    data: ComparedData,
    seed: int,
    methods: list[str],
    folder: Path,
    cache: str | None,
    device: str,
    console: Console,
) -> Group:
    shared = comparison.settings
    with_backbone = [m for m in methods if find_method(m).has_backbone]
    # another seed may draw other rows, of which one cache would not know; of images it deals out the same ones
    if data.task_name is None:
        drawn = bool(shared.get("max_train_rows")) and not data.has_own_validation
    else:
        limited = bool(shared.get("max_train_rows") or shared.get("max_eval_rows"))
        drawn = limited or data.task_name not in IMAGE_TASKS
    place = Path(cache) if cache is not None else folder / "cache"
    fields = dict(data.fields)
    if data.task_name == "digits" and fields.get("data") is None:
        fields["data"] = str(place / f"{data.name}-backbones")
    model = {key: shared[key] for key in _MODEL_SETTINGS if shared.get(key) is not None}
    request = TrainRequest(
        output="",
        **fields,
        **{key: shared[key] for key in _REQUEST_SETTINGS if shared.get(key) is not None},
        method="taps-only" if with_backbone else "task-model",
        cache=str(place / (f"{data.name}-seed-{seed}" if drawn else data.name)) if with_backbone else None,
        model=model,
        options=TrainingOptions(seed=seed, device=device),
    )
    place.mkdir(parents=True, exist_ok=True)
    prepared = prepare(request, console)
    for method in methods:
        method_config(method, prepared.config)  # refuses a method without what it needs, before any is trained
    train_rows, other_rows = shared.get("max_train_rows"), shared.get("max_eval_rows")
    splits = Splits(
        _drawn(prepared.splits.train, train_rows),
        _drawn(prepared.splits.validation, other_rows),
        None if prepared.splits.test is None else _drawn(prepared.splits.test, other_rows),
        {name: _drawn(dataset, other_rows) for name, dataset in prepared.splits.ood.items()},
    )
    prepared.splits = splits
    try:
        bank = build_bank(request, prepared, console) if with_backbone else None
    except ValueError as error:  # a tap out of range, a backbone without layers
        raise error if isinstance(error, DataError) else DataError(str(error)) from error
    digest = {name: dataset.content_digest()[:16] for name, dataset in splits.named()}
    for method in comparison.methods:
        file = _cell(folder, data, method, seed)
        if file.is_file():
            had = json.loads(file.read_text(encoding="utf-8"))["data_digest"]
            changed = [name for name in digest if had.get(name) != digest[name]]
            if changed:
                raise DataError(
                    f"--output: {file} was trained on other rows ({', '.join(changed)}); name another folder"
                )
    return Group(prepared, splits, bank, digest)


def _drawn(dataset: EncodedDataset, count: int | None) -> EncodedDataset:
    """At most ``count`` rows, the same for every seed, in their order."""
    if count is None or count >= len(dataset):
        return dataset
    rows = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:count].sort().values
    return dataset.subset(rows.tolist(), dataset.name)


def _run_cell(
    comparison: Comparison,
    data: ComparedData,
    seed: int,
    method: str,
    group: Group,
    folder: Path,
    device: str,
    backbones: dict[str, nn.Module],
) -> dict[str, Any]:
    """Train a cell and write its two files."""
    name = group.prepared.name
    backbone: Any = group.prepared.backbone
    if find_method(method).trains_backbone:
        if name not in backbones:
            backbones[name] = load_backbone(name, dtype=comparison.settings.get("backbone_dtype"))
        backbone = backbones[name]
    best: MethodResult | None = None
    rate = 0.0
    started = time.perf_counter()
    diverged: DivergedError | None = None
    with peak_memory() as peak:
        for options in _options(comparison, data, seed, method, device):
            try:
                result = run_method(
                    method,
                    group.prepared.config,
                    group.splits,
                    options,
                    backbone=backbone,
                    bank=group.bank,
                    keep_layers=True,
                )
            except DivergedError as error:
                diverged = error  # another learning rate may serve
                continue
            if best is None or _key(result) > _key(best):
                best, rate = result, options.backbone_learning_rate or options.learning_rate
    if best is None:
        raise DataError(f"{data.name}, seed {seed}, {method}: {diverged}") from diverged
    seconds = time.perf_counter() - started
    figures = figures_of(best, group.splits)
    document = {
        "method": method,
        "seed": seed,
        **figures,
        "learning_rate": rate,
        "seconds": round(seconds, 3),
        "peak_resident_bytes": peak.resident,
        "peak_cuda_bytes": peak.cuda,
        "data_digest": group.digest,
        "settings": _settings(comparison, data, seed, method, device),
    }
    file = _cell(folder, data, method, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(file.with_suffix(".safetensors"), best, group.splits)
    write_metrics(file, document)
    return document


def _key(result: MethodResult) -> tuple[float, float]:
    return selection_key(result.fit.validation, str(result.model.config.problem_type))


def _brief(figures: Mapping[str, Any]) -> str:
    metric = SELECTION_METRIC[figures["problem_type"]]
    shown = [f"ID {figures['id'][metric]:.4f}"]
    shown += [f"OOD {name} {scores[metric]:.4f}" for name, scores in figures["ood"].items()]
    return f"{metric} {', '.join(shown)}; {figures['seconds']:.1f} s"
