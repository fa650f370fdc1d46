"""Many configurations on the same taps: each trained by itself, and all in one pass."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import set_seed

from levi_fast.config import LeviConfig
from levi_fast.modeling import LeviModel
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.runs import Splits, score
from levi_fast.training.sweep import Head

SEEDS, RATES = range(8), (1e-3, 3e-4)
COUNT = len(SEEDS) * len(RATES)


def make_heads(config: LeviConfig, splits: Splits, schedule: Mapping[str, Any], count: int = COUNT) -> list[Head]:
    """Configurations that differ in seed and learning rate.

    Args:
        config: completed, as ``get_levi_model`` leaves it.
        splits: with taps attached.
        schedule: further fields of ``TrainingOptions``, alike for all.
        count: the first so many of the sixteen.
    """
    heads = [
        Head(
            f"{seed} {rate}", config, TrainingOptions(seed=seed, learning_rate=rate, cross_fit=0, **schedule), splits
        )
        for seed in SEEDS
        for rate in RATES
    ]
    return heads[:count]


def alone(head: Head) -> tuple[LeviModel, dict[str, Any], float]:
    """A head trained and scored by itself: model, figures, seconds."""
    started = time.perf_counter()
    set_seed(head.options.seed)
    model = LeviModel(head.config)
    splits: Splits = head.splits
    result = fit(model, splits.train, splits.validation, head.options, loop="lean")
    scored = splits.validation if splits.test is None else splits.test
    figures = {
        "history": result.history,
        "id": score(model, scored),
        "ood": {name: score(model, dataset) for name, dataset in splits.ood.items()},
    }
    return model, figures, time.perf_counter() - started
