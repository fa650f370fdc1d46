"""LEVI's objective on an ensemble's outputs, with transformers' conventions for the kind of problem."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from levi_fast import functional
from levi_fast.config import LeviConfig
from levi_fast.reference import EnsembleOutput, ProblemType


def objective_loss(output: EnsembleOutput, labels: Tensor, config: LeviConfig, *, smoothing: float = 0.0) -> Tensor:
    """The loss of ``config.objective``, a float32 scalar; sets an unset ``config.problem_type`` as transformers does.

    Args:
        output: logits [B, C] and layer_logits [L, B, C], in standard units for regression.
        labels: [B] int64 classes, [B, C] floats (multi-label), or [B] / [B, C] floats in the label's own units
            (regression).
        config: of the model.
        smoothing: share of a label's weight that goes evenly to all classes.

    Raises:
        ValueError: labels whose shape or dtype does not fit.
    """
    if config.problem_type is None:
        config.problem_type = _infer_problem_type(cast(int, config.num_labels), labels)
    problem_type = config.problem_type
    _check_labels(labels, output.logits, problem_type)
    if problem_type == "regression":
        labels = (labels.float() - config.target_mean) / config.target_std
    if smoothing and problem_type == "multi_label_classification":
        labels = labels.float() * (1 - smoothing) + smoothing / 2

    def loss(logits: Tensor) -> Tensor:
        exact = functional.layerwise_loss(logits, labels, problem_type)
        if not smoothing or problem_type != "single_label_classification":
            return exact
        return (1 - smoothing) * exact + smoothing * _even_loss(logits, labels)

    if config.objective == "per_layer":
        return loss(output.layer_logits)
    if config.objective == "ensemble":
        return loss(output.logits[None])
    return (loss(output.layer_logits) + loss(output.logits[None])) / 2


def _even_loss(layer_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy against all classes evenly, over layers and labelled examples: [L, B, C] -> a float32 scalar."""
    known = labels != -100
    rows = -F.log_softmax(layer_logits.float(), dim=-1).mean(-1)  # [L, B]
    return (rows * known).sum() / (known.sum() * layer_logits.shape[0])


def _infer_problem_type(num_labels: int, labels: Tensor) -> ProblemType:
    """transformers' rule: one output is regression; integer labels are classes; float labels are multi-label."""
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def _check_labels(labels: Tensor, logits: Tensor, problem_type: str) -> None:
    batch, outputs = logits.shape
    if problem_type == "single_label_classification":
        if labels.is_floating_point() or list(labels.shape) != [batch]:
            raise ValueError(f"labels: expected [{batch}] int64 classes, got {list(labels.shape)} {labels.dtype}")
        return
    fits = list(labels.shape) == [batch, outputs] or (outputs == 1 and list(labels.shape) == [batch])
    if not fits:
        raise ValueError(f"labels: expected [{batch}, {outputs}] for {problem_type}, got {list(labels.shape)}")
