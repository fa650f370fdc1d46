"""Time masked_mean_pool against its peers and write a JSON file under benchmarks/results/.

    python benchmarks/bench_masked_mean_pool.py [--quick] [--seconds 2] [--output FILE]

How it is measured: one process; in every round each contender runs once, in a new order, on the same inputs; the
figure is the median over rounds. "cold" rows rotate through inputs that together exceed any cache, "warm" rows use
one input again and again (what a model's pooling sees: the hidden state was written a moment ago). The contender
under test is compared with an fp64 result before it is timed. The fraction of read bandwidth is against a plain sum
over as many bytes of the same tensors as the mask keeps, in the same rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from levi_fast.environment import environment_report
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels.masked_mean_pool import eager_forward
from levi_fast.storage import write_atomic

ROOT = Path(__file__).resolve().parent.parent
COLD_BYTES = 256 * 2**20
SHAPES = [(1, 64, 384), (8, 64, 384), (32, 64, 384), (64, 128, 384), (64, 512, 768), (16, 2048, 1024)]


def sum_over_count(hidden: Tensor, mask: Tensor) -> Tensor:
    """What most code does: multiply, sum, divide."""
    return (hidden * mask[..., None].to(hidden.dtype)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def batched_product(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum as a matrix product: hidden is read once and never copied."""
    weights = mask.to(hidden.dtype)
    return torch.bmm(weights[:, None], hidden).squeeze(1) / mask.sum(1, keepdim=True).clamp(min=1)


def machine() -> dict[str, Any]:
    """Everything a reader needs to judge a figure by."""
    report = environment_report()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "csrc", "kernels", "CMakeLists.txt", __file__],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "uncommitted_changes": bool(dirty),
        "platform": platform.platform(),
        "cpu": report["cpu"],
        "versions": report["versions"],
        "compiler": report["native"]["compiler"],
        "load_average_at_start": Path("/proc/loadavg").read_text().split()[:3]
        if Path("/proc/loadavg").exists()
        else None,
    }


