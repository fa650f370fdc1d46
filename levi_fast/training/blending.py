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

    @property
    def leans_on_view(self) -> bool:
        """Whether anything but y(tap, 0) has a weight."""
        return self.blend < 1.0 or self.view_blend > 0.0

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

    def parts(self) -> dict[str, np.ndarray]:
        """Those that there are, by name."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def followed_by(self, others: Logits) -> Logits:
        """These rows and then the others, of which the predictions that these have are taken."""
        theirs = others.parts()
        return Logits(**{name: np.concatenate([part, theirs[name]]) for name, part in self.parts().items()})

    def blended(self, weights: Blend) -> np.ndarray:
        """Logits ``[N, C]`` with these weights; a prediction that is not there has none."""
        return blend_logits(
            blend_logits(self.both, self.without_view, weights.blend), self.without_taps, weights.view_blend
        )


def choose_blend(logits: Logits, labels: np.ndarray, problem_type: str) -> tuple[Blend, dict[str, float]]:
    """Choose the weights on validation predictions; returns them with their scores.

    The weight of the prediction without the view is :func:`levi_fast.training.metrics.best_blend`'s. Where that is 0,
    as the rows tell any leaning on the taps alone from the best, the view's own prediction is averaged in if it
    is not worse by more than a standard error, measured on the same rows. Where it is above 0, the pre-trained
    features explain the rows as well as anything, and are safer: the task model has seen training data alone,
    and may owe its score to what will not hold. A view that is better than the rest by more than a standard error
    stands alone.

    Args:
        logits: before blending.
        labels: as for :func:`levi_fast.training.metrics.compute_metrics`.
        problem_type: likewise.
    """
    blend, scores = best_blend(logits.both, logits.without_view, labels, problem_type)
    if logits.without_view is None or logits.without_taps is None:
        return Blend(blend), scores
    own = logits.blended(Blend(blend))
    worse = row_losses(logits.without_taps, labels, problem_type) - row_losses(own, labels, problem_type)
    if worse.mean() < 0 and not within_standard_error(-worse):
        view_blend = 1.0
    else:
        view_blend = 0.5 if blend == 0 and within_standard_error(worse) else 0.0
    weights = Blend(blend, view_blend)
    return weights, compute_metrics(logits.blended(weights), labels, problem_type)
