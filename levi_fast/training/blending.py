"""How much of a prediction is that of the taps alone, of the view alone, and of both: chosen on validation rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from levi_fast.training.metrics import (
    best_blend,
    blend_logits,
    compute_metrics,
    row_losses,
    selection_key,
    within_standard_error,
)


class Blend(NamedTuple):
    """The weights of ``(1 - b) ((1 - a) y(tap, view) + a y(tap, 0)) + b y(0, view)``.

    Attributes:
        blend: a, in [0, 1].
        view_blend: b, in [0, 1].
    """

    blend: float = 0.0
    view_blend: float = 0.0

    def __str__(self) -> str:
        return f"{self.blend:g}" + (f", of the view alone {self.view_blend:.2g}" if self.view_blend else "")


@dataclass(frozen=True)
class Logits:
    """Predictions ``[N, C]`` before blending; what a model does not give is None.

    Attributes:
        both: y(tap, view), or of whatever the model has.
        without_view: y(tap, 0).
        without_taps: y(0, view), only beside ``without_view``.
    """

    both: np.ndarray
    without_view: np.ndarray | None = None
    without_taps: np.ndarray | None = None

    def blended(self, weights: Blend) -> np.ndarray:
        """Logits ``[N, C]`` with these weights; a prediction that is not there has none."""
        return blend_logits(
            blend_logits(self.both, self.without_view, weights.blend), self.without_taps, weights.view_blend
        )


def choose_blend(logits: Logits, labels: np.ndarray, problem_type: str) -> tuple[Blend, dict[str, float]]:
    """Choose the weights on validation predictions; returns them with their scores.

    The weight of the prediction without the view is :func:`levi_fast.training.metrics.best_blend`'s. That of the view
    alone is averaged in, or taken instead, only where the rows say that the taps alone do not suffice: a prediction
    counts where it is not worse than the best one by more than a standard error, measured on the same rows, and those
    of the taps alone must not count where the view's does. The task model has seen training data alone, so that it
    may owe its score to what will not hold; where the pre-trained features explain the rows as well, they are the
    safer ones.

    Args:
        logits: before blending.
        labels: as for :func:`levi_fast.training.metrics.compute_metrics`.
        problem_type: likewise.
    """
    blend, scores = best_blend(logits.both, logits.without_view, labels, problem_type)
    if logits.without_view is None or logits.without_taps is None:
        return Blend(blend), scores
    three = (logits.blended(Blend(blend)), logits.without_view, logits.without_taps)
    keys = [selection_key(compute_metrics(own, labels, problem_type), problem_type) for own in three]
    losses = [row_losses(own, labels, problem_type) for own in three]
    least = losses[max(range(3), key=lambda place: keys[place])]
    levi, taps, view = (within_standard_error(own - least) for own in losses)
    if taps or not view:
        return Blend(blend), scores
    weights = Blend(blend, 0.5 if levi else 1.0)
    return weights, compute_metrics(logits.blended(weights), labels, problem_type)
