"""The CUDA C++ kernels against float64: on a GPU, and block after block on the CPU, where every machine runs them.

The emulated library holds the same kernels and the same launchers (see csrc/cuda/device.h): what it cannot show is
what a GPU's compiler and memory make of them.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cuda_build
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
    hidden_of,
    mask_of,
    needs_of,
    terms_of,
    wide,
)
from torch import Tensor

from levi_fast.kernels import cuda_dispatch, native
from levi_fast.kernels.layerwise_ensemble_eager import NEEDS, eager_backward, eager_forward
from levi_fast.kernels.layerwise_loss import eager_forward as eager_loss
from levi_fast.kernels.masked_mean_pool import eager_backward as eager_pool_backward

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Library:
    """One build of the kernels: its ops, where its tensors live, and how to run its threads the other way round."""

    ops: Any
    device: str
    reverse: Any


@pytest.fixture(scope="session")
def emulated() -> Library:
    reason = cuda_build.missing_tools()
    if reason is not None:
        pytest.skip(reason)
    ready = os.environ.get("LEVI_FAST_EMULATED_LIBRARY")  # test_cuda_build.py's, under sanitizers
    path = Path(ready) if ready else cuda_build.build_emulation()
    torch.ops.load_library(str(path))
    cuda_dispatch.connect("levi_fast_cuda_emulated")
    reverse = ctypes.CDLL(str(path)).levi_fast_emulation_reverse
    return Library(torch.ops.levi_fast_cuda_emulated, "cpu", reverse)


BUILDS = ["emulated", *([pytest.param("gpu", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=BUILDS)
def library(request: pytest.FixtureRequest) -> Library:
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    status = native.load_cuda()
    if status.reason:
        pytest.skip(status.reason)
    return Library(torch.ops.levi_fast_cuda, "cuda", None)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


def twice(library: Library, run: Any) -> Any:
    """The result, which a second run repeats bit by bit, in the other order where there is one."""
    first = run()
    if library.reverse is not None:
        library.reverse(1)
    try:
        second = run()
    finally:
        if library.reverse is not None:
            library.reverse(0)
    tensors = [[r] if isinstance(r, Tensor) else r for r in (first, second)]
    assert same(*tensors)
    return first


# --- masked_mean_pool ---------------------------------------------------------------------------------------------


def check_both_pools(library: Library, hidden: Tensor, mask: Tensor | None) -> None:
    batch, length, width = hidden.shape
    ours = twice(library, lambda: library.ops.masked_mean_pool(hidden, mask))
    check_pool(ours, hidden, mask)
    grad = torch.randn(width, batch, device=library.device).to(hidden.dtype).T
    check(
        "gradient",
        twice(library, lambda: library.ops.masked_mean_pool_backward(grad, mask, length)),
        eager_pool_backward(grad, mask, length),
        eager_pool_backward(grad.double(), mask, length),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(
    ("shape", "strides", "mask_dtype"),
    [
        ((3, 5, 7), "transposed", torch.bool),
        ((2, 300, 40), "contiguous", torch.int64),  # few examples: its tokens are cut into parts
        ((2, 37, 70), "sliced", torch.int32),
        ((1, 1, 1), "contiguous", None),
        ((4, 9, 33), "contiguous", torch.float32),
        ((2, 20, 1040), "contiguous", torch.int16),  # more than one tile of features
        ((5, 3, 16), "contiguous", torch.float64),
    ],
)
def test_pool(library: Library, dtype: torch.dtype, shape: Any, strides: str, mask_dtype: Any) -> None:
    hidden = hidden_of(shape, dtype, strides, library.device)
    check_both_pools(library, hidden, None if mask_dtype is None else mask_of(shape, mask_dtype, library.device))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 5), (2, 3, 0)])
def test_pool_of_nothing(library: Library, shape: tuple[int, ...]) -> None:
    hidden, mask = torch.ones(shape, device=library.device), torch.ones(shape[:2], device=library.device)
    zeros = torch.zeros(shape[0], shape[2], device=library.device)
    assert torch.equal(library.ops.masked_mean_pool(hidden, mask), zeros)
    assert library.ops.masked_mean_pool_backward(zeros, mask, shape[1]).shape == shape


@pytest.mark.parametrize("length", [20, 300])
def test_pool_never_adds_what_is_masked_and_keeps_examples_apart(library: Library, length: int) -> None:
    hidden = hidden_of((3, length, 16), torch.float32, device=library.device)
    mask = mask_of((3, length), torch.float16, library.device)
    mask[1, 0] = -0.0  # zero too
    clean = library.ops.masked_mean_pool(hidden, mask)
    dirty = hidden.masked_fill((mask == 0)[..., None], float("nan"))
    assert torch.equal(library.ops.masked_mean_pool(dirty, mask), clean)
    dirty[1] = float("nan")
    assert torch.equal(library.ops.masked_mean_pool(dirty, mask)[0::2], clean[0::2])
    grad = torch.full((3, 16), float("inf"), device=library.device)
    assert not library.ops.masked_mean_pool_backward(grad, mask, length)[mask == 0].any()


# --- layerwise_ensemble -------------------------------------------------------------------------------------------


def check_ensemble(library: Library, case: Case, dtype: torch.dtype, *, saved: bool = True) -> None:
    arguments = case.draw(dtype, library.device)
    arguments[-1] = saved
    eager, exact = eager_forward(*arguments), eager_forward(*wide(arguments))
    ours = twice(library, lambda: library.ops.layerwise_ensemble(*arguments))
    assert [tuple(t.shape) for t in ours] == [tuple(t.shape) for t in eager]
    names = ("logits", "layer_logits", "zeroed", "zeroed_layers", "before", "before_zeroed")
    for name, *results in zip(names, ours, eager, exact, strict=True):
        check(name, *results)
    if not saved:
        return
    for mixed, apart in ((True, True), (True, False), (False, True)):
        grads = [torch.randn_like(t) if t.numel() else None for t in exact[:4]]
        grads[0::2] = [g if mixed else None for g in grads[0::2]]
        grads[1::2] = [g if apart else None for g in grads[1::2]]
        if not case.zeroed:
            grads[2:] = [None, None]
        check_backward(library, case, dtype, arguments, eager, grads)


def check_backward(
    library: Library, case: Case, dtype: torch.dtype, arguments: list[Any], eager: Any, grads: list[Any]
) -> None:
    needs = needs_of(case)
    # Everyone starts from the same saved tensors, so that the gradient alone is compared.
    narrow = [None if g is None else g.to(dtype) for g in grads]
    saved = backward_arguments(arguments, eager, narrow, needs)
    given = twice(library, lambda: library.ops.layerwise_ensemble_backward(*saved))
    names = [*NEEDS[:-1], *[f"tap {i}" for i in range(len(arguments[0]))]]
    results = zip(names, given, eager_backward(*saved), eager_backward(*wide(saved)), strict=True)
    terms = terms_of(arguments, eager)
    for bit, (name, one, two, three) in enumerate(results):
        if needs >> min(bit, len(NEEDS) - 1) & 1:
            check(name, one, two, three, terms.get(name, 0.0))
        else:
            assert not one.numel(), name


MORE_CASES = CASES | {
    "packs": Case((32, 32, 32), batch=9, view=16, hidden=64, outputs=8),
    "many taps": Case((4,) * 33, batch=2, view=0, hidden=8, outputs=2, bank=False, zeroed=False),
    "many examples": Case((8,), batch=150, view=3, hidden=8, outputs=2, activation=2, zeroed=False),
    "wide rows": Case((2304, 8), batch=3, view=520, hidden=8, outputs=2, bank=False, activation=3),
    "as they came": Case((12, 12), batch=4, normalize=False, bank=False, keep=False),
    "a kept view as it came": Case((12, 12), batch=4, normalize=False, hidden=None),
}


@pytest.mark.parametrize("name", MORE_CASES)
def test_ensemble(library: Library, name: str) -> None:
    for dtype in DTYPES:
        check_ensemble(library, MORE_CASES[name], dtype)


def test_ensemble_saves_nothing_unasked(library: Library) -> None:
    check_ensemble(library, Case(zeroed=False), torch.float32, saved=False)


@pytest.mark.parametrize("need", NEEDS)
def test_one_gradient_alone(library: Library, need: str) -> None:
    case = Case((6, 6), bank=False)
    arguments = case.draw(torch.float32, library.device)
    outputs = eager_forward(*arguments)
    grads = [torch.randn_like(t) for t in outputs[:4]]
    saved = backward_arguments(arguments, outputs, grads, 1 << NEEDS.index(need))
    expected = eager_backward(*backward_arguments(arguments, outputs, grads, needs_of(case)))
    given = library.ops.layerwise_ensemble_backward(*saved)
    for name, one, two in zip([*NEEDS, "taps"], given, expected, strict=True):
        assert one.numel() == (two.numel() if name == need else 0)
        if name == need:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_only_the_zeroed_prediction_has_a_gradient(library: Library) -> None:
    case = Case()
    arguments = case.draw(torch.float32, library.device)
    outputs = eager_forward(*arguments)
    grads = [None, None, torch.randn_like(outputs[2]), torch.randn_like(outputs[3])]
    check_backward(library, case, torch.float32, arguments, outputs, grads)
    nothing = backward_arguments(arguments, outputs, [None] * 4, needs_of(case))
    assert not any(t.any() for t in library.ops.layerwise_ensemble_backward(*nothing))


@pytest.mark.parametrize("bank", [True, False])
def test_a_nan_in_one_example_reaches_no_other(library: Library, bank: bool) -> None:
    arguments = Case(bank=bank, batch=6, activation=1).draw(torch.float32, library.device)
    view, keep = arguments[1], arguments[2]
    view[4] = float("inf")
    keep[4] = False  # a dropped view's infinity must not even reach its own example
    keep[5] = True
    clean = library.ops.layerwise_ensemble(*arguments)
    assert clean[1].isfinite().all()
    for tap in arguments[0]:
        tap[..., 2, :] = float("nan")
    view[5] = float("nan")
    dirty = library.ops.layerwise_ensemble(*arguments)
    assert torch.equal(dirty[1][:, [0, 1, 3, 4]], clean[1][:, [0, 1, 3, 4]])
    assert dirty[1][:, [2, 5]].isnan().all()
    assert torch.equal(dirty[3][:, [0, 1, 3, 4, 5]], clean[3][:, [0, 1, 3, 4, 5]])  # the view zeroed
    grads = [torch.randn_like(clean[0]), None, None, None]
    saved = backward_arguments(arguments, dirty, grads, 1 << NEEDS.index("view"))
    view_grad = library.ops.layerwise_ensemble_backward(*saved)[0]
    assert view_grad[[0, 1, 3, 4]].isfinite().all() and not view_grad[4].any()


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (5, lambda t: t[:, :-1], r"layerwise_ensemble: bias must have shape \[3, 9\], got \[3, 8\]"),
        (3, lambda t: t.double(), "serve float32, bfloat16 and float16, not float64; use the eager backend"),
        (6, lambda t: None, "output_weight and output_bias must come together"),
        (1, lambda t: t.half(), "view must have tap_weight's dtype, float32, got float16"),
        (9, lambda t: t.float(), "hidden_keep must be bool, got float32"),
        (10, lambda t: 4, "activation must be 0, 1, 2 or 3, got 4"),
        (0, lambda t: [], "taps must hold at least one tensor, got none"),
    ],
)
def test_what_does_not_fit_is_named(library: Library, position: int, change: Any, message: str) -> None:
    arguments = Case().draw(torch.float32, library.device)
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=message):
        library.ops.layerwise_ensemble(*arguments)


# --- layerwise_loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 33, 1), (2, 3, 1030), (2, 90, 40), (1, 2, 5000)])
def test_loss(library: Library, shape: tuple[int, int, int], problem: int) -> None:
    for dtype in (*DTYPES, torch.float64):
        logits = (torch.randn(shape, device=library.device) * 3).to(dtype)
        if problem:
            target = torch.rand(shape[1:], device=library.device)
        else:
            target = torch.randint(0, shape[2], (2 * shape[1],), device=library.device)[::2]
            target[1] = -100
        ours, gradient = twice(library, lambda: library.ops.layerwise_loss(logits, target, problem, True))  # noqa: B023
        eager, eager_gradient = eager_loss(logits, target, problem, True)
        double = logits.double().requires_grad_()
        exact = torch.stack([double_loss(row, target, problem) for row in double]).mean()
        exact.backward()
        assert double.grad is not None
        check("loss", ours, eager, exact.detach())
        check("gradient", gradient, eager_gradient, double.grad)
        value, empty = library.ops.layerwise_loss(logits, target, problem, False)
        assert torch.equal(value, ours) and not empty.numel()
        half = torch.tensor(0.5, device=library.device)
        scaled = library.ops.layerwise_loss_backward(half, gradient, logits)
        assert torch.equal(scaled, (gradient * 0.5).to(dtype))


def test_an_ignored_example_is_not_read_and_none_counting_makes_nan(library: Library) -> None:
    logits = torch.randn(2, 4, 5, device=library.device)
    target = torch.tensor([1, -100, 2, -100], device=library.device)
    clean = library.ops.layerwise_loss(logits, target, 0, True)
    logits[:, 1::2] = float("nan")
    dirty = library.ops.layerwise_loss(logits, target, 0, True)
    assert same(clean, dirty) and not dirty[0].isnan() and not dirty[1][:, 1::2].any()
    none, gradient = library.ops.layerwise_loss(logits, torch.full_like(target, -100), 0, True)
    assert none.isnan() and not gradient.any()
    assert library.ops.layerwise_loss(logits[:, :0], target[:0], 0, False)[0].isnan()


def test_odd_logits_and_labels(library: Library) -> None:
    inside = torch.tensor([0, 3], device=library.device)
    assert library.ops.layerwise_loss(torch.randn(1, 2, 3, device=library.device), inside, 0, False)[0].isnan()
    masked = torch.randn(2, 3, 40, device=library.device)
    masked[..., 5:] = -torch.inf  # as classes are masked out
    target = torch.tensor([0, 1, 2], device=library.device)
    ours, gradient = library.ops.layerwise_loss(masked, target, 0, True)
    torch.testing.assert_close(ours, F.cross_entropy(masked.flatten(0, 1), target.repeat(2)))
    assert gradient.isfinite().all() and not gradient[..., 5:].any()
    masked[0, 0, 0] = float("nan")
    assert library.ops.layerwise_loss(masked, target, 0, False)[0].isnan()


# --- as ops of PyTorch --------------------------------------------------------------------------------------------


def test_opcheck(library: Library) -> None:
    ops, device = library.ops, library.device
    hidden = torch.randn(2, 3, 4, device=device, requires_grad=True)
    torch.library.opcheck(ops.masked_mean_pool.default, (hidden, torch.tensor([[1, 0, 1], [0, 0, 0]], device=device)))
    logits = torch.randn(2, 4, 3, device=device, requires_grad=True)
    torch.library.opcheck(ops.layerwise_loss.default, (logits, torch.tensor([0, 2, -100, 1], device=device), 0, True))
    for case in (Case(), Case((8, 5), bank=False, hidden=None, zeroed=False)):
        arguments = case.draw(torch.float32, device)
        arguments = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
        torch.library.opcheck(ops.layerwise_ensemble.default, tuple(arguments))


def test_a_model_trains_as_the_eager_twin_does(library: Library) -> None:
    runs = cuda_dispatch.connected("levi_fast_cuda_emulated" if library.device == "cpu" else "levi_fast_cuda")
    case = Case((12, 12), batch=16, view=5, hidden=8, zeroed=False, keep=False)
    curves = []
    for ensemble, loss in ((None, None), (runs["layerwise_ensemble"], runs["layerwise_loss"])):
        torch.manual_seed(3)
        arguments = case.draw(torch.float32, library.device)[:-1]
        target = torch.randint(0, 3, (16,), device=library.device)
        weights = [a.requires_grad_() for a in arguments[3:8]]
        optimizer = torch.optim.SGD(weights, lr=0.3)
        losses = []
        for _ in range(4):
            if ensemble is None or loss is None:
                layer_logits = eager_with_gradients(arguments)
                value = F.cross_entropy(layer_logits.flatten(0, 1), target.repeat(2))
            else:
                value = loss(ensemble(*arguments)[1], target, 0)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            losses.append(value.item())
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0]


def eager_with_gradients(arguments: list[Any]) -> Tensor:
    from levi_fast.kernels.layerwise_ensemble_eager import ensemble

    layer_logits = ensemble(*arguments)[0][1]
    assert layer_logits is not None
    return layer_logits


# --- drawn shapes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn(), dtype=st.sampled_from(DTYPES), odd=st.booleans())
def test_ensembles_of_any_shape(library: Library, case: Case, dtype: torch.dtype, odd: bool) -> None:
    if not odd:  # widths that packs of 16 bytes fit
        case = replace(case, widths=tuple(-(-w // 8) * 8 for w in case.widths), hidden=case.hidden and 16)
    check_ensemble(library, case, dtype)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 400), st.sampled_from([1, 3, 8, 16, 40, 130, 272])),
    strides=st.sampled_from(["contiguous", "transposed", "sliced"]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    mask_dtype=st.sampled_from([None, torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32]),
)
def test_pools_of_any_shape(library: Library, shape: Any, strides: str, dtype: torch.dtype, mask_dtype: Any) -> None:
    hidden = hidden_of(shape, dtype, strides, library.device)
    check_both_pools(library, hidden, None if mask_dtype is None else mask_of(shape, mask_dtype, library.device))
