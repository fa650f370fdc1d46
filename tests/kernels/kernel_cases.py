"""What the tests of the GPU kernels share: drawn inputs, and the bound that errors are held to.

Imported by triton_cases.py and test_cuda.py (tests/kernels is on pytest's path); nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from levi_fast.kernels.layerwise_ensemble_eager import NEEDS
from levi_fast.kernels.masked_mean_pool import eager_forward as eager_pool


def fill_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
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


def check(name: str, ours: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0) -> None:
    """Our error is at most twice same-dtype eager's, or two roundings of the result where eager has next to none.

    The largest of a few errors is a matter of luck, eager's too: of n results up to 2 + 8 / sqrt(n) times its error.

    ``terms``: of a sum that may cancel, the magnitude it has where it does not; a rounding is relative to that.
    """
    assert ours.shape == exact.shape, f"{name}: {ours.shape} for {exact.shape}"
    if not exact.numel():
        return
    scale = max(exact.abs().max().item(), terms)
    rounding = 4 * torch.finfo(ours.dtype).eps * scale
    error = (ours.double() - exact).abs().max().item()
    allowed = (2 + 8 * exact.numel() ** -0.5) * (eager.double() - exact).abs().max().item() + rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}, scale {scale:.3g}"


def terms_of(arguments: list[Any], outputs: Sequence[Tensor]) -> dict[str, float]:
    """``terms`` of the gradients that are a few sums over the batch of standard normal numbers, which may cancel."""
    batch, width = arguments[0][0].shape[-2], outputs[0].shape[-1]
    return {"bias": batch**0.5, "output_bias": batch**0.5, "mix_weights": (batch * width) ** 0.5}


def check_pool(ours: Tensor, hidden: Tensor, mask: Tensor | None) -> None:
    """A mean of many numbers cancels most of them."""
    pooled, exact, terms = (eager_pool(h, mask) for h in (hidden, hidden.double(), hidden.double().abs()))
    check("pool", ours, pooled, exact, terms.max().item() / 2 if terms.numel() else 0.0)


# --- inputs ---------------------------------------------------------------------------------------------------------


def hidden_of(shape: tuple[int, ...], dtype: torch.dtype, strides: str = "contiguous", device: str = "cpu") -> Tensor:
    """Hidden states [B, T, D] with the strides named."""
    batch, length, width = shape
    if strides == "contiguous":
        return torch.randn(shape, device=device).to(dtype)
    if strides == "transposed":
        return torch.randn(width, length, batch, device=device).to(dtype).permute(2, 1, 0)
    return torch.randn(batch, 2 * length + 1, width + 3, device=device).to(dtype)[:, 1::2, :width]


def mask_of(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A mask [B, T] that keeps some tokens; of the first example none, where there are several."""
    mask = torch.rand(shape[0], shape[1], device=device) > 0.4
    if shape[0] > 1:
        mask[0] = False
    return (mask * 3).to(dtype) if dtype != torch.bool else mask


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

    def draw(self, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
        """The arguments of the forward op."""
        layers, first = len(self.widths), self.hidden or self.outputs

        def normal(*shape: int, scale: float = 0.3) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        if self.bank:
            taps = [normal(layers, self.batch, self.widths[0], scale=2.0) + 1]
        else:
            taps = [
                normal(self.batch, width + 3, scale=2.0)[:, :width]
                if i % 2
                else normal(width, self.batch, scale=2.0).T
                for i, width in enumerate(self.widths)
            ]
        chance = torch.rand(layers, self.batch, first, device=device)
        return [
            taps,
            normal(self.batch, self.view, scale=1.0) if self.view else None,
            torch.rand(self.batch, device=device) > 0.4 if self.keep and self.view else None,
            normal(sum(self.widths), first),
            normal(self.view, layers, first) if self.view else None,
            normal(layers, first),
            normal(self.outputs, layers, first) if self.hidden else None,
            normal(layers, self.outputs) if self.hidden else None,
            torch.rand(layers, device=device).softmax(0) if self.mix else None,
            chance >= self.dropout if self.dropout and self.hidden else None,
            self.activation,
            self.normalize,
            self.dropout if self.hidden else 0.0,
            self.zeroed,
            True,
        ]


def needs_of(case: Case, taps: bool = True) -> int:
    """The bits of all gradients that the case has."""
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
    """The backward op's arguments, from the forward op's and its results."""
    taps, view, keep, tap_weight, view_weight, _, output_weight, _, mix, hidden_keep, *options = arguments
    inputs = [taps, view, keep, tap_weight, view_weight, output_weight, mix, hidden_keep]
    return [*grads, *inputs, outputs[1], *outputs[3:6], *options[:3], needs]


CASES = {
    "bank": Case(),
    "no view": Case((20,), view=0, activation=1, batch=17, zeroed=False),
    "unequal": Case((9, 17, 5, 8, 3, 4, 5, 6, 7), bank=False, hidden=4, activation=2, mix=False, zeroed=False),
    "linear": Case((16, 24), bank=False, hidden=None, batch=3, view=20, outputs=2),
    "view alone": Case((0, 0), bank=False, view=20, hidden=4, activation=3, keep=False, dropout=0.0),
    "one layer, one example": Case((40,), batch=1, mix=False, zeroed=False, normalize=False, outputs=1),
    "no examples": Case(batch=0),
}


def double_loss(logits: Tensor, target: Tensor, problem: int) -> Tensor:
    """One layer's loss in float64, by PyTorch."""
    if problem == 0:
        return F.cross_entropy(logits, target)
    target = target.double()
    return F.binary_cross_entropy_with_logits(logits, target) if problem == 1 else F.mse_loss(logits, target)


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    """Ensembles of any shape."""
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