def read_bandwidth(rounds: int) -> dict[str, float]:
    """GB/s at which this process reads memory it has not in cache: the best of two plain reductions."""
    data = torch.ones(COLD_BYTES // 4)
    result = {}
    for name, reduce in (("sum", lambda: data.sum()), ("dot", lambda: torch.dot(data, data))):
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            reduce()
            times.append(time.perf_counter() - start)
        result[name] = COLD_BYTES / statistics.median(times) / 1e9
    return {**result, "used": max(result.values())}


def interleaved(contenders: dict[str, Callable[[int], Any]], seconds: float, least: int) -> dict[str, list[float]]:
    """Times in seconds per contender; every round runs each once, in random order, on the round's input."""
    names = list(contenders)
    shuffle = random.Random(0)
    for name in names:
        for index in range(3):
            contenders[name](index)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    index = 0
    while index < least or time.perf_counter() < end:
        shuffle.shuffle(names)
        for name in names:
            start = time.perf_counter()
            contenders[name](index)
            times[name].append(time.perf_counter() - start)
            index += 1  # also between contenders: the next must not find its input warm
    return times


def bench_forward(shape: tuple[int, int, int], dtype: torch.dtype, cold: bool, seconds: float) -> dict:
    batch, length, width = shape
    size = batch * length * width * dtype.itemsize
    copies = max(2, -(-COLD_BYTES // size)) if cold else 1
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(shape, generator=generator).to(dtype) for _ in range(min(copies, 2))]
    hidden += [hidden[i % 2].clone() for i in range(copies - len(hidden))]
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()

    wide = (hidden[0].double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    error = (masked_mean_pool(hidden[0], mask).double() - wide).abs().max().item()
    error_eager = (sum_over_count(hidden[0], mask).double() - wide).abs().max().item()
    if error > 2 * error_eager + 1e-12:
        raise SystemExit(f"wrong result at {shape} {dtype}: error {error}, PyTorch's own {error_eager}")

    torch.compiler.reset()  # or the limit on recompilations would leave later shapes uncompiled
    compiled = torch.compile(sum_over_count, dynamic=False)
    functions = {
        "levi_fast": masked_mean_pool,
        "sum_over_count": sum_over_count,
        "bmm": batched_product,
        "eager_twin": eager_forward,
        "compiled_sum_over_count": compiled,
    }
    needed = int(lengths.sum()) * width * dtype.itemsize + mask.numel() * mask.itemsize
    kept = int(lengths.sum()) * width * dtype.itemsize // 4
    flat = [values.flatten().view(torch.float32)[:kept] for values in hidden]
    contenders: dict[str, Callable[[int], Any]] = {
        name: (lambda i, f=f: f(hidden[i % copies], mask)) for name, f in functions.items()
    }
    # The roofline, in the same rounds: a plain sum over as many bytes as the mask keeps, of the same tensors.
    contenders["plain_read"] = lambda i: flat[i % copies].sum()
    with torch.no_grad():
        times = interleaved(contenders, seconds, 30)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "pass": "forward",
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "input": "cold" if cold else "warm",
        "rounds": len(times["levi_fast"]),
        "median_us": {name: round(value * 1e6, 2) for name, value in median.items()},
        "p90_us": {name: round(statistics.quantiles(v, n=10)[8] * 1e6, 2) for name, v in times.items()},
        "speedup_over": {
            n: round(v / median["levi_fast"], 2) for n, v in median.items() if n not in ("levi_fast", "plain_read")
        },
        "bytes_needed": needed,
        "gigabytes_per_second": round(needed / median["levi_fast"] / 1e9, 2),
        "fraction_of_read_bandwidth": round(median["plain_read"] / median["levi_fast"], 3),
        "max_error": error,
        "max_error_of_sum_over_count": error_eager,
    }


def bench_backward(shape: tuple[int, int, int], dtype: torch.dtype, seconds: float) -> dict:
    batch, length, width = shape
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    grad = torch.randn(batch, width, generator=generator).to(dtype)

    def step(function: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(function(hidden, mask), hidden, grad)

    functions = {"levi_fast": masked_mean_pool, "sum_over_count": sum_over_count, "bmm": batched_product}
    times = interleaved({name: (lambda i, f=f: step(f)) for name, f in functions.items()}, seconds, 30)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "pass": "forward+backward",
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "input": "warm",
        "rounds": len(times["levi_fast"]),
        "median_us": {name: round(value * 1e6, 2) for name, value in median.items()},
        "speedup_over": {n: round(v / median["levi_fast"], 2) for n, v in median.items() if n != "levi_fast"},
    }


def call_overhead(seconds: float) -> dict[str, float]:
    """Microseconds per call on one number: what is paid before any work, beside one plain ATen call."""
    tiny = torch.ones(1, 1, 1)
    asking = tiny.clone().requires_grad_()
    op = torch.ops.levi_fast.masked_mean_pool.default
    contenders: dict[str, Callable[[int], Any]] = {
        "aten_mean": lambda i: tiny.mean(1),
        "levi_fast": lambda i: masked_mean_pool(tiny),
        "levi_fast_recording_a_gradient": lambda i: masked_mean_pool(asking),
        "torch_ops_direct": lambda i: op(tiny, None),
    }
    times = interleaved(contenders, seconds, 2000)
    return {name: round(statistics.median(values) * 1e6, 2) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; for trying out")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    seconds = 0.3 if arguments.quick else arguments.seconds

    facts = machine()
    bandwidth = read_bandwidth(10 if arguments.quick else 30)
    print(f"read bandwidth {bandwidth['used']:.1f} GB/s, {torch.get_num_threads()} threads")
    result = {**facts, "threads": torch.get_num_threads(), "read_bandwidth_gb_s": bandwidth}
    result["call_overhead_us"] = call_overhead(seconds)
    print(result["call_overhead_us"])
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in SHAPES:
            for cold in (False, True):
                rows.append(bench_forward(shape, dtype, cold, seconds))
                print(json.dumps({k: rows[-1][k] for k in ("shape", "dtype", "input", "median_us", "speedup_over")}))
                print("   fraction of read bandwidth", rows[-1]["fraction_of_read_bandwidth"], flush=True)
        for shape in SHAPES[:5]:
            rows.append(bench_backward(shape, dtype, seconds))
            print(json.dumps(rows[-1]), flush=True)
    result["read_bandwidth_gb_s_at_end"] = read_bandwidth(10)
    result["rows"] = rows
    output = arguments.output or ROOT / "benchmarks" / "results" / "masked_mean_pool_cpu.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(result, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
