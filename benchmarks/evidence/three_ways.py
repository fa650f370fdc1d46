"""A third prediction beside y(tap, view) and y(tap, 0): the view's own, y(0, view); how it is trained, how all weigh.

Tap dropout zeroes all taps of an example while training, of one that keeps its view, as view dropout zeroes the view;
so every adapting layer learns to answer from the view alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from levi_fast.modeling import LeviModel
from levi_fast.modules import EnsembleOutput, LayerwiseEnsemble
from levi_fast.training.blending import Logits, choose_blend
from levi_fast.training.metrics import compute_metrics, row_losses, selection_key, within_standard_error
from levi_fast.training.prediction import predict
from levi_fast.training.runs import Splits

Weights = tuple[float, float, float]
"""Of y(tap, view), y(tap, 0) and y(0, view)."""

plain_forward = LayerwiseEnsemble.forward


@dataclass(frozen=True)
class Ways:
    """Logits ``[3, N, C]`` of a split, in the order of :data:`Weights`, and its labels."""

    logits: np.ndarray
    labels: np.ndarray

    def weighed(self, weights: Weights) -> np.ndarray:
        return cast(np.ndarray, np.tensordot(weights, self.logits.astype(np.float64), 1))


def zeroed(taps: Any, rows: Tensor | None = None) -> Any:
    """Taps [L, B, D] or L x [B, D_l], zero in the ``rows`` [B] that are True, or in all."""
    if not isinstance(taps, Tensor):
        return [zeroed(tap, rows) for tap in taps]
    return torch.zeros_like(taps) if rows is None else taps.masked_fill(rows[:, None], 0.0)


@contextmanager
def tap_dropout(probability: float) -> Iterator[None]:
    """Train with tap dropout: one draw decides whether an example loses its view, its taps or nothing."""

    def keep(self: LayerwiseEnsemble, batch: int, device: torch.device) -> Tensor | None:
        return self.drawn >= self.view_dropout if self.training else None

    def forward(self: LayerwiseEnsemble, taps: Any, view: Tensor, **options: Any) -> EnsembleOutput:
        if self.training:
            self.drawn = torch.rand(view.shape[0], device=view.device)
            taps = zeroed(taps, self.drawn >= 1 - probability)
        return plain_forward(self, taps, view, **options)

    with patch.object(LayerwiseEnsemble, "draw_view_keep", keep), patch.object(LayerwiseEnsemble, "forward", forward):
        yield


def predicted(model: LeviModel, splits: Splits) -> dict[str, Ways]:
    """All three predictions of every split but the training rows; one that the model does not have is NaN."""

    def without_taps(self: LayerwiseEnsemble, taps: Any, view: Any = None, **options: Any) -> EnsembleOutput:
        return plain_forward(self, zeroed(taps), view, **options)

    model.config.blend = model.config.view_blend = 0.0
    found = {}
    for name, data in splits.named():
        if name == "train":
            continue
        assert data.labels is not None
        both = predict(model, data)
        missing = np.full_like(both.logits, np.nan)
        ways = [both.logits, missing, missing]
        if both.logits_without_taps is not None:
            ways = [both.logits, both.logits_without_view, both.logits_without_taps]
        elif both.logits_without_view is not None:
            with patch.object(LayerwiseEnsemble, "forward", without_taps):
                ways = [both.logits, both.logits_without_view, predict(model, data).logits]
        found[name] = Ways(np.stack(ways), data.labels.numpy())
    return found


def write(path: Path, found: Mapping[str, Ways]) -> None:
    """Keep predictions; :func:`read` takes them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{kind}:{name}": getattr(ways, kind) for name, ways in found.items() for kind in ("logits", "labels")}
    np.savez(path, **arrays)


def read(path: Path) -> dict[str, Ways]:
    with np.load(path) as file:
        names = [name.partition(":")[2] for name in file if name.startswith("logits:")]
        return {name: Ways(file[f"logits:{name}"], file[f"labels:{name}"]) for name in names}


