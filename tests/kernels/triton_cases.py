"""The Triton kernels against float64, on a GPU, or interpreted on the CPU; test_triton.py runs this file either way.

The interpreter must be asked for before Triton is first imported, and transformers imports it: so this file is no
test module of the ordinary run. By hand: TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    CASES,
    Case,
    backward_arguments,
    check,
    check_pool,
    double_loss,
    drawn,
    fill_fresh_memory,
    hidden_of,
    mask_of,
    needs_of,
    terms_of,
    wide,
)

import levi_fast
from levi_fast import reference
from levi_fast.kernels import (
    layerwise_ensemble_backward_triton,
    layerwise_ensemble_triton,
    layerwise_loss_triton,
    masked_mean_pool_triton,
    triton_dispatch,
)
from levi_fast.kernels.launch_configs import PoolConfig, ProductConfig
from levi_fast.kernels.layerwise_ensemble_eager import NEEDS, eager_backward, eager_forward
from levi_fast.kernels.layerwise_loss import eager_forward as eager_loss
from levi_fast.kernels.masked_mean_pool import eager_backward as eager_pool_backward
from levi_fast.kernels.masked_mean_pool import eager_forward as eager_pool

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter's product of bfloat16 tiles is wrong; on a GPU they are tested like the others.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
SMALL = ProductConfig(16, 16, 16, 3, 2, 4, 2)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh memory with NaN (or a large integer), so that an unwritten element shows."""
    fill_fresh_memory(monkeypatch)


# --- masked_mean_pool ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("shape", "strides", "mask_dtype", "splits"),
    [
        ((3, 5, 7), "transposed", torch.bool, 1),
        ((2, 37, 70), "sliced", torch.int64, 3),
        ((1, 1, 1), "contiguous", None, 1),
        ((4, 9, 33), "contiguous", torch.float32, 2),
        ((2, 20, 64), "contiguous", torch.uint8, 1),
    ],
)
def test_pool(
    dtype: torch.dtype, shape: tuple[int, ...], strides: str, mask_dtype: torch.dtype | None, splits: int
) -> None:
    hidden = hidden_of(shape, dtype, strides, device=DEVICE)
    mask = None if mask_dtype is None else mask_of(shape, mask_dtype, DEVICE)
    config = PoolConfig(4, 32, splits, 4)
    ours = masked_mean_pool_triton.forward(hidden, mask, config=config)
    check_pool(ours, hidden, mask)
    normed = masked_mean_pool_triton.forward(hidden, mask, normalize=True)
    exact = F.layer_norm(eager_pool(hidden.double(), mask), shape[2:])
    check("normed", normed, F.layer_norm(eager_pool(hidden, mask), shape[2:]), exact)
    grad = torch.randn(shape[2], shape[0], device=DEVICE).to(dtype).T
    check(
        "gradient",
        masked_mean_pool_triton.backward(grad, mask, shape[1], config=config),
        eager_pool_backward(grad, mask, shape[1]),
        eager_pool_backward(grad.double(), mask, shape[1]),
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 5), (2, 3, 0)])
def test_pool_of_nothing(shape: tuple[int, ...]) -> None:
    hidden, mask = torch.ones(shape, device=DEVICE), torch.ones(shape[:2], device=DEVICE)
    batch, length, width = shape
    zeros = torch.zeros(batch, width, device=DEVICE)
    assert torch.equal(masked_mean_pool_triton.forward(hidden, mask), zeros)
    assert masked_mean_pool_triton.backward(zeros, mask, length).shape == shape


def test_pool_writes_into_a_slice_of_a_bank_and_nowhere_else() -> None:
    bank = torch.full((3, 4, 9), 7.0, device=DEVICE)
    hidden = hidden_of((4, 6, 9), torch.float32, device=DEVICE)
    masked_mean_pool_triton.forward(hidden, None, normalize=True, out=bank[1])
    assert torch.allclose(bank[1], F.layer_norm(hidden.mean(1), (9,)), atol=1e-5)
    assert torch.equal(bank[::2], torch.full((2, 4, 9), 7.0, device=DEVICE))
    with pytest.raises(ValueError, match=r"out: expected \[B, D\] = \[4, 9\], got \[4, 8\]"):
        masked_mean_pool_triton.forward(hidden, None, out=bank[0, :, :8])


