"""Time the layer-wise ensemble against its peers on CPU and write a JSON file under benchmarks/results/.

    python benchmarks/bench_ensemble.py [--cases 0,1,2] [--seconds 2] [--output FILE]

One process; in every round each contender runs once, in a new order. A figure is the median over rounds, a ratio the
median of the rounds' own ratios with its quartiles. Ours is compared with the eager result before it is timed.
Peers: the eager reference and the hand-batched baddbmm form; torch.compile of the reference with --compile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_masked_mean_pool import machine

import levi_fast
from levi_fast import reference
from levi_fast.kernels.layerwise_ensemble_eager import ensemble
from levi_fast.storage import write_atomic

ROOT = Path(__file__).resolve().parent.parent
CASES = [(6, 384, 64, 128, 2, 1), (6, 384, 64, 128, 2, 32), (6, 384, 64, 128, 2, 256), (12, 768, 128, 256, 10, 8),
         (12, 768, 128, 256, 1000, 32), (24, 1024, 128, 512, 5, 64), (32, 4096, 256, 512, 2, 16),
         (4, 768, 128, 256, 9, 4096)]  # fmt: skip


def gemm_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of torch's own 1024-cubed product, the best of ten."""
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def row(case: tuple[int, ...], dtype: torch.dtype, backward: bool, seconds: float, compiled: bool) -> dict[str, Any]:
    layers, width, view_width, hidden, outputs, batch = case
    spec = reference.LayerwiseEnsemble([width] * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0)
    spec = spec.to(dtype)
    fast = levi_fast.LayerwiseEnsemble([width] * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0)
    fast = fast.to(dtype)
    fast.load_state_dict(spec.state_dict())
    taps, view = torch.randn(layers, batch, width).to(dtype), torch.randn(batch, view_width).to(dtype)
    view.requires_grad_(backward)
    grad = torch.randn(layers, batch, outputs).to(dtype)

    def hand() -> Any:
        m = spec
        return ensemble([taps], view, None, m.tap_weight, m.view_weight, m.bias, m.output_weight, m.output_bias, None,
                        None, 0, True, 0.0, False)[0][1]  # fmt: skip

    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: fast(taps, view).layer_logits,
        "eager": lambda: spec(taps, view).layer_logits,
        "hand_batched": hand,
    }
    if compiled:
        program = torch.compile(spec)
        calls["compiled"] = lambda: program(taps, view).layer_logits

    def run(call: Callable[[], Any]) -> float:
        for model in (spec, fast):
            model.zero_grad()
        view.grad = None
        start = time.perf_counter()
        with torch.set_grad_enabled(backward):
            y = call()
            if backward:
                y.backward(grad)
        return time.perf_counter() - start

    with torch.no_grad():
        torch.testing.assert_close(calls["ours"](), calls["eager"](), rtol=0.05, atol=0.05)
    names = list(calls)
    for name in names:
        run(calls[name])
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while len(times["ours"]) < 5 or time.perf_counter() < end:
        for name in random.sample(names, len(names)):
            times[name].append(run(calls[name]))
    flop = 2 * batch * layers * hidden * (width + view_width + outputs)
    flop += 2 * batch * layers * hidden * (width + 2 * view_width + 2 * outputs) if backward else 0
    ratios = {}
    for name in names[1:]:
        each = [peer / ours for peer, ours in zip(times[name], times["ours"], strict=True)]
        ratios[name] = [round(q, 3) for q in statistics.quantiles(each, n=4)]
    median = statistics.median(times["ours"])
    return {
        "case_L_D_V_H_C_B": case, "dtype": str(dtype)[6:], "backward": backward, "rounds": len(times["ours"]),
        "gflop": flop / 1e9, "gflop_per_s": flop / median / 1e9,
        "median_us": {name: statistics.median(t) * 1e6 for name, t in times.items()},
        "fastest_us": {name: min(t) * 1e6 for name, t in times.items()},
        "peer_over_ours_quartiles": ratios,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default="0,1,2,3,4,5,6,7")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/ensemble_cpu.json")
    arguments = parser.parse_args()
    dtypes = (torch.float32, torch.bfloat16)
    result: dict[str, Any] = {
        "machine": machine(), "threads": torch.get_num_threads(),
        "torch_gemm_gflop_per_s": {str(dtype)[6:]: gemm_rate(dtype) for dtype in dtypes}, "rows": [],
    }  # fmt: skip
    for index in map(int, arguments.cases.split(",")):
        for dtype in dtypes:
            for backward in (False, True):
                result["rows"].append(row(CASES[index], dtype, backward, arguments.seconds, arguments.compile))
                print(json.dumps(result["rows"][-1]), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
