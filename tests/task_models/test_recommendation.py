"""Recommendation: empty histories, order, padding, unseen features, and what it can learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from levi_fast.task_models import RecommendationTaskModel

G = 6


def make(**settings: object) -> RecommendationTaskModel:
    torch.manual_seed(0)
    model = RecommendationTaskModel(G, view_width=8, **settings)  # type: ignore[arg-type]
    with torch.no_grad():  # as after training: the zero start would hide what the features do
        model.from_features.weight.normal_(std=0.3)
        model.feature_scale.add_(torch.rand_like(model.feature_scale))
    return model.eval()


def batch(rows: int = 4, items: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "history_features": torch.randint(0, 2, (rows, items, G)).float(),
        "history_ratings": torch.randint(1, 11, (rows, items)) / 2,
        "history_mask": torch.ones(rows, items),
        "target_features": torch.randint(0, 2, (rows, G)).float(),
    }


def test_empty_history_is_finite_whatever_its_padding_holds() -> None:
    model = make()
    inputs = batch()
    inputs["history_mask"][:] = 0
    no_items = model(**batch(items=5) | {k: v[:, :0] for k, v in inputs.items() if k.startswith("history")})
    inputs["history_ratings"][:] = float("nan")
    inputs["history_features"][:] = float("nan")
    view = model(**inputs)
    view.sum().backward()
    assert view.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(view, no_items)


def test_all_zero_features_train_without_nan() -> None:
    model = make()
    inputs = batch()
    inputs["history_features"][:] = 0
    inputs["target_features"][:] = 0
    model(**inputs).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_padding_changes_nothing() -> None:
    model = make()
    inputs = batch()
    padded = dict(inputs)
    padded["history_features"] = torch.cat([inputs["history_features"], torch.ones(4, 3, G)], dim=1)
    padded["history_ratings"] = torch.cat([inputs["history_ratings"], torch.full((4, 3), 5.0)], dim=1)
    padded["history_mask"] = torch.cat([inputs["history_mask"], torch.zeros(4, 3)], dim=1)
    torch.testing.assert_close(model(**padded), model(**inputs), rtol=1e-5, atol=1e-6)


def test_order_of_the_history_carries_nothing() -> None:
    model = make()
    inputs = batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = {k: v[:, order] if k.startswith("history") else v for k, v in inputs.items()}
    torch.testing.assert_close(model(**shuffled), model(**inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["history_ratings", "history_features", "target_features", "history_mask"])
def test_every_input_is_read(part: str) -> None:
    model = make()
    inputs = batch()
    changed = {k: v.clone() for k, v in inputs.items()}
    changed[part][:, 0] = 1.0 - changed[part][:, 0]
    assert ((model(**changed) - model(**inputs)).abs().amax(dim=1) > 1e-4).all()


def test_unseen_feature_adds_nothing_until_it_is_trained() -> None:
    """A feature absent from training keeps zero weights: it moves the view by likeness alone."""
    torch.manual_seed(0)
    model = RecommendationTaskModel(G, view_width=8, dropout=0.0)
    inputs = batch(rows=32)
    inputs["history_features"][..., 0] = 0
    inputs["target_features"][:, 0] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (model(**inputs)[:, 0] - inputs["target_features"][:, 1]).square().mean().backward()
        optimizer.step()
    weights = model.from_features.weight.view(-1, 3, G)
    assert not weights[:, :, 0].any()
    assert weights[:, :, 1].any()


@pytest.mark.parametrize("rule", ["user mean", "likeness", "item feature"])
def test_learns_what_ratings_depend_on(rule: str) -> None:
    torch.manual_seed(0)
    rows, items = 256, 8
    features = nn.functional.one_hot(torch.randint(0, G, (rows, items)), G).float()
    target = nn.functional.one_hot(torch.randint(0, G, (rows,)), G).float()
    level = torch.randn(rows, 1)
    taste = torch.randn(rows, G)
    if rule == "user mean":
        ratings, label = 3.5 + level.expand(rows, items), level.squeeze(1)
    elif rule == "likeness":  # the target repeats an item of the history, and so does its rating
        target = features[:, 0]
        ratings = 3.5 + torch.einsum("bng,bg->bn", features, taste)
        label = (target * taste).sum(1)
    else:
        ratings, label = torch.full((rows, items), 3.5), target[:, 2] - target[:, 4]
    model = RecommendationTaskModel(G, view_width=8, dropout=0.0)
    head = nn.Linear(8, 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=5e-3, weight_decay=0.0)
    for _ in range(200):
        optimizer.zero_grad()
        view = model(features, ratings, torch.ones(rows, items), target)
        loss = (head(view).squeeze(1) - label).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * float(label.var())


def test_errors_name_the_argument() -> None:
    model = make()
    inputs = batch()
    for part, bad, message in [
        ("history_features", torch.zeros(4, 5, G + 1), r"history_features: expected shape \[any, any, 6\]"),
        ("history_ratings", torch.zeros(4, 6), r"history_ratings: expected shape \[4, 5\], got \[4, 6\]"),
        ("history_mask", torch.zeros(3, 5), r"history_mask: expected shape \[4, 5\], got \[3, 5\]"),
        ("target_features", torch.zeros(4, G - 1), r"target_features: expected shape \[4, 6\], got \[4, 5\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**inputs | {part: bad})
