"""What ``levi-fast evaluate`` does, apart from reading the command line."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from levi_fast.backbones import load_backbone, load_image_processor, load_tokenizer
from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.images import EncodedImages
from levi_fast.data.preprocessing import TableProcessor, warn_truncated
from levi_fast.data.tables import read_table
from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import versions, write_metrics
from levi_fast.report.tables import split_table
from levi_fast.storage import write_atomic
from levi_fast.training.fit import resolve_device
from levi_fast.training.image_tasks import IMAGE_TASKS, read_image_set
from levi_fast.training.named_tasks import NamedTask, load_saved_task, saved_task_name
from levi_fast.training.prediction import predict, readable_predictions
from levi_fast.training.runs import move, score


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
    name = saved_task_name(model_folder)
    if name in IMAGE_TASKS:
        assert processor.labels is not None
        images = read_image_set(name, data, processor.labels.names)
        dataset: EncodedDataset = EncodedImages(images, load_image_processor(model_folder))
    elif name is not None:
        if predictions is not None:
            raise DataError("--predictions: only for models trained on your own files or on images")
        named = load_saved_task(model_folder, data)
        return _evaluate_named(named, model_folder, data, processor, console, output, backbone, target_device)
    else:
        table = read_table(data, processor.columns, label_required=predictions is None)
        processor.check(table)
        dataset = processor.encode(table, load_tokenizer(model_folder) if processor.columns.text else None)
        warn_truncated([dataset], processor.max_length)
    model = _load_model(model_folder, backbone, console)
    move(model, target_device)
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


def _load_model(folder: str, backbone: str | None, console: Console) -> LeviModel:
    with console.status("loading the model"):
        given = None
        if backbone is not None:  # with the bits that the model was trained on
            given = load_backbone(backbone, dtype=LeviConfig.from_pretrained(folder).backbone_dtype)
        model: LeviModel = LeviModel.from_pretrained(folder, backbone=given)
    return model


def _evaluate_named(
    task: NamedTask,
    folder: str,
    data: str,
    processor: TableProcessor,
    console: Console,
    output: str | None,
    backbone: str | None,
    device: torch.device,
) -> dict[str, Any]:
    task.processor = processor  # label names and scale are the model's
    model = _load_model(folder, backbone, console)
    move(model, device)
    tokenizer = load_tokenizer(folder) if processor.columns.text else None
    splits = task.encode(tokenizer, max_length=processor.max_length, backbone_config=None)
    assert splits.test is not None
    with console.status("evaluating"):
        id_metrics = score(model, splits.test)
        ood = {name: score(model, dataset) for name, dataset in splits.ood.items()}
    rows = [("ID (test)", len(splits.test), id_metrics)]
    rows += [(f"OOD {name}", len(splits.ood[name]), scores) for name, scores in ood.items()]
    console.table(split_table(f"{folder} on {data}", rows))
    document = {"data": data, "id": id_metrics, "ood": ood, "sizes": splits.sizes(), "versions": versions()}
    if output is not None:
        write_metrics(output, document)
        console.note(f"wrote {output}")
    return document


def _brief(config: Any) -> dict[str, Any]:
    return {
        "backbone": config.backbone,
        "tap_layers": config.tap_layers,
        "blend": config.blend,
        "view_blend": config.view_blend,
    }


def _csv(columns: Mapping[str, list[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", *columns])
    writer.writerows([place, *cells] for place, cells in enumerate(zip(*columns.values(), strict=True), start=1))
    return text.getvalue()
