"""The loss beside its peers, and what a call of each op costs before any work."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.bench.ensemble import KIND
from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.timing import compared, interleaved, timed

AXES = ("L", "B", "C")
LOSS_CASES = [(6, 1, 2), (6, 32, 2), (12, 32, 1000), (4, 4096, 9)]


class LossCase:
    """The layer-wise cross-entropy of one shape in one dtype, forward and backward.

    Args:
        shape: L, B, C.
        dtype: of the logits.
        peers: of them "eager" and "hand-batched" are known.
    """

    backward = True

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, peers: Sequence[str]) -> None:
        self.shape, self.dtype = shape, dtype
        self.logits, self.target = torch.randn(shape).to(dtype), torch.randint(shape[2], (shape[1],))
        self.calls: dict[str, Callable[..., Tensor]] = {"ours": functional.layerwise_loss}
        if "eager" in peers:
            self.calls["eager"] = reference.layerwise_loss
        if "hand-batched" in peers:
            self.calls["hand-batched"] = self._flat

    def _flat(self, y: Tensor, labels: Tensor, _: str) -> Tensor:
        return F.cross_entropy(y.flatten(0, 1).float(), labels.repeat(self.shape[0]))

    def prepare(self, _: int) -> tuple[Tensor]:
        """Logits that ask for a gradient."""
        return (self.logits.detach().requires_grad_(),)

    def call(self, name: str, y: Tensor) -> None:
        """What is timed: one call of a contender and its backward pass."""
        self.calls[name](y, self.target, KIND).backward()

    def run(self, name: str, index: int) -> float:
        """Seconds of one call of a contender."""
        inputs = self.prepare(index)
        return timed(lambda: self.call(name, *inputs))

    def check(self) -> None:
        """Compare with float64.

        Raises:
            WrongResultError: our error is more than twice that of PyTorch's own loss.
        """
        exact = self._flat(self.logits.double(), self.target, KIND)
        error, theirs = (
            float((call(self.logits, self.target, KIND).double() - exact).abs())
            for call in (self.calls["ours"], self._flat)
        )
        if error > 2 * theirs + 1e-6 * float(exact.abs()):
            raise WrongResultError(
                f"layerwise_loss at {self.shape} in {self.dtype}: error {error}, PyTorch's own {theirs}"
            )

    def bytes(self) -> int:
        """What must move in one call: logits read twice, their gradient written, the target."""
        return 3 * self.logits.numel() * self.dtype.itemsize + self.target.nbytes


def loss_row(shape: tuple[int, int, int], dtype: torch.dtype, peers: Sequence[str], seconds: float) -> dict[str, Any]:
    """One row of :class:`LossCase`."""
    case = LossCase(shape, dtype, peers)
    case.check()
    times = interleaved({name: partial(case.run, name) for name in case.calls}, seconds, 20)
    return {"case": dict(zip(AXES, shape, strict=True)), "dtype": str(dtype)[6:], "pass": "forward+backward",
            **compared(times)}  # fmt: skip


class SmallestCalls:
    """Every op on the smallest input there is, beside one ATen call of each kind: :attr:`calls`, by name."""

    def __init__(self) -> None:
        self.model, self.calls = _smallest_calls()

    def prepare(self, _: int) -> tuple[()]:
        """Leave no gradient of an earlier call."""
        self.model.zero_grad()
        return ()

    def call(self, name: str) -> None:
        """What is timed."""
        with torch.set_grad_enabled("gradient" in name or "backward" in name):
            self.calls[name]()

    def run(self, name: str, index: int) -> float:
        """Seconds of one call."""
        self.prepare(index)
        with torch.set_grad_enabled("gradient" in name or "backward" in name):
            return timed(self.calls[name])


def call_overhead(seconds: float) -> dict[str, float]:
    """Median microseconds of each of :class:`SmallestCalls`."""
    case = SmallestCalls()
    times = interleaved({name: partial(case.run, name) for name in case.calls}, seconds, 500)
    return {name: round(statistics.median(values) * 1e6, 2) for name, values in times.items()}


def _smallest_calls() -> tuple[levi_fast.LayerwiseEnsemble, dict[str, Callable[[], Any]]]:
    model = levi_fast.LayerwiseEnsemble([1], 1, 1, hidden_width=1, view_dropout=0.0)
    a, tiny = torch.ones(1, 1), torch.ones(1, 1, 1)
    taps, view, asking = torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
    logits, target = torch.ones(1, 1, 1), torch.zeros(1, dtype=torch.int64)
    wants, pooled = logits.clone().requires_grad_(), tiny.clone().requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        "aten_addmm": lambda: torch.addmm(a, a, a),
        "aten_addmm_recording_a_gradient": lambda: torch.addmm(asking, a, a),
        "aten_addmm_forward_and_backward": lambda: torch.addmm(asking, a, a).backward(a),
        "aten_mean": lambda: tiny.mean(1),
        "pooling": lambda: functional.masked_mean_pool(tiny),
        "pooling_recording_a_gradient": lambda: functional.masked_mean_pool(pooled),
        "ensemble_module": lambda: model(taps, view),
        "ensemble_module_forward_and_backward": lambda: model(taps, view).layer_logits.backward(logits),
        "loss": lambda: functional.layerwise_loss(logits, target, KIND),
        "loss_recording_a_gradient": lambda: functional.layerwise_loss(wants, target, KIND),
    }
    return model, calls | _without_python(model, taps, view, logits, target, tiny)


def _without_python(
    model: levi_fast.LayerwiseEnsemble, taps: Tensor, view: Tensor, logits: Tensor, target: Tensor, hidden: Tensor
) -> dict[str, Callable[[], Any]]:
    """The native ops as torch.ops calls them; none where the native library is not loaded."""
    from levi_fast.kernels import native

    if not native.load().loaded:
        return {}
    ops, m = torch.ops.levi_fast, model
    assert m.view_weight is not None and m.output_weight is not None and m.output_bias is not None
    direct = (
        [taps], view, None, m.tap_weight.detach(), m.view_weight.detach(), m.bias.detach(), m.output_weight.detach(),
        m.output_bias.detach(), None, None, 0, True, 0.0, False, False,
    )  # fmt: skip
    return {
        "pooling_op_direct": lambda: ops.masked_mean_pool.default(hidden, None),
        "ensemble_op_direct": lambda: ops.layerwise_ensemble.default(*direct),
        "loss_op_direct": lambda: ops.layerwise_loss.default(logits, target, 0, False),
    }
