"""Tasks on synthetic taps: what training needs of a cache, without a backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel

WIDTHS = [16, 16, 16]
TASK_MODELS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "vocab_size": 48, "embedding_dim": 8, "view_width": 8},
    "transformer": {
        "type": "text", "vocab_size": 48, "embedding_dim": 8, "view_width": 8, "encoder": "transformer",
        "num_layers": 1, "num_heads": 2,
    },
    "tabular": {"type": "tabular", "num_numeric": 3, "cardinalities": [4], "view_width": 8, "hidden_width": 16},
    "recommendation": {"type": "recommendation", "num_features": 5, "view_width": 8, "hidden_width": 16},
}  # fmt: skip
PROBLEMS = {
    "classes": ("single_label_classification", 3),
    "multi-label": ("multi_label_classification", 4),
    "regression": ("regression", 1),
}


class CachedTask(NamedTuple):
    """A config of a model that reads taps alone, and its data with taps attached."""

    config: LeviConfig
    train: EncodedDataset
    validation: EncodedDataset

    def model(self, seed: int = 0, **fields: Any) -> LeviModel:
        torch.manual_seed(seed)
        return LeviModel(LeviConfig(**{**self.config.to_dict(), **fields}))


def rows(view: str | None, problem: str, count: int, seed: int, widths: list[int]) -> EncodedDataset:
    """Rows whose label depends on the taps and, where there is a view, on its inputs."""
    g = torch.Generator().manual_seed(seed)
    taps = torch.randn(count, max(sum(widths), 1), generator=g)
    signal = taps[:, 0]
    features: dict[str, torch.Tensor] = {}
    tokens = None
    if view in ("text", "transformer"):
        lengths = torch.randint(2, 9, (count,), generator=g).tolist()
        tokens = [torch.randint(1, 48, (length,), generator=g).tolist() for length in lengths]
        signal = signal + torch.tensor([float(row[0] > 24) for row in tokens])
    elif view == "tabular":
        features = {
            "numeric": torch.randn(count, 3, generator=g),
            "categorical": torch.randint(0, 4, (count, 1), generator=g),
        }
        signal = signal + features["numeric"][:, 0]
    elif view == "recommendation":
        features = {
            "history_features": torch.rand(count, 6, 5, generator=g),
            "history_ratings": torch.randint(1, 6, (count, 6), generator=g).float(),
            "history_mask": torch.rand(count, 6, generator=g) > 0.3,
            "target_features": torch.rand(count, 5, generator=g),
        }
        signal = signal + features["history_ratings"].mean(1) - 3
    if problem == "regression":
        labels = 10.0 + 2.0 * signal
    elif problem == "multi-label":
        labels = (signal[:, None] + torch.randn(count, 4, generator=g) > 0).float()
    else:
        labels = (signal > -0.5).long() + (signal > 0.5).long()
    dataset = EncodedDataset(f"seed {seed}", token_ids=tokens, features=features, labels=labels)
    if sum(widths):
        dataset.set_taps(taps, keep_inputs=tokens is not None)
    return dataset


@pytest.fixture
def cached_task() -> Callable[..., CachedTask]:
    """``cached_task(view, problem, **config)``: view a name in TASK_MODELS or None, problem one in PROBLEMS."""

    def make(
        view: str | None = "text", problem: str = "classes", *, count: int = 70, seed: int = 0, **fields: Any
    ) -> CachedTask:
        kind, outputs = PROBLEMS[problem]
        given = {
            "taps": "all", "tap_layers": [0, 1, 2], "tap_widths": WIDTHS, "hidden_width": 8, "num_labels": outputs,
            "problem_type": kind, "task_model": None if view is None else TASK_MODELS[view],
            "view_width": 0 if view is None else 8, **fields,
        }  # fmt: skip
        if problem == "regression":
            given.update(target_mean=10.0, target_std=2.0)
        config = LeviConfig(**given)
        widths = list(config.tap_widths or [])
        return CachedTask(config, rows(view, problem, count, seed, widths), rows(view, problem, 37, seed + 1, widths))

    return make