@pytest.mark.parametrize("splits", [1, 3])
def test_pool_never_adds_what_is_masked_and_keeps_examples_apart(splits: int) -> None:
    hidden = hidden_of((3, 20, 10), torch.float32, device=DEVICE)
    mask = mask_of((3, 20), torch.bool, DEVICE)
    config = PoolConfig(4, 16, splits, 4)
    clean = masked_mean_pool_triton.forward(hidden, mask, config=config)
    dirty = hidden.masked_fill(~mask[..., None], float("nan"))
    assert torch.equal(masked_mean_pool_triton.forward(dirty, mask, config=config), clean)
    dirty[1] = float("nan")
    ours = masked_mean_pool_triton.forward(dirty, mask, config=config)
    assert torch.equal(ours[0::2], clean[0::2])
    grad = torch.full((3, 10), float("inf"), device=DEVICE)
    assert torch.equal(
        masked_mean_pool_triton.backward(grad, mask, 20)[~mask].abs().sum(), torch.zeros((), device=DEVICE)
    )


# --- layerwise_ensemble -------------------------------------------------------------------------------------------


def check_ensemble(
    case: Case, dtype: torch.dtype, config: ProductConfig | None = None, *, twice: bool = not INTERPRETED
) -> None:
    arguments = case.draw(dtype, DEVICE)
    eager, exact = eager_forward(*arguments), eager_forward(*wide(arguments))
    ours = layerwise_ensemble_triton.forward(*arguments, config=config)
    for name, *results in zip(
        ("logits", "layer_logits", "zeroed", "zeroed_layers"), ours, eager, exact, strict=False
    ):
        check(name, *results)
    assert [tuple(t.shape) for t in ours] == [tuple(t.shape) for t in eager]
    if twice:
        again = layerwise_ensemble_triton.forward(*arguments, config=config)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))

    grads = [torch.randn_like(t) if t.numel() else None for t in exact[:4]]
    if not case.zeroed:
        grads[2:] = [None, None]
    narrow = [None if g is None else g.to(dtype) for g in grads]
    needs = needs_of(case)
    # Everyone starts from the same saved tensors, so that the gradient alone is compared.
    saved = backward_arguments(arguments, eager, narrow, needs)
    given = layerwise_ensemble_backward_triton.backward(*saved)
    names = [*NEEDS[:-1], *[f"tap {i}" for i in range(len(arguments[0]))]]
    terms = terms_of(arguments, eager)
    results = zip(names, given, eager_backward(*saved), eager_backward(*wide(saved)), strict=True)
    for bit, (name, one, two, three) in enumerate(results):
        if needs >> min(bit, len(NEEDS) - 1) & 1:
            check(name, one, two, three, terms.get(name, 0.0))
        else:
            assert not one.numel(), name
    if twice:
        again = layerwise_ensemble_backward_triton.backward(*saved)
        assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_ensemble(name: str, dtype: torch.dtype) -> None:
    check_ensemble(CASES[name], dtype)


def test_the_same_inputs_give_the_same_bits() -> None:
    check_ensemble(Case((33, 33), zeroed=False), torch.float32, SMALL, twice=True)


@pytest.mark.parametrize("bank", [True, False])
def test_ensemble_with_its_sum_in_parts(bank: bool) -> None:
    check_ensemble(Case((33, 33) if bank else (33, 3), bank=bank), torch.float32, SMALL)


def test_gradients_with_their_sum_over_examples_in_parts() -> None:
    check_ensemble(Case((8,), batch=100, view=3, hidden=4, outputs=2, activation=3, zeroed=False), torch.float32)


@pytest.mark.parametrize("bank", [True, False])
def test_a_nan_in_one_example_reaches_no_other(bank: bool) -> None:
    arguments = Case(bank=bank, batch=6, activation=1).draw(torch.float32, DEVICE)
    view, keep = arguments[1], arguments[2]
    view[4] = float("inf")
    keep[4] = False  # a dropped view's infinity must not even reach its own example
    keep[5] = True
    clean = layerwise_ensemble_triton.forward(*arguments)
    assert clean[1].isfinite().all()
    for tap in arguments[0]:
        tap[..., 2, :] = float("nan")
    view[5] = float("nan")
    dirty = layerwise_ensemble_triton.forward(*arguments)
    assert torch.equal(dirty[1][:, [0, 1, 3, 4]], clean[1][:, [0, 1, 3, 4]])
    assert dirty[1][:, [2, 5]].isnan().all()
    assert torch.equal(dirty[3][:, [0, 1, 3, 4, 5]], clean[3][:, [0, 1, 3, 4, 5]])  # the view zeroed

    grads = [torch.randn_like(clean[0]), None, None, None]
    saved = backward_arguments(arguments, dirty, grads, 1 << NEEDS.index("view"))
    view_grad = layerwise_ensemble_backward_triton.backward(*saved)[0]
    assert view_grad[[0, 1, 3, 4]].isfinite().all() and not view_grad[4].any()


