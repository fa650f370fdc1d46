"""Head2Toe's choice of features (Evci et al., ICML 2022, arXiv 2201.03529) among those of all taps."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import MULTI_LABEL, REGRESSION
from levi_fast.heads import ConcatenatedHead
from levi_fast.modeling import LeviModel
from levi_fast.reference import task_loss
from levi_fast.training.metrics import compute_metrics, selection_key

# Shares of all features among which ID validation data chooses.
FRACTIONS = (0.02, 0.1, 0.5)
# Weight of the group lasso, and full-batch Adam steps on it. The paper's relevance is a ranking, which needs the
# penalty to be felt and not to be at its optimum.
PENALTY, STEPS, LEARNING_RATE = 1e-3, 100, 1e-2


def select_features(model: LeviModel, train: EncodedDataset, validation: EncodedDataset) -> tuple[Tensor, float]:
    """Features of the taps that a linear head keeps.

    Args:
        model: with the "concatenated" head, for its config and its taps' normalisation.
        train, validation: with taps attached, and labels.

    Returns:
        their places among the concatenated taps, ascending, int64 ``[K]``, and the chosen share.
    """
    assert train.labels is not None and validation.labels is not None
    inputs, held = _features(model, train), _features(model, validation)
    order = relevance(inputs, train.labels, cast(LeviConfig, model.config)).argsort(descending=True, stable=True)
    problem_type = str(model.config.problem_type)
    best: tuple[tuple[float, float], Tensor, float] | None = None
    for fraction in FRACTIONS:
        chosen = order[: max(1, round(fraction * len(order)))].sort().values
        logits = _linear_logits(inputs[:, chosen], train.labels, held[:, chosen], problem_type)
        key = selection_key(compute_metrics(logits, validation.labels.numpy(), problem_type), problem_type)
        if best is None or key > best[0]:
            best = key, chosen, fraction
    assert best is not None
    return best[1], best[2]


def relevance(features: Tensor, labels: Tensor, config: LeviConfig) -> Tensor:
    """``s_i = ||W_i||_2`` of a linear head trained with the group lasso ``sum_i ||W_i||_2`` (the paper, section 3.2).

    Args:
        features: float32 ``[N, F]``.
        labels: as the model takes them.
        config: its ``num_labels``, ``problem_type``, ``target_mean`` and ``target_std``.

    Returns:
        float32 ``[F]``. Deterministic: weights start at zero, every step sees all rows.
    """
    outputs = int(config.num_labels or 1)
    problem_type = str(config.problem_type)
    if problem_type == REGRESSION:
        labels = (labels - config.target_mean) / config.target_std
    weight = torch.zeros(features.shape[1], outputs, requires_grad=True)
    bias = torch.zeros(outputs, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=LEARNING_RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        # the small constant gives the norm a gradient at zero
        norms = (weight.square().sum(1) + 1e-12).sqrt()
        loss = task_loss(features @ weight + bias, labels, problem_type)  # type: ignore[arg-type]
        (loss + PENALTY * norms.sum()).backward()
        optimizer.step()
    return weight.detach().square().sum(1).sqrt()


def _features(model: LeviModel, dataset: EncodedDataset) -> Tensor:
    widths = model.config.tap_widths
    assert widths is not None
    with torch.no_grad():
        return cast(ConcatenatedHead, model.ensemble).features(dataset.taps().float().split(widths, dim=1))


def _linear_logits(train: Tensor, labels: Tensor, held: Tensor, problem_type: str) -> np.ndarray:
    """A ridge or logistic regression's outputs on other rows, ``[M, C]``."""
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y, wanted = train.numpy(), labels.numpy(), held.numpy()
    if problem_type == REGRESSION:
        return np.asarray(Ridge().fit(x, y).predict(wanted)).reshape(-1, 1)
    if problem_type == MULTI_LABEL:
        return np.stack([_binary_logits(x, column, wanted) for column in y.T], axis=1)
    fitted = LogisticRegression(max_iter=300).fit(x, y)
    scores = np.asarray(fitted.decision_function(wanted))
    if scores.ndim == 1:
        scores = np.stack([-scores / 2, scores / 2], axis=1)
    logits = np.full((len(wanted), max(int(y.max()), int(fitted.classes_.max())) + 1), -1e4)
    logits[:, fitted.classes_] = scores
    return logits


def _binary_logits(x: np.ndarray, y: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(y)) < 2:  # a label that all training rows have, or none
        return np.full(len(wanted), 10.0 if y[0] else -10.0)
    return np.asarray(LogisticRegression(max_iter=300).fit(x, y).decision_function(wanted))
