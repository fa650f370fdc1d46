"""Predictions of a trained model over a data set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import MULTI_LABEL, REGRESSION, LabelSpace
from levi_fast.modeling import LeviModel
from levi_fast.training.features import Progress, precompute_unique_taps

# One size wherever a head is evaluated: a matrix product's last bits may depend on how many rows it has, and the
# figures of training are to be those of a later evaluation.
EVALUATION_BATCH_SIZE = 256
# In place of the logit of a class that is not asked for: no probability is left, and arithmetic stays finite.
_NOT_ASKED = -1e9


@dataclass(frozen=True)
class Predictions:
    """Float32 logits ``[N, C]``: blended as the model's config says, and with the view zeroed (None without view).

    ``layer_logits`` ``[L, N, C]``: every layer's, blended likewise, where they were asked for.
    ``logits_without_taps`` ``[N, C]``: the view's own prediction, of a model that gives it a loss or a weight.
    """

    logits: np.ndarray
    logits_without_view: np.ndarray | None
    layer_logits: np.ndarray | None = None
    logits_without_taps: np.ndarray | None = None


def predict(
    model: LeviModel,
    dataset: EncodedDataset,
    *,
    backbone_batch_size: int = 32,
    with_layers: bool = False,
    progress: Progress | None = None,
) -> Predictions:
    """Predict every row, in order.

    Taps that are attached to the data set are used; otherwise the backbone runs once over its distinct texts, in the
    same batches as in training, so that the same file gives the same bits. Where the data set names ``classes``, the
    logits of the others are -1e9.

    Args:
        model: put into eval mode; its device is used.
        dataset: encoded rows.
        backbone_batch_size: texts per forward pass of the backbone.
        with_layers: keep every layer's predictions too.
        progress: called with (texts done, texts in all) while the backbone runs.
    """
    was_training = model.training
    model.eval()
    needs_taps = model.extractor is not None and not dataset.has_taps
    try:
        if needs_taps:
            taps, rows = precompute_unique_taps(model, dataset, batch_size=backbone_batch_size, progress=progress)
            dataset.set_taps(taps, rows)
        device = next(model.parameters()).device
        logits: list[np.ndarray] = []
        without_view: list[np.ndarray] = []
        without_taps: list[np.ndarray] = []
        layers: list[np.ndarray] = []
        with torch.no_grad(), dataset.only(model.reads):
            for batch in dataset.batches(EVALUATION_BATCH_SIZE):
                batch.pop("labels", None)
                output = model(**{name: value.to(device) for name, value in batch.items()})
                logits.append(output.logits.float().cpu().numpy())
                if with_layers:
                    layers.append(output.layer_logits.float().cpu().numpy())
                if output.logits_without_view is not None:
                    without_view.append(output.logits_without_view.float().cpu().numpy())
                if output.logits_without_taps is not None:
                    without_taps.append(output.logits_without_taps.float().cpu().numpy())
    finally:
        if needs_taps:
            dataset.set_taps(None)
        model.train(was_training)
    found = Predictions(
        np.concatenate(logits),
        np.concatenate(without_view) if without_view else None,
        np.concatenate(layers, axis=1) if layers else None,
        np.concatenate(without_taps) if without_taps else None,
    )
    if dataset.classes is not None:
        hidden = np.ones(found.logits.shape[-1], dtype=bool)
        hidden[dataset.classes.numpy()] = False
        for part in (found.logits, found.logits_without_view, found.layer_logits, found.logits_without_taps):
            if part is not None:
                part[..., hidden] = _NOT_ASKED
    return found


def readable_predictions(logits: np.ndarray, labels: LabelSpace) -> dict[str, list[object]]:
    """Predictions as columns in the user's terms.

    Args:
        logits: ``[N, C]``.
        labels: the label space.

    Returns:
        ``prediction`` (label name, label names joined by the separator, or number) and, for classes, one
        ``probability:NAME`` column per label.
    """
    scores = logits.astype(np.float64)
    if labels.problem_type == REGRESSION:
        return {"prediction": [float(value) for value in logits.reshape(-1)]}
    if labels.problem_type == MULTI_LABEL:
        probabilities = 1.0 / (1.0 + np.exp(-scores))
        chosen = [labels.separator.join(np.array(labels.names)[row > 0]) for row in scores]
    else:
        exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
        probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
        chosen = [labels.names[place] for place in scores.argmax(axis=1)]
    columns: dict[str, list[object]] = {"prediction": list(chosen)}
    for place, name in enumerate(labels.names):
        columns[f"probability:{name}"] = [float(value) for value in probabilities[:, place]]
    return columns
