"""Cross-fitting: a choice of few validation rows that leans on the task model is asked of the training rows too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from levi_fast.backbones import load_backbone
from levi_fast.config import LeviConfig
from levi_fast.errors import DataError
from levi_fast.modeling import get_levi_model
from levi_fast.training import fit as fitting
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.blending import Blend, Logits
from levi_fast.training.checkpoints import CheckpointOptions
from levi_fast.training.cross_fitting import ENOUGH_VALIDATION_ROWS, MOST_TRAINING_ROWS, cross_fit, is_asked_for
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.metrics import compute_metrics
from levi_fast.training.prediction import predict

Tasks = Callable[..., Any]
OPTIONS = TrainingOptions(epochs=3, batch_size=16, learning_rate=5e-3, seed=5)
LEANING, TAPS_ALONE = Blend(0.0, 0.5), Blend(1.0, 0.0)


class Rows:
    """A data set of which only the size is asked."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


@pytest.mark.parametrize(
    ("weights", "train", "validation", "folds", "asked"),
    [
        (LEANING, 500, 100, 4, True),
        (Blend(0.5, 0.0), 500, 100, 4, True),
        (Blend(1.0, 1.0), 500, 100, 4, True),
        (TAPS_ALONE, 500, 100, 4, False),
        (None, 500, 100, 4, False),
        (LEANING, 500, 100, 0, False),
        (LEANING, 3, 100, 4, False),
        (LEANING, 500, ENOUGH_VALIDATION_ROWS, 4, False),
        (LEANING, 500, ENOUGH_VALIDATION_ROWS - 1, 4, True),
        (LEANING, MOST_TRAINING_ROWS, 100, 4, True),
        (LEANING, MOST_TRAINING_ROWS + 1, 100, 4, False),
    ],
)
def test_when_it_is_asked_for(weights: Blend | None, train: int, validation: int, folds: int, asked: bool) -> None:
    assert is_asked_for(weights, Rows(train), Rows(validation), folds) is asked  # type: ignore[arg-type]


@pytest.mark.parametrize("folds", [-1, 1])
def test_numbers_of_folds_that_cannot_be(folds: int) -> None:
    with pytest.raises(DataError, match=rf"--cross-fit: expected 0 or at least 2 folds, got {folds}"):
        TrainingOptions(cross_fit=folds)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_every_row_is_predicted_once_by_a_model_that_has_not_seen_it(cached_task: Tasks, folds: int) -> None:
    """Against folds trained one by one, each on a model built anew from the seed."""
    task = cached_task("tabular", "classes", standalone_view=True)
    model = task.model(seed=1)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    seen: list[Any] = []

    def fit_fold(part: Any) -> BestEpoch:
        seen.append(part)
        return fitting._fit_fold(model, task.validation, OPTIONS, part, graph=False)

    model.backbone, backbone = None, model.backbone
    found = cross_fit(model, initial, task.train, folds, 7, fit_fold)
    model.backbone = backbone
    assert found is not None
    logits, labels = found
    order = np.random.default_rng(7).permutation(len(task.train))
    done = 0
    for fold, part in enumerate(seen):
        held, kept = (
            np.sort(order[fold::folds]),
            sorted(set(range(len(task.train))) - set(order[fold::folds].tolist())),
        )
        assert torch.equal(part.taps(), task.train.taps()[kept])
        assert torch.equal(part.labels, task.train.labels[kept])
        assert np.array_equal(labels[done : done + len(held)], task.train.labels[held].numpy())
        own = task.model(seed=1)
        best = fitting._fit_fold(own, task.validation, OPTIONS, part, graph=False)
        own.load_state_dict(best.weights)
        own.config.blend = own.config.view_blend = 0.0
        alone = predict(own, task.train.subset_with_taps(held, "held out"))
        for mine, theirs in (
            (logits.both, alone.logits),
            (logits.without_view, alone.logits_without_view),
            (logits.without_taps, alone.logits_without_taps),
        ):
            assert mine is not None
            assert np.array_equal(mine[done : done + len(held)], theirs)
        done += len(held)
    assert done == len(labels) == len(task.train)


def with_choices(monkeypatch: pytest.MonkeyPatch, on_validation: Blend, on_all: Blend) -> list[int]:
    """Let the rules choose these; returns the numbers of rows that they were asked with at the end."""
    asked: list[int] = []

    def choose(self: BestEpoch, held_out: Any = None) -> Blend:
        asked.append(0 if held_out is None else len(held_out[1]))
        return on_validation if held_out is None else on_all

    monkeypatch.setattr(BestEpoch, "choose", choose)
    return asked


