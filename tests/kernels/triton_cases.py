"""The Triton kernels against float64, on a GPU, or interpreted on the CPU; test_triton.py runs this file either way.

The interpreter must be asked for before Triton is first imported, and transformers imports it: so this file is no
test module of the ordinary run. By hand: TRITON_INTERPRET=1 pytest tests/kernels/triton_cases.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

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

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))


def wide(value: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [wide(v) for v in value] if isinstance(value, list) else value


def check(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Our error is at most twice same-dtype eager's, or a rounding of the result where eager has next to none."""
    assert ours.shape == exact.shape, f"{name}: {ours.shape} for {exact.shape}"
    if not exact.numel():
        return
    scale = exact.abs().max().item()
    rounding = 2 * torch.finfo(ours.dtype).eps * scale
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item() + rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"


# --- masked_mean_pool ---------------------------------------------------------------------------------------------


def hidden_of(shape: tuple[int, ...], dtype: torch.dtype, strides: str = "contiguous") -> Tensor:
    batch, length, width = shape
    if strides == "contiguous":
        return torch.randn(shape, device=DEVICE).to(dtype)
    if strides == "transposed":
        return torch.randn(width, length, batch, device=DEVICE).to(dtype).permute(2, 1, 0)
    return torch.randn(batch, 2 * length + 1, width + 3, device=DEVICE).to(dtype)[:, 1::2, :width]


def mask_of(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    mask = torch.rand(shape[0], shape[1], device=DEVICE) > 0.4
    if shape[0] > 1:
        mask[0] = False
    return (mask * 3).to(dtype) if dtype != torch.bool else mask


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
    hidden = hidden_of(shape, dtype, strides)
    mask = None if mask_dtype is None else mask_of(shape, mask_dtype)
    config = PoolConfig(4, 32, splits, 4)
    ours = masked_mean_pool_triton.forward(hidden, mask, config=config)
    check("pool", ours, eager_pool(hidden, mask), eager_pool(hidden.double(), mask))
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
    hidden = hidden_of((4, 6, 9), torch.float32)
    masked_mean_pool_triton.forward(hidden, None, normalize=True, out=bank[1])
    assert torch.allclose(bank[1], F.layer_norm(hidden.mean(1), (9,)), atol=1e-5)
    assert torch.equal(bank[::2], torch.full((2, 4, 9), 7.0, device=DEVICE))
    with pytest.raises(ValueError, match=r"out: expected \[B, D\] = \[4, 9\], got \[4, 8\]"):
        masked_mean_pool_triton.forward(hidden, None, out=bank[0, :, :8])


@pytest.mark.parametrize("splits", [1, 3])
def test_pool_never_adds_what_is_masked_and_keeps_examples_apart(splits: int) -> None:
    hidden = hidden_of((3, 20, 10), torch.float32)
    mask = mask_of((3, 20), torch.bool)
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


@dataclass(frozen=True)
class Case:
    """An ensemble to draw; without ``bank`` the taps come one by one, every other one transposed or sliced."""

    widths: tuple[int, ...] = (20, 20, 20)
    batch: int = 5
    view: int = 7
    hidden: int | None = 9
    outputs: int = 3
    activation: int = 0
    bank: bool = True
    normalize: bool = True
    mix: bool = True
    keep: bool = True
    dropout: float = 0.3
    zeroed: bool = True

    def draw(self, dtype: torch.dtype) -> list[Any]:
        """The arguments of the forward op."""
        layers, first = len(self.widths), self.hidden or self.outputs

        def normal(*shape: int, scale: float = 0.3) -> Tensor:
            return (torch.randn(shape, device=DEVICE) * scale).to(dtype)

        if self.bank:
            taps = [normal(layers, self.batch, self.widths[0], scale=2.0) + 1]
        else:
            taps = [
                normal(self.batch, width + 3, scale=2.0)[:, :width]
                if i % 2
                else normal(width, self.batch, scale=2.0).T
                for i, width in enumerate(self.widths)
            ]
        chance = torch.rand(layers, self.batch, first, device=DEVICE)
        return [
            taps,
            normal(self.batch, self.view, scale=1.0) if self.view else None,
            torch.rand(self.batch, device=DEVICE) > 0.4 if self.keep and self.view else None,
            normal(sum(self.widths), first),
            normal(self.view, layers, first) if self.view else None,
            normal(layers, first),
            normal(self.outputs, layers, first) if self.hidden else None,
            normal(layers, self.outputs) if self.hidden else None,
            torch.rand(layers, device=DEVICE).softmax(0) if self.mix else None,
            chance >= self.dropout if self.dropout and self.hidden else None,
            self.activation,
            self.normalize,
            self.dropout if self.hidden else 0.0,
            self.zeroed,
            True,
        ]


def needs_of(case: Case, taps: bool = True) -> int:
    absent = {
        "view": not case.view,
        "view_weight": not case.view,
        "output_weight": not case.hidden,
        "output_bias": not case.hidden,
        "mix_weights": not case.mix,
        "taps": not taps,
    }
    return sum(1 << bit for bit, name in enumerate(NEEDS) if not absent.get(name))


def backward_arguments(arguments: list[Any], outputs: Sequence[Tensor], grads: list[Any], needs: int) -> list[Any]:
    taps, view, keep, tap_weight, view_weight, _, output_weight, _, mix, hidden_keep, *options = arguments
    inputs = [taps, view, keep, tap_weight, view_weight, output_weight, mix, hidden_keep]
    return [*grads, *inputs, outputs[1], *outputs[3:6], *options[:3], needs]


def check_ensemble(
    case: Case, dtype: torch.dtype, config: ProductConfig | None = None, *, twice: bool = not INTERPRETED
) -> None:
    arguments = case.draw(dtype)
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
    results = zip(names, given, eager_backward(*saved), eager_backward(*wide(saved)), strict=True)
    for bit, (name, one, two, three) in enumerate(results):
        if needs >> min(bit, len(NEEDS) - 1) & 1:
            check(name, one, two, three)
        else:
            assert not one.numel(), name
    if twice:
        again = layerwise_ensemble_backward_triton.backward(*saved)
        assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))