# --- layerwise_loss -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 33, 1), (2, 6, 1030), (2, 3, 2)])
def test_loss(shape: tuple[int, int, int], problem: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    if problem:
        target = torch.rand(shape[1:], device=DEVICE)
    else:
        target = torch.randint(0, shape[2], shape[1:2], device=DEVICE)
        target[1] = -100
    ours, gradient = layerwise_loss_triton.forward(logits, target, problem, True)
    eager, eager_gradient = eager_loss(logits, target, problem, True)
    double = logits.double().requires_grad_()
    exact = torch.stack([double_loss(row, target, problem) for row in double]).mean()
    exact.backward()
    assert double.grad is not None
    check("loss", ours, eager, exact.detach())
    check("gradient", gradient, eager_gradient, double.grad)
    value, empty = layerwise_loss_triton.forward(logits, target, problem, False)
    assert torch.equal(value, ours) and not empty.numel()
    scaled = layerwise_loss_triton.backward(torch.tensor(0.5, device=DEVICE), gradient, logits)
    assert torch.equal(scaled, (gradient * 0.5).to(dtype))


def test_an_ignored_example_is_not_read_and_none_counting_makes_nan() -> None:
    logits = torch.randn(2, 4, 5, device=DEVICE)
    target = torch.tensor([1, -100, 2, -100], device=DEVICE)
    clean, clean_gradient = layerwise_loss_triton.forward(logits, target, 0, True)
    logits[:, 1::2] = float("nan")
    dirty, gradient = layerwise_loss_triton.forward(logits, target, 0, True)
    assert torch.equal(clean, dirty) and torch.equal(clean_gradient, gradient)
    assert not gradient[:, 1::2].any()
    none, gradient = layerwise_loss_triton.forward(logits, torch.full_like(target, -100), 0, True)
    assert none.isnan() and not gradient.any()


def test_a_label_out_of_range_shows_as_nan() -> None:
    logits = torch.randn(1, 2, 3, device=DEVICE)
    assert layerwise_loss_triton.forward(logits, torch.tensor([0, 3], device=DEVICE), 0, False)[0].isnan()


# --- through the public ops ---------------------------------------------------------------------------------------


@pytest.fixture
def dispatched() -> Iterator[None]:
    """On the CPU, puts the interpreted kernels in the place of the compiled ones; a GPU has them there anyway."""
    if not INTERPRETED:
        yield
        return
    library = torch.library.Library("levi_fast", "IMPL")
    for name, function in triton_dispatch.OPS.items():
        library.impl(name, function, "CPU", allow_override=True)
    yield
    library._destroy()


@pytest.mark.usefixtures("dispatched")
def test_a_model_trains_as_the_reference_does() -> None:
    torch.manual_seed(1)
    kwargs: dict[str, Any] = {"hidden_width": 8, "mix": "learned", "view_dropout": 0.0}
    theirs = reference.LayerwiseEnsemble((12, 12), 5, 3, **kwargs).to(DEVICE)
    ours = levi_fast.LayerwiseEnsemble((12, 12), 5, 3, **kwargs).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    taps, target = torch.randn(2, 16, 12, device=DEVICE), torch.randint(0, 3, (16,), device=DEVICE)
    kind = "single_label_classification"
    curves = []
    for model, loss_of in ((theirs, reference.layerwise_loss), (ours, levi_fast.functional.layerwise_loss)):
        view = torch.linspace(-1, 1, 80, device=DEVICE).reshape(16, 5).requires_grad_()
        optimizer = torch.optim.SGD([*model.parameters(), view], lr=0.3)
        losses = []
        for _ in range(3):
            loss = loss_of(model(taps, view).layer_logits, target, kind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.usefixtures("dispatched")
def test_what_the_kernels_do_not_take_goes_to_the_eager_twin() -> None:
    case = replace(Case(), dropout=0.0)
    double = wide(case.draw(torch.float32, DEVICE))
    assert layerwise_ensemble_triton.declined(*double[:10]) is not None
    ours = torch.ops.levi_fast.layerwise_ensemble(*double)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager_forward(*double), strict=True))
    short = case.draw(torch.float32, DEVICE)
    short[5] = short[5][:, :-1]
    with pytest.raises(RuntimeError):
        torch.ops.levi_fast.layerwise_ensemble(*short)


# --- drawn shapes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn(), split=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_ensembles_of_any_shape(case: Case, split: bool, dtype: torch.dtype) -> None:
    check_ensemble(case, dtype, SMALL if split else None)
