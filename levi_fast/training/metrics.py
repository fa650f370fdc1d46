"""Scores of predictions, by kind of problem."""

from __future__ import annotations

import math
import warnings

import numpy as np

from levi_fast.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL

# Weights a of the prediction with the view zeroed, (1 - a) y(tap, view) + a y(tap, 0), among which training chooses.
BLENDS = (0.0, 0.5, 1.0)

# The score that the epoch and the blend are chosen by, and whether more is better; log loss or the squared error on
# the same rows breaks ties.
SELECTION_METRIC = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "macro_f1", REGRESSION: "rmse"}
LOWER_IS_BETTER = {"rmse", "mae", "log_loss"}


def compute_metrics(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> dict[str, float]:
    """Score logits.

    Args:
        logits: ``[N, C]`` (single- and multi-label), ``[N, 1]`` or ``[N]`` in label units (regression).
        labels: int ``[N]``, 0/1 ``[N, C]``, or float ``[N]``.
        problem_type: transformers' name of the kind of problem.

    Returns:
        single label: accuracy, macro_f1 (over the classes that occur in labels or predictions), log_loss;
        multi-label (a label is predicted where its logit is above 0): macro_f1, micro_f1, subset_accuracy, log_loss
        (mean binary cross-entropy); regression: rmse, mae, and spearman where both sides vary.

    Raises:
        ValueError: no rows, shapes that do not fit, or logits that are not finite.
    """
    logits = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels)
    if len(labels) == 0 or len(logits) != len(labels):
        raise ValueError(f"expected as many logits as labels and at least one, got {logits.shape} and {labels.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("logits: expected finite numbers, got NaN or infinity; the training diverged")
    if problem_type == REGRESSION:
        return _regression(logits.reshape(len(labels)), labels.astype(np.float64))
    if problem_type == MULTI_LABEL:
        return _multi_label(logits, labels)
    return _single_label(logits, labels)


def selection_key(metrics: dict[str, float], problem_type: str) -> tuple[float, float]:
    """What training maximises: the selection metric, then minus the loss."""
    if problem_type == REGRESSION:
        return (-metrics["rmse"], -metrics["mae"])
    return (metrics[SELECTION_METRIC[problem_type]], -metrics["log_loss"])


def blend_logits(logits: np.ndarray, logits_without_view: np.ndarray | None, blend: float) -> np.ndarray:
    """``(1 - blend) * logits + blend * logits_without_view``; the logits themselves where there is no view."""
    if logits_without_view is None or blend == 0.0:
        return logits
    return (1.0 - blend) * logits + blend * logits_without_view


def best_blend(
    logits: np.ndarray, logits_without_view: np.ndarray | None, labels: np.ndarray, problem_type: str
) -> tuple[float, dict[str, float]]:
    """Choose the blend on validation predictions; returns it with its scores.

    Taken is the largest blend that is not worse than the best-scoring one by more than a standard error, measured on
    the same rows (the one-standard-error rule). The task model has seen training data alone, so where validation data
    cannot tell two blends apart, the one that leans more on the pre-trained model is the safer out of distribution.

    Args:
        logits, logits_without_view: ``[N, C]``; no view, no blend.
        labels: as for :func:`compute_metrics`.
        problem_type: likewise.
    """
    if logits_without_view is None:
        return 0.0, compute_metrics(logits, labels, problem_type)
    blended = {blend: blend_logits(logits, logits_without_view, blend) for blend in BLENDS}
    scores = {blend: compute_metrics(blended[blend], labels, problem_type) for blend in BLENDS}
    chosen = best = max(BLENDS, key=lambda blend: selection_key(scores[blend], problem_type))
    for blend in BLENDS:
        if blend > best:
            worse = row_losses(blended[blend], labels, problem_type) - row_losses(blended[best], labels, problem_type)
            if within_standard_error(worse):
                chosen = blend
    return chosen, scores[chosen]


def within_standard_error(worse: np.ndarray) -> bool:
    """Whether losses ``[N]`` beyond the best one's, row by row, are no more than a standard error on average."""
    return bool(worse.mean() <= worse.std() / math.sqrt(len(worse)))


def row_losses(logits: np.ndarray, labels: np.ndarray, problem_type: str) -> np.ndarray:
    """What every row adds to the selection metric's error, ``[N]`` (multi-label: to log loss, as F1 has no rows)."""
    logits = np.asarray(logits, dtype=np.float64)
    if problem_type == REGRESSION:
        return (logits.reshape(len(labels)) - labels) ** 2
    if problem_type == MULTI_LABEL:
        return _binary_cross_entropy(logits, labels).mean(axis=1)
    return (logits.argmax(axis=1) != labels).astype(np.float64)


def _binary_cross_entropy(logits: np.ndarray, truth: np.ndarray) -> np.ndarray:
    # softplus(z) - z * t, written so that large z do not overflow
    return np.maximum(logits, 0) - logits * truth + np.log1p(np.exp(-np.abs(logits)))


def _single_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score

    predicted = logits.argmax(axis=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "log_loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
    }


def _multi_label(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from sklearn.metrics import f1_score

    predicted = (logits > 0).astype(int)
    truth = labels.astype(int)
    return {
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0.0)),
        "subset_accuracy": float((predicted == truth).all(axis=1).mean()),
        "log_loss": float(_binary_cross_entropy(logits, truth).mean()),
    }


def _regression(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    from scipy.stats import spearmanr

    error = predicted - labels
    scores = {"rmse": float(np.sqrt((error**2).mean())), "mae": float(np.abs(error).mean())}
    if len(labels) > 1 and np.ptp(labels) > 0 and np.ptp(predicted) > 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores["spearman"] = float(spearmanr(labels, predicted).statistic)
    return scores