CASES = {
    "bank": Case(),
    "no view": Case((20,), view=0, activation=1, batch=17, zeroed=False),
    "unequal": Case((9, 17, 5, 8, 3, 4, 5, 6, 7), bank=False, hidden=4, activation=2, mix=False, zeroed=False),
    "linear": Case((16, 24), bank=False, hidden=None, batch=3, view=20, outputs=2),
    "view alone": Case((0, 0), bank=False, view=20, hidden=4, activation=3, keep=False, dropout=0.0),
    "one layer, one example": Case((40,), batch=1, mix=False, zeroed=False, normalize=False, outputs=1),
    "no examples": Case(batch=0),
}


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
    arguments = Case(bank=bank, batch=6, activation=1).draw(torch.float32)
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
    exact = torch.stack([_double_loss(row, target, problem) for row in double]).mean()
    exact.backward()
    assert double.grad is not None
    check("loss", ours, eager, exact.detach())
    check("gradient", gradient, eager_gradient, double.grad)
    value, empty = layerwise_loss_triton.forward(logits, target, problem, False)
    assert torch.equal(value, ours) and not empty.numel()
    scaled = layerwise_loss_triton.backward(torch.tensor(0.5, device=DEVICE), gradient, logits)
    assert torch.equal(scaled, (gradient * 0.5).to(dtype))


def _double_loss(logits: Tensor, target: Tensor, problem: int) -> Tensor:
    if problem == 0:
        return F.cross_entropy(logits, target)
    target = target.double()
    return F.binary_cross_entropy_with_logits(logits, target) if problem == 1 else F.mse_loss(logits, target)


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
    double = wide(case.draw(torch.float32))
    assert layerwise_ensemble_triton.declined(*double[:10]) is not None
    ours = torch.ops.levi_fast.layerwise_ensemble(*double)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager_forward(*double), strict=True))
    short = case.draw(torch.float32)
    short[5] = short[5][:, :-1]
    with pytest.raises(RuntimeError):
        torch.ops.levi_fast.layerwise_ensemble(*short)


# --- drawn shapes -------------------------------------------------------------------------------------------------


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    bank = draw(st.booleans())
    size = st.integers(3, 40)  # below 3 features a LayerNorm's gradient is all cancellation
    layers = draw(st.integers(1, 4))
    return Case(
        widths=(draw(size),) * layers if bank else tuple(draw(st.lists(size, min_size=layers, max_size=layers))),
        batch=draw(st.integers(0, 40)),
        view=draw(st.sampled_from([0, 3, 17])),
        hidden=draw(st.sampled_from([None, 1, 9, 33])),
        outputs=draw(st.integers(1, 20)),
        activation=draw(st.integers(0, 3)),
        bank=bank,
        normalize=draw(st.booleans()),
        mix=draw(st.booleans()),
        keep=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        zeroed=draw(st.booleans()),
    )


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=drawn(), split=st.booleans(), dtype=st.sampled_from(DTYPES))
def test_ensembles_of_any_shape(case: Case, split: bool, dtype: torch.dtype) -> None:
    check_ensemble(case, dtype, SMALL if split else None)
