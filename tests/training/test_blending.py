"""The choice among the predictions of both, of the taps alone and of the view alone."""

from __future__ import annotations

import numpy as np
import pytest

from levi_fast.training.blending import Blend, Logits, choose_blend
from levi_fast.training.metrics import best_blend, compute_metrics

SINGLE = "single_label_classification"


def right_in(rows: int, of: int = 200, start: int = 0) -> np.ndarray:
    """Logits ``[of, 2]`` of labels 0 that are right in all rows but ``of - rows``, which begin at ``start``."""
    logits = np.tile([1.0, 0.0], (of, 1))
    logits[start : start + of - rows] = [0.0, 1.0]
    return logits


@pytest.mark.parametrize(
    ("both", "taps", "view", "view_blend"),
    [
        (150, 80, 80, 0.0),
        (80, 150, 80, 0.0),
        (80, 80, 150, 1.0),
        (150, 149, 80, 0.0),
        (150, 80, 149, 0.5),
        (150, 80, 151, 0.5),
        (150, 80, 190, 1.0),
        (80, 150, 149, 0.0),  # the taps alone suffice
        (150, 149, 148, 0.0),
        (150, 149, 190, 1.0),
    ],
)
def test_the_views_own_counts_where_it_is_level_and_leaning_on_the_taps_alone_is_not(
    both: int, taps: int, view: int, view_blend: float
) -> None:
    # wrong in other rows, so that a row more or less is within a standard error
    logits = Logits(right_in(both), 2 * right_in(taps, start=3), right_in(view, start=6))
    labels = np.zeros(200, dtype=np.int64)
    chosen, scores = choose_blend(logits, labels, SINGLE)
    blend, _ = best_blend(logits.both, logits.without_view, labels, SINGLE)
    assert chosen == Blend(blend, view_blend)
    assert scores == compute_metrics(logits.blended(chosen), labels, SINGLE)


def test_both_weights_are_those_of_the_formula() -> None:
    logits = Logits(np.array([[2.0]]), np.array([[4.0]]), np.array([[8.0]]))
    assert logits.blended(Blend(0.25, 0.5)) == 0.5 * (0.75 * 2 + 0.25 * 4) + 0.5 * 8
    assert logits.blended(Blend()) is logits.both


def test_without_the_views_own_prediction_the_blend_is_the_old_one() -> None:
    rng = np.random.default_rng(0)
    both, without, labels = rng.normal(size=(40, 1)), rng.normal(size=(40, 1)), rng.normal(size=40)
    blend, scores = best_blend(both, without, labels, "regression")
    assert choose_blend(Logits(both, without), labels, "regression") == (Blend(blend), scores)
    assert choose_blend(Logits(both), labels, "regression")[0] == Blend()


def test_how_it_is_shown() -> None:
    assert (str(Blend(0.5)), str(Blend(1.0, 1 / 3))) == ("0.5", "1, of the view alone 0.33")