@pytest.mark.parametrize("loop", ["lean", "trainer"])
def test_the_rows_of_training_correct_a_choice_of_validation(
    cached_task: Tasks, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    task = cached_task("tabular", "classes", standalone_view=True)
    asked = with_choices(monkeypatch, LEANING, TAPS_ALONE)
    model = task.model(seed=1)
    result = fit(model, task.train, task.validation, OPTIONS, loop=loop)
    assert asked == [0, len(task.train)]
    assert result.weights == TAPS_ALONE and model.standalone is None and model.config.blend == 1.0
    assert result.blend_rows == len(task.train) + len(task.validation)
    found = compute_metrics(
        predict(model, task.validation).logits, task.validation.labels.numpy(), model.config.problem_type
    )
    assert found == pytest.approx(result.validation, rel=1e-5)


def test_the_weights_are_those_of_the_training_without(cached_task: Tasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folds leave no trace in the model: neither their weights, nor buffers, nor what is trainable."""
    task = cached_task("tabular", "classes", standalone_view=True)
    with_choices(monkeypatch, LEANING, LEANING)
    models = []
    for folds in (4, 0):
        models.append(task.model(seed=1))
        result = fit(models[-1], task.train, task.validation, replace(OPTIONS, cross_fit=folds))
        assert (result.blend_rows > len(task.validation)) == (folds > 0)
    assert models[0].training is models[1].training is False
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    for name, value in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], value), name


def test_folds_are_left_out_where_the_taps_alone_were_chosen(
    cached_task: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = cached_task("tabular", "classes", standalone_view=True)
    with_choices(monkeypatch, TAPS_ALONE, LEANING)
    monkeypatch.setattr(fitting, "cross_fit", None)  # would fail if it were called
    result = fit(task.model(seed=1), task.train, task.validation, OPTIONS)
    assert result.weights == TAPS_ALONE and result.blend_rows == len(task.validation)


def test_a_fold_that_diverges_leaves_the_choice_to_validation(
    cached_task: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = cached_task("tabular", "classes", standalone_view=True)
    with_choices(monkeypatch, LEANING, TAPS_ALONE)

    def diverging(*_: Any, **__: Any) -> BestEpoch:
        return BestEpoch("single_label_classification", 1, None, None, standalone=True)

    monkeypatch.setattr(fitting, "_fit_fold", diverging)
    with pytest.warns(UserWarning, match="chosen by validation rows alone: a training on folds diverged"):
        result = fit(task.model(seed=1), task.train, task.validation, OPTIONS)
    assert result.weights == LEANING and result.blend_rows == len(task.validation)


def test_pooled_rows_overrule_a_lucky_validation() -> None:
    """Thirty rows find the standalone model level and the taps worse; three hundred more find it far behind."""
    labels = np.arange(30) % 2
    more = np.arange(300) % 2

    def right(truth: np.ndarray, rows: Any) -> np.ndarray:
        correct = np.zeros(len(truth), dtype=bool)
        correct[rows] = True
        found = np.where(correct, 1.0, -1.0) * (2 * truth - 1)
        return np.stack([-found, found], axis=1)

    best = BestEpoch("single_label_classification", 1, None, None, standalone=True)
    best.validation = {
        "labels": labels,
        "both": right(labels, slice(0, 27)),
        "without_view": right(labels, slice(0, 20)),
        "without_taps": right(labels, slice(2, 29)),
    }
    assert best.choose() == Blend(0.0, 0.5)
    held = Logits(right(more, slice(0, 270)), right(more, slice(0, 285)), right(more, slice(0, 210)))
    assert best.choose((held, more)) == Blend(1.0, 0.0)
    # a model without a standalone one takes what it has of the others' predictions
    del best.validation["without_taps"]
    assert best.choose((held, more)) == Blend(1.0, 0.0)


def test_killed_within_the_folds_it_goes_on_to_the_same_end(
    cached_task: Tasks, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    task = cached_task("tabular", "classes", standalone_view=True)
    with_choices(monkeypatch, LEANING, Blend(0.5, 0.0))
    whole = task.model(seed=1)
    expected = fit(whole, task.train, task.validation, OPTIONS)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    checkpoints = CheckpointOptions(str(tmp_path / "checkpoints"))
    with monkeypatch.context() as patched:
        patched.setattr(fitting, "cross_fit", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(task.model(seed=1), task.train, task.validation, OPTIONS, checkpoints=checkpoints)
    model = task.model(seed=1)
    result = fit(model, task.train, task.validation, OPTIONS, checkpoints=checkpoints)
    assert replace(result, seconds=0) == replace(expected, seconds=0)
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("why", ["no taps", "several processes"])
def test_without_taps_or_among_several_processes_validation_chooses_alone(
    tiny_bert_dir: str, cached_task: Tasks, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """A backbone that runs in every step would run for every fold as well."""
    task = cached_task("text", "classes", standalone_view=True)
    model = task.model(seed=1)
    if why == "no taps":
        spec = dict(task.config.task_model or {})
        config = LeviConfig(
            num_labels=3, problem_type=task.config.problem_type, hidden_width=8, task_model=spec, standalone_view=True
        )
        model = get_levi_model(load_backbone(tiny_bert_dir), config)
        for dataset in (task.train, task.validation):
            dataset.set_taps(None)
            assert dataset.token_ids is not None
            dataset.token_ids.clamp_(max=4)  # the backbone knows few
    else:
        monkeypatch.setattr(fitting, "_processes", lambda: 2)
    with_choices(monkeypatch, LEANING, TAPS_ALONE)
    result = fit(model, task.train, task.validation, replace(OPTIONS, epochs=1), loop="lean")
    assert result.weights == LEANING and result.blend_rows == len(task.validation)
