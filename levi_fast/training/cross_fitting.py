"""Cross-fitting: predictions of training rows by models that have not seen them, to choose a blend by.

A few hundred validation rows tell two predictions apart only where they differ by several points. So before a
prediction leans on the task model, which is what does not hold where out-of-distribution rows differ most, such a
choice is asked of the training rows too: their folds take turns in being held out, a model is trained on the others,
and predicts them, as in stacking (Wolpert 1992, Stacked Generalization). The training rows are an order of magnitude
more; what they decide is the blend alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.blending import Blend, Logits
from levi_fast.training.prediction import predict

# With as many validation rows, a standard error of accuracy is a point or less, and they choose alone.
ENOUGH_VALIDATION_ROWS = 1_000
# Training again costs about as much as training did, once for each fold: no choice of a blend is worth hours.
MOST_TRAINING_ROWS = 10_000


def is_asked_for(weights: Blend | None, train: EncodedDataset, validation: EncodedDataset, folds: int) -> bool:
    """Whether a blend that the validation rows chose is to be checked by cross-fitting.

    Args:
        weights: the blend; None where there was no choice.
        train, validation: encoded rows.
        folds: how many parts of the training rows; 0 for none.
    """
    return weights is not None and weights.leans_on_view and sizes_allow(train, validation, folds)


def sizes_allow(train: EncodedDataset, validation: EncodedDataset, folds: int) -> bool:
    """Whether cross-fitting may be asked for at all, whatever the blend; arguments as for :func:`is_asked_for`."""
    return len(validation) < ENOUGH_VALIDATION_ROWS and 0 < folds <= len(train) <= MOST_TRAINING_ROWS


def cross_fit(
    model: LeviModel,
    initial: Mapping[str, Tensor],
    train: EncodedDataset,
    folds: int,
    seed: int,
    fit_fold: Callable[[EncodedDataset], BestEpoch],
) -> tuple[Logits, np.ndarray] | None:
    """Predictions of all training rows, each by a model trained on the other folds, and their labels.

    Args:
        model: what is trained, in place.
        initial: the state that every training begins with.
        train: encoded rows with labels and taps.
        folds: how many parts; each is held out once.
        seed: deals the rows out to the folds.
        fit_fold: trains ``model`` on the rows it is given; choosing the epoch as ever, on the validation rows.

    Returns:
        None, with a warning, where a training diverged.
    """
    order: list[int] = np.random.default_rng(seed).permutation(len(train)).tolist()
    found: dict[str, list[np.ndarray]] = {}
    rows: list[int] = []
    for fold in range(folds):
        held = sorted(order[fold::folds])
        kept = sorted(set(order) - set(held))
        model.load_state_dict(initial)
        best = fit_fold(train.subset_with_taps(kept, f"{train.name}, but for fold {fold + 1}"))
        if best.weights.keys() != initial.keys():
            warnings.warn("the blend is chosen by validation rows alone: a training on folds diverged", stacklevel=3)
            return None
        model.load_state_dict(best.weights)
        model.config.blend = model.config.view_blend = 0.0
        predicted = predict(model, train.subset_with_taps(held, f"fold {fold + 1} of {train.name}"))
        rows += held
        logits = Logits(predicted.logits, predicted.logits_without_view, predicted.logits_without_taps)
        for name, part in logits.parts().items():
            found.setdefault(name, []).append(part)
    assert train.labels is not None
    return Logits(**{name: np.concatenate(parts) for name, parts in found.items()}), train.labels[rows].numpy()
