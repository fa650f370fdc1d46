"""The layer-wise ensemble beside its peers on CPU: forward, forward and backward, and with the loss."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.timing import COLD_BYTES, Rates, compared, interleaved, timed

AXES = ("L", "D", "V", "H", "C", "B")
CASES = [(6, 384, 64, 128, 2, 1), (6, 384, 64, 128, 2, 32), (6, 384, 64, 128, 2, 256), (12, 768, 128, 256, 10, 8),
         (12, 768, 128, 256, 1000, 32), (24, 1024, 128, 512, 5, 64), (32, 4096, 256, 512, 2, 16),
         (4, 768, 128, 256, 9, 4096)]  # fmt: skip
PEERS = ("eager", "hand-batched", "grouped-mm", "compile", "max-autotune")
PRODUCTS = "products"  # timed beside the peers, and none of them: see Products
KIND = "single_label_classification"
LEAST_ROUNDS = 7


class HandBatched(reference.LayerwiseEnsemble):
    """What a careful user writes: all taps in one batched product, all view products in one matrix product."""

    def forward(self, taps: Tensor, view: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        assert self.view_weight is not None and self.output_weight is not None and self.output_bias is not None
        layers, batch, width = taps.shape
        first = self.tap_products(reference.norm(taps), self.tap_weight.view(layers, width, -1))
        views = reference.norm(view) @ self.view_weight.view(self.view_width, -1)
        hidden = F.gelu(first + views.view(batch, layers, -1).transpose(0, 1))
        return torch.baddbmm(self.output_bias[:, None], hidden, self.output_weight.permute(1, 2, 0))

    def tap_products(self, taps: Tensor, weight: Tensor) -> Tensor:
        """[L, B, D] by [L, D, H], with the bias."""
        return torch.baddbmm(self.bias[:, None], taps, weight)


class GroupedProduct(HandBatched):
    """The same through ``torch.nn.functional.grouped_mm``."""

    def tap_products(self, taps: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(taps, weight) + self.bias[:, None]


class Case:
    """One shape in one dtype: the contenders' models around one set of weights, and inputs to rotate through.

    Args:
        shape: L, D, V, H, C, B.
        dtype: of inputs and parameters.
        backward: whether the gradients of the weights and the view are part of a call (never the taps': they come
            from a frozen backbone).
        peers: of :data:`PEERS`; ``compile`` and ``max-autotune`` compile the eager reference, with static shapes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, peers: Sequence[str]) -> None:
        layers, width, view_width, hidden, outputs, batch = self.shape = shape
        self.dtype, self.backward = dtype, backward
        torch.manual_seed(0)
        arguments: Any = ([width] * layers, view_width, outputs)
        options: Any = {"hidden_width": hidden, "view_dropout": 0.0}
        self.spec = reference.LayerwiseEnsemble(*arguments, **options).to(dtype)
        self.models: dict[str, Any] = {"ours": levi_fast.LayerwiseEnsemble(*arguments, **options), "eager": self.spec}
        for name, form in (("hand-batched", HandBatched), ("grouped-mm", GroupedProduct)):
            if name in peers:
                self.models[name] = form(*arguments, **options)
        for model in self.models.values():
            # one set of weights: else each contender would turn the others' out of the cache
            for name, parameter in self.spec.named_parameters():
                setattr(model, name, parameter)
        self.calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ours": lambda taps, view: self.models["ours"](taps, view).layer_logits
        }
        if "eager" in peers:
            self.calls["eager"] = lambda taps, view: self.spec(taps, view).layer_logits
        for name in ("hand-batched", "grouped-mm"):
            if name in peers:
                self.calls[name] = self.models[name]
        size = dtype.itemsize * batch * (layers * width + view_width)
        count = max(2, -(-COLD_BYTES // 2 // size))
        self.taps = torch.randn(count, layers, batch, width, dtype=dtype)
        self.views = torch.randn(count, batch, view_width, dtype=dtype)
        self.grads = torch.randn(4, layers, batch, outputs, dtype=dtype)
        self.compile_seconds = {name: self._compile(name) for name in ("compile", "max-autotune") if name in peers}

    def _compile(self, name: str) -> float:
        """Add the compiled reference; returns the seconds it took."""
        torch.compiler.reset()  # or the limit on recompilations would leave later shapes uncompiled
        mode = {"mode": "max-autotune"} if name == "max-autotune" else {}
        program = torch.compile(self.spec, dynamic=False, fullgraph=True, **mode)  # type: ignore[call-overload]
        self.calls[name] = lambda taps, view: program(taps, view).layer_logits
        return round(timed(lambda: self.run(name, 0)), 2)

    def prepare(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Taps, view and the result's gradient of a call, from inputs that ``index`` numbers; no gradient is left."""
        index %= len(self.taps)
        view = self.views[index].detach().requires_grad_(self.backward)
        self.spec.zero_grad()  # every model's: they share their parameters
        return self.taps[index], view, self.grads[index % len(self.grads)]

    def call(self, name: str, taps: Tensor, view: Tensor, grad: Tensor) -> None:
        """What is timed: one call of a contender, with its backward pass where that is asked for."""
        with torch.set_grad_enabled(self.backward):
            y = self.calls[name](taps, view)
            if self.backward:
                y.backward(grad)

    def run(self, name: str, index: int) -> float:
        """Seconds of one call of a contender, after one that is not timed, on inputs far away.

        As in a loop of its own: it finds weights, code and its gradients' memory as its own last call left them, and
        not as the contender before it did. Without, the more contenders, the less their times differ.
        """
        self.call(name, *self.prepare(index + len(self.taps) // 2))
        inputs = self.prepare(index)
        start = time.perf_counter()
        self.call(name, *inputs)
        return time.perf_counter() - start

    def check(self) -> dict[str, float]:
        """Relative errors against float64: the worst of outputs and weight gradients, of every contender.

        Raises:
            WrongResultError: ours is more than twice that of the reference in the same dtype.
        """
        exact = reference.LayerwiseEnsemble(
            self.spec.tap_widths, self.spec.view_width, self.spec.num_outputs, hidden_width=self.spec.hidden_width,
            view_dropout=0.0, dtype=torch.float64,
        )  # fmt: skip
        exact.load_state_dict(self.spec.state_dict())
        results = {}
        for name, model in (("exact", exact), ("ours", self.models["ours"]), ("eager", self.spec)):
            dtype = model.bias.dtype
            model.zero_grad()
            y = model(self.taps[0].to(dtype), self.views[0].to(dtype)).layer_logits
            results[name] = [y.detach().double()]
            if self.backward:
                y.backward(self.grads[0].to(dtype))
                results[name] += [p.grad.double() for p in model.parameters() if p.grad is not None]
        errors = {}
        for name in ("ours", "eager"):
            each = [(a - b).norm() / b.norm() for a, b in zip(results[name], results["exact"], strict=True)]
            errors[name] = float(max(each))
        if errors["ours"] > 2 * errors["eager"] + 1e-12:
            raise WrongResultError(f"layerwise_ensemble at {self.shape} in {self.dtype}: relative errors {errors}")
        return errors

    def flop(self) -> int:
        """Of one call; a multiplication with its addition counts two."""
        layers, width, view_width, hidden, outputs, batch = self.shape
        forward = width + view_width + outputs
        backward = width + 2 * view_width + 2 * outputs  # no gradient of the taps
        return 2 * batch * layers * hidden * (forward + (backward if self.backward else 0))

    def bytes(self) -> int:
        """What must move in one call: inputs, weights and saved activations read once, results written once."""
        layers, width, view_width, hidden, outputs, batch = self.shape
        weights = sum(p.numel() for p in self.spec.parameters())
        inputs, results = batch * (layers * width + view_width), layers * batch * outputs
        moved = inputs + weights + results
        if self.backward:  # pre-activations written and read, inputs again, the weights behind dh and dv, gradients
            behind = layers * hidden * (view_width + outputs)
            moved += 2 * layers * batch * hidden + inputs + results + behind + weights + batch * view_width
        return moved * self.dtype.itemsize


class Products:
    """A case's matrix products alone, each one call of PyTorch's with memory at hand for its result.

    Nothing is normalised, activated, summed over the batch or allocated: what the library's own GEMM reaches at these
    very shapes, where the matrix rate is that of a square.

    Args:
        case: whose weights and inputs are multiplied.
    """

    def __init__(self, case: Case) -> None:
        layers, width, view_width, hidden, outputs, batch = case.shape
        self.case = case
        parameters = {name: value.detach() for name, value in case.spec.named_parameters()}
        self.tap_weight = parameters["tap_weight"].view(layers, width, hidden)
        self.view_weight = parameters["view_weight"].view(view_width, layers * hidden)
        self.output_weight = parameters["output_weight"].permute(1, 2, 0)
        new = partial(torch.empty, dtype=case.dtype)
        self.hidden = torch.randn(layers, batch, hidden, dtype=case.dtype)
        self.rows = torch.randn(batch, layers * hidden, dtype=case.dtype)  # as the view's products see all layers
        self.first, self.views, self.y = (
            torch.empty_like(self.hidden),
            torch.empty_like(self.rows),
            new(layers, batch, outputs),
        )
        if case.backward:
            self.gradients = [torch.empty_like(weight) for weight in (self.tap_weight, self.view_weight)]
            self.output_gradient, self.view_gradient = new(layers, hidden, outputs), new(batch, view_width)

    def run(self, index: int) -> float:
        """Seconds of all products of a call, after one pass that is not timed, as :meth:`Case.run`."""
        self.multiply(*self.case.prepare(index + len(self.case.taps) // 2))
        inputs = self.case.prepare(index)
        return timed(lambda: self.multiply(*inputs))

    @torch.no_grad()
    def multiply(self, taps: Tensor, view: Tensor, grad: Tensor) -> None:
        """All products of a call."""
        torch.bmm(taps, self.tap_weight, out=self.first)
        torch.mm(view, self.view_weight, out=self.views)
        torch.bmm(self.hidden, self.output_weight, out=self.y)
        if self.case.backward:
            torch.bmm(grad, self.output_weight.mT, out=self.first)
            torch.bmm(self.hidden.mT, grad, out=self.output_gradient)
            torch.bmm(taps.mT, self.hidden, out=self.gradients[0])
            torch.mm(view.mT, self.rows, out=self.gradients[1])
            torch.mm(self.rows, self.view_weight.mT, out=self.view_gradient)


def ensemble_row(
    shape: tuple[int, ...], dtype: torch.dtype, backward: bool, peers: Sequence[str], seconds: float, rates: Rates
) -> dict[str, Any]:
    """One row: the contenders' times and which fraction of the roofline ours reaches.

    The roofline is the longer of FLOP over the matrix rate and bytes over the read bandwidth, both measured right
    before the row. ``products_fraction`` is what :class:`Products` reach of it, timed in the same rounds.
    """
    case = Case(shape, dtype, backward, peers)
    errors = case.check()
    gemm, read = rates.gemm(dtype), rates.read()
    contenders: dict[str, Callable[[int], float]] = {name: partial(case.run, name) for name in case.calls}
    contenders[PRODUCTS] = Products(case).run
    found = compared(interleaved(contenders, seconds, LEAST_ROUNDS), also=(PRODUCTS,))
    ours, products = found["median_us"]["ours"] / 1e6, found["median_us"][PRODUCTS] / 1e6
    by_flop, by_bytes = case.flop() / gemm / 1e9, case.bytes() / read / 1e9
    return {
        "case": dict(zip(AXES, shape, strict=True)),
        "dtype": str(dtype)[6:],
        "pass": "forward+backward" if backward else "forward",
        **found,
        "gflop": case.flop() / 1e9,
        "gflop_per_s": round(case.flop() / ours / 1e9, 2),
        "megabytes": case.bytes() / 1e6,
        "gemm_gflop_per_s": round(gemm, 1),
        "read_gigabytes_per_s": round(read, 2),
        "bound_by": "flop" if by_flop > by_bytes else "bytes",
        "fraction_of_roofline": round(max(by_flop, by_bytes) / ours, 3),
        "products_fraction": round(max(by_flop, by_bytes) / products, 3),
        "fraction_of_gemm_rate": round(by_flop / ours, 3),
        "relative_error": errors,
        "compile_seconds": case.compile_seconds,
    }


class HeadStep(Case):
    """Ensemble and per-layer loss, forward and backward: what a training step adds to the backbone and the view.

    Args:
        shape, dtype, peers: as of :class:`Case`; peers other than "eager" and "hand-batched" are left out.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, peers: Sequence[str]) -> None:
        super().__init__(shape, dtype, True, [peer for peer in peers if peer in ("eager", "hand-batched")])
        self.target = torch.randint(shape[4], (shape[5],))

    def call(self, name: str, taps: Tensor, view: Tensor, grad: Tensor) -> None:
        """As of :class:`Case`; the gradient that comes is the loss's own."""
        self._loss(name, self.calls[name](taps, view)).backward()

    def _loss(self, name: str, y: Tensor) -> Tensor:
        if name == "hand-batched":  # every layer has the same target: one flat cross-entropy
            return F.cross_entropy(y.flatten(0, 1).float(), self.target.repeat(self.shape[0]))
        return (functional if name == "ours" else reference).layerwise_loss(y, self.target, KIND)


def head_step_row(shape: tuple[int, ...], dtype: torch.dtype, peers: Sequence[str], seconds: float) -> dict[str, Any]:
    """One row of :class:`HeadStep`."""
    case = HeadStep(shape, dtype, peers)
    case.check()
    times = interleaved({name: partial(case.run, name) for name in case.calls}, seconds, LEAST_ROUNDS)
    return {"case": dict(zip(AXES, shape, strict=True)), "dtype": str(dtype)[6:], "pass": "forward+backward",
            **compared(times)}  # fmt: skip
