"""Training with a standalone task model: each part keeps its own best epoch, and what gets no weight is let go of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from levi_fast.config import LeviConfig
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.blending import Logits, choose_blend
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.methods import METHODS, method_config
from levi_fast.training.metrics import compute_metrics
from levi_fast.training.prediction import predict

Tasks = Callable[..., Any]
KIND = "single_label_classification"
OPTIONS = {"epochs": 6, "batch_size": 16, "learning_rate": 5e-3, "seed": 5}
LABELS = np.arange(60) % 2
TAPS = 12  # rows that the taps alone have right


def predictions(right: int, start: int = 0) -> np.ndarray:
    """Logits of 60 rows, of which ``right`` from row ``start`` on are classified well."""
    found = np.where((np.arange(60) - start) % 60 < right, 1.0, -1.0) * (2 * LABELS - 1)
    return np.stack([-found, found], axis=1).astype(np.float32)


def values(module: torch.nn.Module) -> set[float]:
    return {float(number) for parameter in module.parameters() for number in parameter.detach().unique()}


def recorded(task: Any, epochs: list[tuple[int, int]]) -> tuple[Any, BestEpoch]:
    """A model and what was recorded of (rows that LEVI, rows that the standalone model has right) by epoch."""
    model = task.model(standalone_view=True)
    best = BestEpoch(KIND, len(epochs), None, None, standalone=True)
    for epoch, (levi, view) in enumerate(epochs, 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(epoch))
        scores = best.score(Logits(predictions(levi), predictions(TAPS), predictions(view, 30)), LABELS)
        best.record(scores, model)
    return model, best


def test_each_part_keeps_its_own_best_epoch(cached_task: Tasks) -> None:
    model, best = recorded(cached_task("tabular", "classes"), [(40, 44), (45, 40), (43, 46)])
    assert [scores["accuracy"] for scores in best.history] == [40 / 60, 45 / 60, 43 / 60]  # of LEVI by itself
    result = best.restore(model, 0.0)
    assert (result.best_epoch, result.view_epoch) == (2, 3)
    assert values(model.standalone) == {3.0} and values(model.ensemble) == {2.0}
    weights, scores = choose_blend(Logits(predictions(45), predictions(TAPS), predictions(46, 30)), LABELS, KIND)
    assert result.weights == (model.config.blend, model.config.view_blend) == weights and weights.view_blend == 0.5
    assert result.validation == scores


def test_one_that_is_behind_is_let_go_of(cached_task: Tasks) -> None:
    model, best = recorded(cached_task("tabular", "classes"), [(50, 20), (52, 21)])
    result = best.restore(model, 0.0)
    assert result.view_blend == model.config.view_blend == 0.0 and result.view_epoch == 2
    assert model.standalone is None and not model.config.standalone_view
    assert not any(name.startswith("standalone.") for name in model.state_dict())
    assert result.validation["accuracy"] == 52 / 60


def test_one_that_diverged_does_not_take_levi_with_it(cached_task: Tasks) -> None:
    model = cached_task("tabular", "classes").model(standalone_view=True)
    best = BestEpoch(KIND, 1, None, None, standalone=True)
    broken = np.full((60, 2), np.nan, dtype=np.float32)
    best.record(best.score(Logits(predictions(50), predictions(50), broken), LABELS), model)
    result = best.restore(model, 0.0)
    assert model.standalone is None and result.validation["accuracy"] == 50 / 60 and result.view_epoch is None


@pytest.mark.parametrize("loop", ["trainer", "lean"])
@pytest.mark.parametrize("view", ["text", "recommendation"])
def test_levi_learns_to_the_last_bit_what_it_learns_without(cached_task: Tasks, view: str, loop: str) -> None:
    """Dropout is drawn, and gradients are clipped, as if nothing stood beside it."""
    task = cached_task(view, "classes", dropout=0.2)
    options = TrainingOptions(**{**OPTIONS, "max_grad_norm": 0.05})
    results, models = [], []
    for standalone in (True, False):
        model = task.model(seed=1, standalone_view=standalone)
        results.append(fit(model, task.train, task.validation, options, loop=loop))
        models.append(model)
    assert results[0].history == results[1].history and results[0].best_epoch == results[1].best_epoch
    weights = models[0].state_dict()
    for name, value in models[1].state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize(("view", "problem"), [("tabular", "regression"), ("recommendation", "classes")])
def test_the_figures_are_those_of_the_model_that_is_kept(cached_task: Tasks, view: str, problem: str) -> None:
    task = cached_task(view, problem, standalone_view=True)
    model = task.model(seed=1)
    result = fit(model, task.train, task.validation, TrainingOptions(**OPTIONS))
    assert model.config.standalone_view == (model.standalone is not None) == (result.view_blend > 0)
    found = compute_metrics(
        predict(model, task.validation).logits, task.validation.labels.numpy(), model.config.problem_type
    )
    assert found == pytest.approx(result.validation, rel=1e-5)
    assert result.view_epoch in range(1, 7)


def test_a_fixed_blend_leaves_it_out(cached_task: Tasks) -> None:
    task = cached_task("tabular", "classes", standalone_view=True)
    fixed, plain = task.model(seed=1), task.model(seed=1, standalone_view=False)
    for model in (fixed, plain):
        fit(model, task.train, task.validation, TrainingOptions(**OPTIONS, blend=0.5))
    assert fixed.standalone is None and fixed.config.blend == 0.5
    for name, value in plain.state_dict().items():
        assert torch.equal(fixed.state_dict()[name], value), name


def test_it_is_of_levi_alone() -> None:
    spec = {"type": "tabular", "num_numeric": 3}
    asked = LeviConfig(task_model=spec, standalone_view=True)
    have = {name for name in METHODS if method_config(name, asked).standalone_view}
    assert have == {"levi", "levi-last-tap", "levi-fine-tuned", "levi-lora"}
