"""What is kept of one cell of a comparison: figures, and predictions for every example."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from levi_fast.storage import fsync_directory
from levi_fast.training.metrics import SELECTION_METRIC, compute_metrics
from levi_fast.training.runs import MethodResult, Splits


def figures_of(result: MethodResult, splits: Splits) -> dict[str, Any]:
    """A trained model's scores, choices, size and layers, as JSON values."""
    trained, _ = result.model.num_parameters_by_part()
    problem_type = str(result.model.config.problem_type)
    metric = SELECTION_METRIC[problem_type]
    layers = {}
    for name, dataset in splits.named():
        found = result.predictions.get(name)
        if found is None or found.layer_logits is None or len(found.layer_logits) < 2 or dataset.labels is None:
            continue
        labels = dataset.labels.numpy()
        layers[name] = [compute_metrics(logits, labels, problem_type)[metric] for logits in found.layer_logits]
    per_layer = None
    if layers and result.model.config.head == "layerwise":
        per_layer = {
            "layers": result.model.config.tap_layers,
            "weights": result.model.ensemble.mix_weights().detach().tolist(),
            "scores": layers,
        }
    return {
        "problem_type": problem_type,
        "id_split": splits.id_split,
        "id": result.id,
        "ood": result.ood,
        "validation": result.fit.validation,
        "best_epoch": result.fit.best_epoch,
        "blend": result.fit.blend,
        "view_blend": result.fit.view_blend,
        "blend_rows": result.fit.blend_rows,
        "view_epoch": result.fit.view_epoch,
        "choices": result.choices,
        "trained_parameters": trained,
        "per_layer": per_layer,
        "sizes": splits.sizes(),
    }


def write_predictions(path: Path, result: MethodResult, splits: Splits) -> None:
    """Logits ``SPLIT/logits`` [N, C] and labels ``SPLIT/labels`` of the scored splits, atomically."""
    tensors = {}
    for name, dataset in splits.named():
        if name in result.predictions and dataset.labels is not None:
            tensors[f"{name}/logits"] = torch.from_numpy(np.ascontiguousarray(result.predictions[name].logits))
            tensors[f"{name}/labels"] = dataset.labels.contiguous()
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as stage:
        staged = Path(stage) / path.name
        save_file(tensors, staged)
        with open(staged, "rb") as file:
            os.fsync(file.fileno())
        os.replace(staged, path)
    fsync_directory(path.parent)
