"""Which epoch is kept: validation predictions are scored after each, and the best one's weights stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from levi_fast.errors import DivergedError
from levi_fast.modeling import LeviModel
from levi_fast.training.blending import Blend, Logits, choose_blend
from levi_fast.training.metrics import compute_metrics, selection_key

# Called after every epoch with (epoch, epochs, validation scores).
EpochProgress = Callable[[int, int, dict[str, float]], None]


@dataclass
class FitResult:
    """What training chose: the epoch (from 1), the blend, their validation scores, and every epoch's scores."""

    best_epoch: int
    blend: float
    validation: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    view_blend: float = 0.0

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
    """

    def __init__(self, problem_type: str, epochs: int, blend: float | None, on_epoch: EpochProgress | None) -> None:
        self.problem_type, self.epochs, self.blend, self.on_epoch = problem_type, epochs, blend, on_epoch
        self.best: FitResult | None = None
        self.weights: dict[str, torch.Tensor] = {}
        self.history: list[dict[str, float]] = []

    def score(self, logits: Logits, labels: np.ndarray) -> dict[str, float]:
        """Metrics of validation predictions and the blend they are of; ``{"diverged": 1}`` for NaN."""
        if not np.isfinite(logits.both).all():
            return {"diverged": 1.0}
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
        if "diverged" not in scores and self._is_better(scores):
            best = {name: value for name, value in scores.items() if name not in Blend._fields}
            self.best = FitResult(epoch, scores["blend"], best, view_blend=scores["view_blend"])
            self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        if self.on_epoch is not None:
            self.on_epoch(epoch, self.epochs, scores)

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """What a checkpoint needs of it: JSON values, and the best epoch's weights."""
        chosen = None
        if self.best is not None:
            chosen = {
                "epoch": self.best.best_epoch, "validation": self.best.validation, **self.best.weights._asdict(),
            }  # fmt: skip
        return {"history": self.history, "best": chosen}, self.weights

    def resume(self, scores: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> None:
        """Take back what :meth:`state` gave; progress is told of the epochs again."""
        self.history, self.weights = list(scores["history"]), weights
        if scores["best"] is not None:
            chosen = scores["best"]
            own = chosen.get("view_blend", 0.0)  # a checkpoint from before there was one
            self.best = FitResult(chosen["epoch"], chosen["blend"], chosen["validation"], view_blend=own)
        if self.on_epoch is not None:
            for epoch, known in enumerate(self.history, 1):
                self.on_epoch(epoch, self.epochs, known)

    def restore(self, model: LeviModel, seconds: float) -> FitResult:
        """Give the model the best epoch's weights and blend, in eval mode.

        Raises:
            DivergedError: when no epoch gave finite predictions.
        """
        if self.best is None:
            raise DivergedError("training diverged: no epoch gave finite predictions; lower --learning-rate")
        model.load_state_dict(self.weights)
        model.config.blend, model.config.view_blend = self.best.weights
        model.eval()
        self.best.history, self.best.seconds = self.history, seconds
        return self.best

    def _is_better(self, scores: dict[str, float]) -> bool:
        if self.best is None:
            return True
        return selection_key(scores, self.problem_type) > selection_key(self.best.validation, self.problem_type)