def with_parts(levi: Ways, taps_only: Ways | None, task_model: Ways | None) -> Ways:
    """The same with parts that were trained by themselves in place of y(tap, 0) or y(0, view)."""
    ways = levi.logits.copy()
    for place, part in ((1, taps_only), (2, task_model)):
        if part is not None:
            ways[place] = part.logits[0]
    return Ways(ways, levi.labels)


def level(held: Ways, kind: str) -> tuple[int, list[bool]]:
    """The best of the three on validation rows, and which are within a standard error of it, row by row."""
    scores = [selection_key(compute_metrics(logits, held.labels, kind), kind) for logits in held.logits]
    best = max(range(3), key=lambda way: scores[way])
    losses = [row_losses(logits, held.labels, kind) for logits in held.logits]
    return best, [within_standard_error(own - losses[best]) for own in losses]


def _mean(chosen: list[bool]) -> Weights:
    return cast(Weights, tuple(float(one) / sum(chosen) for one in chosen))


def best_alone(held: Ways, kind: str) -> Weights:
    best, _ = level(held, kind)
    return _mean([way == best for way in range(3)])


def mean_of_level(held: Ways, kind: str) -> Weights:
    return _mean(level(held, kind)[1])


def mean_of_single_views(held: Ways, kind: str) -> Weights:
    """Of the predictions of one view alone, where any is level with the best; else that one."""
    best, (_, taps, view) = level(held, kind)
    return _mean([False, taps, view]) if taps or view else _mean([way == best for way in range(3)])


def with_level_view(held: Ways, kind: str) -> Weights:
    """y(tap, 0) where it is level with the best, else y(tap, view); half of y(0, view) where that is level too."""
    _, (joint, taps, view) = level(held, kind)
    return _mean([joint and not taps, taps, view])


def unless_taps_suffice(held: Ways, kind: str) -> Weights:
    """As :func:`with_level_view`, but without y(0, view) where y(tap, 0) is level with the best."""
    _, (joint, taps, view) = level(held, kind)
    return (0.0, 1.0, 0.0) if taps else _mean([joint, False, view])


def librarys(held: Ways, kind: str) -> Weights:
    """What ``levi-fast train`` does: see :func:`levi_fast.training.blending.choose_blend`."""
    a, b = choose_blend(Logits(*held.logits), held.labels, kind)[0]
    return (1 - b) * (1 - a), (1 - b) * a, b


def by_loss(held: Ways, kind: str) -> Weights:
    """Weights not below 0, of sum 1, of least validation loss."""

    def loss(weights: np.ndarray) -> float:
        scores = compute_metrics(held.weighed(cast(Weights, tuple(weights))), held.labels, kind)
        return scores["rmse"] if kind == "regression" else scores["log_loss"]

    start = np.full(3, 1 / 3)
    limits: Any = {"type": "eq", "fun": lambda weights: weights.sum() - 1}
    found = minimize(loss, start, method="SLSQP", bounds=[(0, 1)] * 3, constraints=limits)
    return cast(Weights, tuple(float(weight) for weight in found.x))


LIBRARYS = "a of 0, 1/2 and 1 as before; where it is 0, with y(0, view) where within 1; that alone where better"
RULES: dict[str, Callable[[Ways, str], Weights]] = {
    "best of three": best_alone,
    "mean of those within 1 standard error": mean_of_level,
    "mean of the single views within 1 standard error, else the best": mean_of_single_views,
    "largest a within 1 standard error, with y(0, view) where within 1": with_level_view,
    "the same, but y(0, view) only where y(tap, 0) is not within 1": unless_taps_suffice,
    LIBRARYS: librarys,
    "weights of the three by validation loss": by_loss,
    "mean of all three": lambda *_: _mean([True] * 3),
    "y(0, view)": lambda *_: (0.0, 0.0, 1.0),
}
