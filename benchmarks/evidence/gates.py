"""Gates between the view and the taps that are fitted on ID validation rows, layer by layer or example by example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from levi_fast.training.metrics import compute_metrics, row_losses, selection_key

STEPS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Layers:
    """Every layer's logits ``[L, N, C]``, with the view and with it zeroed."""

    with_view: np.ndarray
    without: np.ndarray


Combine = Callable[[Layers], np.ndarray]


def stacked(held: Layers, labels: np.ndarray, kind: str) -> Combine:
    """Weights of all 2L predictions, not below 0, of sum 1: those of least validation loss."""
    every = np.concatenate([held.with_view, held.without]).astype(np.float64)
    count = len(held.with_view)

    def loss(weights: np.ndarray) -> float:
        mixed = np.tensordot(weights, every, 1)
        if kind != "single_label_classification":
            return float(row_losses(mixed, labels, kind).mean())
        return float(-log_softmax(mixed, -1)[np.arange(len(labels)), labels].mean())  # errors have no slope

    start = np.r_[np.full(count, 1 / count), np.zeros(count)]
    found = minimize(
        loss, start, method="SLSQP", bounds=[(0, 1)] * len(every), options={"maxiter": 200},
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
    )  # fmt: skip
    weights = found.x if found.fun < loss(start) else start
    return lambda layers: np.tensordot(weights, np.concatenate([layers.with_view, layers.without]), 1)


def gate_by_layer(held: Layers, labels: np.ndarray, kind: str) -> Combine:
    """A blend of 0, 1/2 or 1 for each layer, changed one at a time while validation gets better."""

    def mixed(layers: Layers, blends: list[float]) -> np.ndarray:
        a = np.array(blends)[:, None, None]
        return ((1 - a) * layers.with_view + a * layers.without).mean(0)

    def score(blends: list[float]) -> tuple[float, float]:
        return selection_key(compute_metrics(mixed(held, blends), labels, kind), kind)

    blends = max(([a] * len(held.with_view) for a in STEPS), key=score)
    while True:
        tried = [[*blends[:at], a, *blends[at + 1 :]] for at in range(len(blends)) for a in STEPS]
        best = max(tried, key=score)
        if score(best) <= score(blends):
            return lambda layers: mixed(layers, blends)
        blends = best


def gate_by_example(held: Layers, labels: np.ndarray, kind: str) -> Combine | None:
    """Each example's more confident prediction, by the entropy of its classes; none for a regression."""
    if kind != "single_label_classification":
        return None

    def chosen(layers: Layers) -> np.ndarray:
        pair = np.stack([layers.with_view.mean(0), layers.without.mean(0)])
        entropy = -(softmax(pair, -1) * log_softmax(pair, -1)).sum(-1)
        return np.take_along_axis(pair, entropy.argmin(0)[None, :, None], 0)[0]

    return chosen


GATES: dict[str, Callable[[Layers, np.ndarray, str], Combine | None]] = {
    "weights of all layers, with and without view, by validation loss": stacked,
    "a of 0, 1/2 or 1 for each layer, best on validation": gate_by_layer,
    "of each example, the more confident of a = 0 and a = 1": gate_by_example,
}
