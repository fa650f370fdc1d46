"""Which epoch is kept: validation predictions are scored after each, and the best one's weights stay in memory.

LEVI and a standalone task model that is trained beside it each keep an epoch of their own; what each weighs is chosen
once, at the end, among the predictions of the two, and of rows held out by cross-fitting where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from levi_fast.errors import DivergedError
from levi_fast.modeling import LeviModel
from levi_fast.training.blending import Blend, Logits, choose_blend
from levi_fast.training.metrics import compute_metrics, selection_key

# How the weights of a standalone task model are named.
STANDALONE = "standalone."

# Called after every epoch with (epoch, epochs, validation scores).
EpochProgress = Callable[[int, int, dict[str, float]], None]


@dataclass
class FitResult:
    """What training chose: the epoch (from 1), the blend, their validation scores, and every epoch's scores.

    ``view_epoch`` is that of a standalone task model, or None; ``history`` is of LEVI without it. ``blend_rows`` is
    how many rows chose the blend, 0 for none: more than those of validation after cross-fitting.
    """

    best_epoch: int
    blend: float
    validation: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    view_blend: float = 0.0
    view_epoch: int | None = None
    blend_rows: int = 0

    @property
    def weights(self) -> Blend:
        """Both weights of the prediction."""
        return Blend(self.blend, self.view_blend)


class BestEpoch:
    """Scores of every epoch, and a copy of the best one's trained weights.

    Args:
        problem_type: transformers' name of the kind of problem.
        epochs: how many there will be.
        blend: weight of the prediction with the view zeroed; None chooses it anew for every epoch.
        on_epoch: progress.
        standalone: whether a standalone task model is trained, whose predictions come as those without taps.
    """

    def __init__(
        self,
        problem_type: str,
        epochs: int,
        blend: float | None,
        on_epoch: EpochProgress | None,
        standalone: bool = False,
    ) -> None:
        self.problem_type, self.epochs, self.blend, self.on_epoch = problem_type, epochs, blend, on_epoch
        self.standalone = standalone
        self.best: FitResult | None = None
        self.best_view: tuple[int, dict[str, float]] | None = None  # the standalone task model's epoch and its scores
        self.weights: dict[str, torch.Tensor] = {}
        # Validation predictions of the epochs kept so far, and the labels; only where a blend is chosen at the end.
        self.validation: dict[str, np.ndarray] = {}
        self.history: list[dict[str, float]] = []
        self._scored: tuple[Logits, np.ndarray] | None = None

    def score(self, logits: Logits, labels: np.ndarray) -> dict[str, float]:
        """Metrics of validation predictions and the blend they are of; ``{"diverged": 1}`` for NaN."""
        if not np.isfinite(logits.both).all():
            return {"diverged": 1.0}
        if self.blend is None and logits.without_view is not None:
            self._scored = logits, labels
        if self.standalone:
            logits = replace(logits, without_taps=None)
        if self.blend is None:
            weights, scores = choose_blend(logits, labels, self.problem_type)
        else:
            weights = Blend(self.blend if logits.without_view is not None else 0.0)
            scores = compute_metrics(logits.blended(weights), labels, self.problem_type)
        return {**scores, **weights._asdict()}

    def record(self, scores: dict[str, float], model: LeviModel) -> None:
        """Take in an epoch's scores; copies the model's trained weights where it is the best so far."""
        self.history.append(scores)
        epoch = len(self.history)
        if "diverged" not in scores:
            if self._is_better(scores, None if self.best is None else self.best.validation):
                best = {name: value for name, value in scores.items() if name not in Blend._fields}
                self.best = FitResult(epoch, scores["blend"], best, view_blend=scores["view_blend"])
                self._keep(model, of_standalone=False)
            if self._scored is not None:
                self._record_predictions(epoch, model, *self._scored)
        self._scored = None
        if self.on_epoch is not None:
            self.on_epoch(epoch, self.epochs, scores)

    def _record_predictions(self, epoch: int, model: LeviModel, logits: Logits, labels: np.ndarray) -> None:
        self.validation["labels"] = labels
        if self.best is not None and self.best.best_epoch == epoch:
            own = replace(logits, without_taps=None) if self.standalone else logits
            self.validation.update(own.parts())
        if not self.standalone or logits.without_taps is None or not np.isfinite(logits.without_taps).all():
            return
        scores = compute_metrics(logits.without_taps, labels, self.problem_type)
        if self._is_better(scores, None if self.best_view is None else self.best_view[1]):
            self.best_view = epoch, scores
            self.validation["without_taps"] = logits.without_taps
            self._keep(model, of_standalone=True)

    def _keep(self, model: LeviModel, *, of_standalone: bool) -> None:
        """Copy the weights of the standalone task model, or those of all else."""
        for name, value in model.state_dict().items():
            if name.startswith(STANDALONE) == of_standalone:
                self.weights[name] = value.detach().clone()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What a checkpoint needs of it: JSON values, the best epoch's weights, and its validation predictions."""
        chosen = None
        if self.best is not None:
            chosen = {
                "epoch": self.best.best_epoch, "validation": self.best.validation, **self.best.weights._asdict(),
            }  # fmt: skip
        scores = {"history": self.history, "best": chosen, "best_view": self.best_view}
        return scores, self.weights, {name: torch.from_numpy(part) for name, part in self.validation.items()}

    def resume(
        self, scores: Mapping[str, Any], weights: dict[str, torch.Tensor], validation: Mapping[str, torch.Tensor]
    ) -> None:
        """Take back what :meth:`state` gave; progress is told of the epochs again."""
        self.history, self.weights = list(scores["history"]), weights
        self.validation = {name: part.numpy() for name, part in validation.items()}
        if scores.get("best_view") is not None:  # none in a checkpoint from before there was one
            epoch, found = scores["best_view"]
            self.best_view = epoch, found
        if scores["best"] is not None:
            chosen = scores["best"]
            own = chosen.get("view_blend", 0.0)  # a checkpoint from before there was one
            self.best = FitResult(chosen["epoch"], chosen["blend"], chosen["validation"], view_blend=own)
        if self.on_epoch is not None:
            for epoch, known in enumerate(self.history, 1):
                self.on_epoch(epoch, self.epochs, known)

    def choose(self, held_out: tuple[Logits, np.ndarray] | None = None) -> Blend | None:
        """The blend among the predictions of the kept epochs; None where there is nothing to choose.

        Args:
            held_out: predictions of rows that their model has not seen, and their labels, to choose by beside the
                validation rows.
        """
        if "both" not in self.validation:
            return None
        logits, labels = self._kept_predictions()
        if held_out is not None:
            logits, labels = logits.followed_by(held_out[0]), np.concatenate([labels, held_out[1]])
        return choose_blend(logits, labels, self.problem_type)[0]

    def restore(
        self, model: LeviModel, seconds: float, held_out: tuple[Logits, np.ndarray] | None = None
    ) -> FitResult:
        """Give the model the best epoch's weights and blend, in eval mode.

        A standalone task model without a weight in the prediction is let go of.

        Args:
            model: that was trained.
            seconds: of training.
            held_out: see :meth:`choose`.

        Raises:
            DivergedError: when no epoch gave finite predictions.
        """
        if self.best is None:
            raise DivergedError("training diverged: no epoch gave finite predictions; lower --learning-rate")
        weights = self.choose(held_out)
        if weights is not None:
            logits, labels = self._kept_predictions()
            self.best.blend, self.best.view_blend = weights
            self.best.validation = compute_metrics(logits.blended(weights), labels, self.problem_type)
            self.best.blend_rows = len(labels) + (0 if held_out is None else len(held_out[1]))
            self.best.view_epoch = None if self.best_view is None else self.best_view[0]
        if model.standalone is not None and not self.best.view_blend:
            model.drop_standalone()
            self.weights = {name: part for name, part in self.weights.items() if not name.startswith(STANDALONE)}
        model.load_state_dict(self.weights)
        model.config.blend, model.config.view_blend = self.best.weights
        model.eval()
        self.best.history, self.best.seconds = self.history, seconds
        return self.best

    def _kept_predictions(self) -> tuple[Logits, np.ndarray]:
        """The validation predictions of the kept epochs, and the labels."""
        return Logits(**{k: v for k, v in self.validation.items() if k != "labels"}), self.validation["labels"]

    def _is_better(self, scores: dict[str, float], others: dict[str, float] | None) -> bool:
        if others is None:
            return True
        return selection_key(scores, self.problem_type) > selection_key(others, self.problem_type)
