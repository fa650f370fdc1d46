"""LEVI trained on real data (scikit-learn's digits): every backend and dtype follows the reference's loss curve."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.kernels import native

STEPS, BATCH = 200, 64


@functools.cache
def digits() -> tuple[list[Tensor], Tensor, Tensor]:
    """Taps of a frozen stand-in backbone (random layers on the pixels), a view (row and column sums), labels."""
    data = load_digits()
    pixels = torch.tensor(data.data, dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(0)
    taps, hidden = [], pixels
    for width in (96, 64, 48):
        hidden = (hidden @ torch.randn(hidden.shape[1], width, generator=generator) / hidden.shape[1] ** 0.5).relu()
        taps.append(hidden)
    image = pixels.view(-1, 8, 8)
    return taps, torch.cat([image.sum(1), image.sum(2)], 1), torch.tensor(data.target)


def curve(cls: type, loss_of: object, dtype: torch.dtype) -> Tensor:
    taps, views, labels = digits()
    torch.manual_seed(1)
    model = cls([tap.shape[1] for tap in taps], views.shape[1], 10, hidden_width=64, dropout=0.0, view_dropout=0.5)
    task = torch.nn.Linear(views.shape[1], views.shape[1])  # the small model trained along
    optimizer = torch.optim.Adam([*model.parameters(), *task.parameters()], 3e-3)
    half = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()
    losses = []
    for step in range(STEPS):
        rows = torch.arange(BATCH) + BATCH * (step % 20)
        with half:
            layer_logits = model([tap[rows] for tap in taps], task(views[rows])).layer_logits
            loss = loss_of(layer_logits, labels[rows], "single_label_classification")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


@functools.cache
def reference_curve() -> Tensor:
    return curve(reference.LayerwiseEnsemble, reference.layerwise_loss, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("served_by", [pytest.param("cpp", marks=pytest.mark.native), "eager"])
def test_two_hundred_steps_follow_the_reference(served_by: str, dtype: torch.dtype) -> None:
    spec = reference_curve()
    assert spec[-20:].mean() < 0.3 * spec[0]  # it learns
    with levi_fast.use_backend(served_by):
        ours = curve(levi_fast.LayerwiseEnsemble, functional.layerwise_loss, dtype)
    # Of the first loss: rounding grows from step to step, but stays this far below what is learnt.
    bound = 0.002 if dtype == torch.float32 else 0.03
    assert (ours - spec).abs().max() < bound * spec[0]


@pytest.mark.native
def test_two_runs_have_the_same_bits() -> None:
    assert native.load().loaded
    runs = [curve(levi_fast.LayerwiseEnsemble, functional.layerwise_loss, torch.float32) for _ in range(2)]
    assert torch.equal(*runs)
