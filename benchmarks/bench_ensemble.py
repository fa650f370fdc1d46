"""Time the layer-wise ensemble against its peers on CPU and write a JSON file under benchmarks/results/.

    python benchmarks/bench_ensemble.py [--cases 0,1,2] [--seconds 2] [--compile] [--output FILE]

One process; in every round each contender runs once, in a new order, on the next of inputs that together exceed the
cache. A figure is the median over rounds, a ratio the ratio of medians; the quartiles of the rounds' own ratios stand
beside it. Ours is compared with fp64 before it is timed: its error may be twice that of the same-dtype reference.
Peers: the eager reference, the hand-batched baddbmm form, torch.compile of the reference (with --compile).

The roofline is the longer of FLOP over the matrix rate and bytes over the read bandwidth, both measured right before
the row. Bytes are what must move: inputs, weights and saved activations read once, results written once.

--cases picks rows (the others in the file stay); --compile-only fills inductor's cache and times nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_masked_mean_pool import machine
from timing import COLD_BYTES, Rates, best_peer, interleaved, timed
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.storage import write_atomic

ROOT = Path(__file__).resolve().parent.parent
CASES = [(6, 384, 64, 128, 2, 1), (6, 384, 64, 128, 2, 32), (6, 384, 64, 128, 2, 256), (12, 768, 128, 256, 10, 8),
         (12, 768, 128, 256, 1000, 32), (24, 1024, 128, 512, 5, 64), (32, 4096, 256, 512, 2, 16),
         (4, 768, 128, 256, 9, 4096)]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


class HandBatched(reference.LayerwiseEnsemble):
    """What a careful user writes: all taps in one baddbmm, all view products in one matrix product."""

    def forward(self, taps: Tensor, view: Tensor, **_: Any) -> Tensor:  # type: ignore[override]
        layers, batch, width = taps.shape
        first = torch.baddbmm(self.bias[:, None], reference.norm(taps), self.tap_weight.view(layers, width, -1))
        views = reference.norm(view) @ self.view_weight.view(self.view_width, -1)
        first = first + views.view(batch, layers, -1).transpose(0, 1)
        hidden = torch.nn.functional.gelu(first)
        return torch.baddbmm(self.output_bias[:, None], hidden, self.output_weight.permute(1, 2, 0))


class Case:
    """One shape in one dtype: the contenders' models with equal weights, and inputs to rotate through."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> None:
        layers, width, view_width, hidden, outputs, batch = self.shape = shape
        self.dtype, self.backward = dtype, backward
        torch.manual_seed(0)
        options = {"hidden_width": hidden, "view_dropout": 0.0}
        self.spec = reference.LayerwiseEnsemble([width] * layers, view_width, outputs, **options).to(dtype)
        self.models: dict[str, Any] = {
            "ours": levi_fast.LayerwiseEnsemble([width] * layers, view_width, outputs, **options),
            "eager": self.spec,
            "hand_batched": HandBatched([width] * layers, view_width, outputs, **options),
        }
        for model in self.models.values():
            model.to(dtype).load_state_dict(self.spec.state_dict())
        self.calls: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "ours": lambda taps, view: self.models["ours"](taps, view).layer_logits,
            "eager": lambda taps, view: self.spec(taps, view).layer_logits,
            "hand_batched": self.models["hand_batched"],
        }
        size = dtype.itemsize * batch * (layers * width + view_width)
        count = max(2, -(-COLD_BYTES // size))
        self.taps = torch.randn(count, layers, batch, width, dtype=dtype)
        self.views = torch.randn(count, batch, view_width, dtype=dtype)
        self.grads = torch.randn(4, layers, batch, outputs, dtype=dtype)

    def compile(self) -> float:
        """Add the compiled reference; returns the seconds it took."""
        torch.compiler.reset()  # or the limit on recompilations would leave later shapes uncompiled
        program = torch.compile(self.spec, dynamic=False, fullgraph=True)
        self.calls["compiled"] = lambda taps, view: program(taps, view).layer_logits
        return timed(lambda: self.run("compiled", 0))

    def run(self, name: str, index: int) -> float:
        """Seconds of one call of a contender, with its backward pass where that is timed."""
        index %= len(self.taps)
        view = self.views[index].detach().requires_grad_(self.backward)
        taps, grad = self.taps[index], self.grads[index % len(self.grads)]
        for model in self.models.values():
            model.zero_grad()
        start = time.perf_counter()
        with torch.set_grad_enabled(self.backward):
            y = self.calls[name](taps, view)
            if self.backward:
                y.backward(grad)
        return time.perf_counter() - start

    def check(self) -> dict[str, float]:
        """Relative errors of ours and the reference against fp64: the worst of outputs and weight gradients."""
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
                results[name] += [p.grad.double() for p in model.parameters()]
        errors = {}
        for name in ("ours", "eager"):
            each = [(a - b).norm() / b.norm() for a, b in zip(results[name], results["exact"], strict=True)]
            errors[name] = float(max(each))
        if errors["ours"] > 2 * errors["eager"] + 1e-12:
            raise SystemExit(f"wrong result at {self.shape} {self.dtype}: {errors}")
        return errors

    def flop(self) -> int:
        layers, width, view_width, hidden, outputs, batch = self.shape
        forward = width + view_width + outputs
        backward = width + 2 * view_width + 2 * outputs  # no gradient of the taps
        return 2 * batch * layers * hidden * (forward + (backward if self.backward else 0))

    def bytes(self) -> int:
        layers, width, view_width, hidden, outputs, batch = self.shape
        weights = sum(p.numel() for p in self.spec.parameters())
        inputs, results = batch * (layers * width + view_width), layers * batch * outputs
        moved = inputs + weights + results
        if self.backward:  # pre-activations written and read, inputs again, the weights behind dh and dv, gradients
            behind = layers * hidden * (view_width + outputs)
            moved += 2 * layers * batch * hidden + inputs + results + behind + weights + batch * view_width
        return moved * self.dtype.itemsize


def row(case: Case, seconds: float, compiled: bool, rates: Rates) -> dict[str, Any]:
    errors = case.check()
    took = case.compile() if compiled else None
    gemm, read = rates.gemm(case.dtype), rates.read()
    times = interleaved({name: lambda i, n=name: case.run(n, i) for name in case.calls}, seconds, 7)
    result = best_peer(times, "ours")
    ours = result["median_us"]["ours"] / 1e6
    by_flop, by_bytes = case.flop() / gemm / 1e9, case.bytes() / read / 1e9
    return {
        "case_L_D_V_H_C_B": case.shape, "dtype": str(case.dtype)[6:], "backward": case.backward, **result,
        "gflop": case.flop() / 1e9, "gflop_per_s": round(case.flop() / ours / 1e9, 2),
        "megabytes": case.bytes() / 1e6, "gemm_gflop_per_s": round(gemm, 1), "read_gigabytes_per_s": round(read, 2),
        "bound_by": "flop" if by_flop > by_bytes else "bytes",
        "fraction_of_roofline": round(max(by_flop, by_bytes) / ours, 3),
        "fraction_of_gemm_rate": round(by_flop / ours, 3),
        "relative_error": errors, "compile_seconds": took,
    }  # fmt: skip


def training_step(shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Ensemble and per-layer loss, forward and backward: ours against the reference and its hand-batched form."""
    case = Case(shape, dtype, backward=True)
    target = torch.randint(shape[4], (shape[5],))
    losses = {"ours": functional.layerwise_loss, "eager": reference.layerwise_loss}

    def run(name: str, index: int) -> float:
        index %= len(case.taps)
        view = case.views[index].detach().requires_grad_()
        for model in case.models.values():
            model.zero_grad()
        start = time.perf_counter()
        y = case.calls[name](case.taps[index], view)
        if name == "hand_batched":  # every layer has the same target: one flat cross-entropy
            loss = torch.nn.functional.cross_entropy(y.flatten(0, 1).float(), target.repeat(shape[0]))
        else:
            loss = losses[name](y, target, "single_label_classification")
        loss.backward()
        return time.perf_counter() - start

    times = interleaved({name: lambda i, n=name: run(n, i) for name in case.calls}, seconds, 7)
    return {"case_L_D_V_H_C_B": shape, "dtype": str(dtype)[6:], "what": "ensemble + loss, forward + backward",
            **best_peer(times, "ours")}  # fmt: skip


def loss_row(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """The loss alone, forward and backward."""
    logits, target = torch.randn(shape).to(dtype), torch.randint(shape[2], (shape[1],))

    def run(call: Callable[..., Tensor]) -> float:
        y = logits.detach().requires_grad_()
        return timed(lambda: call(y, target, "single_label_classification").backward())

    def flat(y: Tensor, labels: Tensor, _: str) -> Tensor:
        return torch.nn.functional.cross_entropy(y.flatten(0, 1).float(), labels.repeat(shape[0]))

    calls = {"ours": functional.layerwise_loss, "eager": reference.layerwise_loss, "hand_batched": flat}
    times = interleaved({name: lambda i, f=f: run(f) for name, f in calls.items()}, seconds, 20)
    return {"shape_L_B_C": shape, "dtype": str(dtype)[6:], **best_peer(times, "ours")}


def call_overhead(seconds: float) -> dict[str, float]:
    """Microseconds per call on the smallest input there is: what is paid before any work, beside one ATen call."""
    model = levi_fast.LayerwiseEnsemble([1], 1, 1, hidden_width=1, view_dropout=0.0)
    a = torch.ones(1, 1)
    taps, view, asking = torch.ones(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1, requires_grad=True)
    logits, target = torch.ones(1, 1, 1), torch.zeros(1, dtype=torch.int64)
    wants = logits.clone().requires_grad_()
    m = model
    op = torch.ops.levi_fast.layerwise_ensemble.default
    direct = (
        [taps], view, None, m.tap_weight.detach(), m.view_weight.detach(), m.bias.detach(), m.output_weight.detach(),
        m.output_bias.detach(), None, None, 0, True, 0.0, False, False,
    )  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {
        "aten_addmm": lambda: torch.addmm(a, a, a),
        "aten_addmm_recording_a_gradient": lambda: torch.addmm(asking, a, a),
        "aten_addmm_forward_and_backward": lambda: torch.addmm(asking, a, a).backward(a),
        "ensemble_op_direct": lambda: op(*direct),
        "ensemble_module": lambda: model(taps, view),
        "ensemble_module_forward_and_backward": lambda: model(taps, view).layer_logits.backward(logits),
        "loss_op_direct": lambda: torch.ops.levi_fast.layerwise_loss.default(logits, target, 0, False),
        "loss_recording_a_gradient": lambda: functional.layerwise_loss(wants, target, "single_label_classification"),
    }

    def run(name: str) -> float:
        model.zero_grad()
        with torch.set_grad_enabled("gradient" in name or "backward" in name):
            return timed(calls[name])

    times = interleaved({name: lambda i, n=name: run(n) for name in calls}, seconds, 500)
    return {name: round(statistics.median(values) * 1e6, 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--extras", action="store_true", help="also call overhead, the loss, whole training steps")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/layerwise_ensemble_cpu.json")
    arguments = parser.parse_args()
    rates = Rates()
    old = json.loads(arguments.output.read_text()) if arguments.output.exists() else {"rows": []}
    facts = {"threads": torch.get_num_threads(), **machine()}
    result = {**old, **{k: v for k, v in facts.items() if k not in ("date", "load_average_at_start")}}

    def write() -> None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")

    for index in [int(text) for text in arguments.cases.split(",") if text]:
        fresh = []
        for dtype in DTYPES:
            for backward in (False, True):
                case = Case(CASES[index], dtype, backward)
                if arguments.compile_only:
                    print(CASES[index], dtype, backward, f"{case.compile():.1f} s", flush=True)
                    continue
                fresh.append(row(case, arguments.seconds, arguments.compile, rates))
                fresh[-1]["measured"] = {k: facts[k] for k in ("date", "load_average_at_start", "commit")}
                print(json.dumps(fresh[-1]), flush=True)
        if fresh:
            kept = [r for r in result["rows"] if tuple(r["case_L_D_V_H_C_B"]) != CASES[index]]
            result["rows"] = sorted([*kept, *fresh], key=lambda r: CASES.index(tuple(r["case_L_D_V_H_C_B"])))
            write()
    if arguments.extras:
        result["call_overhead_us"] = call_overhead(arguments.seconds)
        result["training_steps"] = [training_step(s, d, arguments.seconds) for s in CASES[:4] for d in DTYPES]
        shapes = [(6, 1, 2), (6, 32, 2), (12, 32, 1000), (4, 4096, 9)]
        result["loss_rows"] = [loss_row(s, d, arguments.seconds) for s in shapes for d in DTYPES]
        for name in ("call_overhead_us", "training_steps", "loss_rows"):
            print(json.dumps(result[name]), flush=True)
        write()


if __name__ == "__main__":
    main()
