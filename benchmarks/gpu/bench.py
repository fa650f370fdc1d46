"""Times all ops on a GPU beside their peers; writes JSON after every row, so that a run cut short keeps what it has.

    python benchmarks/gpu/bench.py --output gpu.json [--budget 300]

A row holds one op at one size: milliseconds of each contender, launched one by one ("plain") and replayed as one CUDA
graph ("graph"), our error beside same-dtype eager's, and which fraction of the roofline we reach. The roofline is the
larger of bytes over the copy bandwidth and operations over the matrix rate, both measured first, in this run. The
contenders take turns, over input sets that together exceed the L2 cache. `--device cpu --quick` tries the script out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import levi_fast
from levi_fast import functional, reference
from levi_fast.kernels import use_backend
from levi_fast.storage import write_atomic

ENSEMBLES = [  # (L, D, V, H, C, B), most telling first
    (6, 384, 64, 128, 2, 32),
    (24, 1024, 128, 512, 5, 64),
    (6, 384, 64, 128, 10, 65536),
    (32, 4096, 256, 512, 2, 16),
    (12, 768, 128, 256, 1000, 32),
    (4, 768, 128, 256, 9, 4096),
    (12, 768, 128, 256, 10, 8),
    (6, 384, 64, 128, 2, 1),
    (6, 384, 64, 128, 2, 256),
]
POOLS = [(256, 512, 768), (64, 128, 384), (1, 4096, 4096), (4096, 64, 384)]  # (B, T, D)
LOSSES = [(6, 4096, 9), (12, 1024, 1000)]  # (L, B, C)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KIND = "single_label_classification"
ROTATED = 256 * 2**20  # bytes of all input sets together: several times an H200's L2
Step = Callable[[int], Any]


@dataclass
class Run:
    """One run of the script: where it writes, how long it may take, and what it has found."""

    output: Path
    device: str
    deadline: float
    quick: bool
    result: dict[str, Any] = field(default_factory=lambda: {"rows": []})

    def save(self) -> None:
        """Write what there is so far."""
        write_atomic(self.output, json.dumps(self.result, indent=1) + "\n")

    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.monotonic()

    def clock(self, action: Callable[[], Any]) -> float:
        """Milliseconds of one action."""
        if self.device == "cpu":
            start = time.perf_counter()
            action()
            return (time.perf_counter() - start) * 1e3
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        action()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last))

    def time(self, contenders: dict[str, Step], sets: int) -> dict[str, dict[str, float]]:
        """Median milliseconds a call, of contenders taking turns; "graph" where a CUDA graph could be captured."""
        actions: dict[tuple[str, str], Callable[[], Any]] = {}
        for name, step in contenders.items():

            def all_sets(step: Step = step) -> None:
                for index in range(sets):
                    step(index)

            all_sets()
            actions[name, "plain"] = all_sets
            if self.device != "cpu":
                try:
                    actions[name, "graph"] = capture(all_sets)
                except RuntimeError as error:
                    self.result.setdefault("notes", []).append(f"{name}: no graph: {str(error)[:200]}")
        times: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
        for _ in range(3 if self.quick else 25):
            for key, action in actions.items():
                times[key].append(self.clock(action) / sets)
        table: dict[str, dict[str, float]] = {}
        for (name, mode), values in times.items():
            table.setdefault(name, {})[mode] = statistics.median(values)
        return table


def capture(action: Callable[[], Any]) -> Callable[[], None]:
    """A CUDA graph of an action, as its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def measure_ceilings(run: Run) -> None:
    """Copy bandwidth (bytes read plus written) and matrix rates on random data."""
    size = 2**20 if run.quick else 2**30
    source = torch.randn(size, device=run.device)
    target = torch.empty_like(source)
    ms = statistics.median(run.clock(lambda: target.copy_(source)) for _ in range(10))
    ceilings = {"copy_gb_s": 2 * 4 * size / ms / 1e6}
    n = 256 if run.quick else 8192
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(n, n, device=run.device, dtype=dtype) for _ in range(2))
        ms = statistics.median(run.clock(lambda a=a, b=b: a @ b) for _ in range(10))  # type: ignore[misc]
        ceilings[f"matrix_tflop_s_{name}"] = 2 * n**3 / ms / 1e9
    run.result["ceilings"] = ceilings
    run.save()


def finish_row(run: Run, row: dict[str, Any], nbytes: float, flop: float) -> None:
    """Add ratios and the fraction of the roofline, print the row and save."""
    ceilings = run.result["ceilings"]
    floor = max(nbytes / ceilings["copy_gb_s"] / 1e6, flop / ceilings[f"matrix_tflop_s_{row['dtype']}"] / 1e9)
    times = row["ms"]
    row["floor_ms"] = floor
    for mode in ("plain", "graph"):
        if mode in times["ours"]:
            ours = times["ours"][mode]
            peers = {name: t[mode] / ours for name, t in times.items() if name != "ours" and mode in t}
            row[mode] = {"of_roofline": floor / ours, "times_faster_than": peers}
    run.result["rows"].append(row)
    run.save()
    best = row.get("graph", row["plain"])
    print(row["op"], row["case"], row["dtype"], {k: round(v, 2) for k, v in best["times_faster_than"].items()},
          f"{best['of_roofline']:.0%} of the roofline", flush=True)  # fmt: skip


def sets_for(nbytes: int, run: Run) -> int:
    """How many input sets exceed the cache."""
    return 1 if run.quick else max(2, min(16, -(-ROTATED // max(nbytes, 1))))


def error(ours: Tensor, exact: Tensor) -> float:
    """Relative error in norm, of float64."""
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def bench_pool(run: Run, case: tuple[int, int, int], name: str) -> None:
    """Pooling with every token kept, forward."""
    batch, length, width = case
    dtype = DTYPES[name]
    nbytes = batch * length * width * dtype.itemsize
    sets = sets_for(nbytes, run)
    hidden = [torch.randn(case, device=run.device, dtype=dtype) for _ in range(sets)]
    mask = torch.ones(batch, length, device=run.device, dtype=torch.int64)

    def usual(x: Tensor) -> Tensor:
        m = mask[..., None].to(x.dtype)
        return (x * m).sum(1) / m.sum(1).clamp(min=1e-9)

    compiled = torch.compile(usual)
    contenders: dict[str, Step] = {
        "ours": lambda i: functional.masked_mean_pool(hidden[i], mask),
        "usual": lambda i: usual(hidden[i]),
        "bmm": lambda i: torch.bmm(mask[:, None].to(dtype), hidden[i])[:, 0] / length,
    }
    if not run.quick:
        contenders["compile"] = lambda i: compiled(hidden[i])
    exact = hidden[0].double().mean(1)
    row = {
        "op": "masked_mean_pool forward",
        "case": dict(zip("BTD", case, strict=True)),
        "dtype": name,
        "error": {"ours": error(contenders["ours"](0), exact), "eager": error(usual(hidden[0]), exact)},
        "ms": run.time(contenders, sets),
    }
    finish_row(run, row, nbytes + batch * length * 8 + batch * width * dtype.itemsize, 0)


def bench_ensemble(run: Run, case: tuple[int, ...], name: str, backward: bool, compiled: bool) -> None:
    """The ensemble's layer-wise predictions; with ``backward`` the loss and the gradients of weights and view too."""
    layers, width, view_width, hidden, outputs, batch = case
    dtype = DTYPES[name]
    theirs = reference.LayerwiseEnsemble(
        (width,) * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0, device=run.device, dtype=dtype
    )
    ours = levi_fast.LayerwiseEnsemble(
        (width,) * layers, view_width, outputs, hidden_width=hidden, view_dropout=0.0, device=run.device, dtype=dtype
    )
    ours.load_state_dict(theirs.state_dict())
    weight_bytes = sum(p.numel() for p in theirs.parameters()) * dtype.itemsize
    tap_bytes = layers * batch * width * dtype.itemsize
    sets = sets_for(tap_bytes + weight_bytes, run)
    taps = [torch.randn(layers, batch, width, device=run.device, dtype=dtype) for _ in range(sets)]
    views = [torch.randn(batch, view_width, device=run.device, dtype=dtype, requires_grad=backward) for _ in taps]
    target = torch.randint(0, outputs, (batch,), device=run.device)

    def step(model: Any, loss: Any, i: int) -> tuple[Tensor, ...]:
        if not backward:
            with torch.no_grad():
                return (model(taps[i], views[i]).layer_logits,)
        value = loss(model(taps[i], views[i]).layer_logits, target, KIND)
        return torch.autograd.grad(value, [*model.parameters(), views[i]])

    def twin(i: int) -> tuple[Tensor, ...]:
        with use_backend("eager"):
            return step(ours, functional.layerwise_loss, i)

    contenders: dict[str, Step] = {
        "ours": lambda i: step(ours, functional.layerwise_loss, i),
        "reference": lambda i: step(theirs, reference.layerwise_loss, i),
        "baddbmm": twin,
    }
    if compiled:
        model = torch.compile(theirs, mode="max-autotune-no-cudagraphs")
        loss = torch.compile(reference.layerwise_loss)

        def compiled_step(i: int) -> tuple[Tensor, ...]:
            if not backward:
                with torch.no_grad():
                    return (model(taps[i], views[i]).layer_logits,)
            value = loss(model(taps[i], views[i]).layer_logits, target, KIND)
            return torch.autograd.grad(value, [*theirs.parameters(), views[i]])

        contenders["compile"] = compiled_step
    row: dict[str, Any] = {
        "op": "layerwise_ensemble " + ("forward+backward" if backward else "forward"),
        "case": dict(zip("LDVHCB", case, strict=True)),
        "dtype": name,
        "error": errors(contenders, theirs, taps[0], views[0], target, backward),
        "ms": run.time(contenders, sets),
    }
    first = 2 * layers * batch * hidden * (width + view_width)
    second = 2 * layers * batch * hidden * outputs
    view_part = 2 * layers * batch * hidden * view_width
    flop = first + second + (first + view_part + 2 * second if backward else 0)
    nbytes = tap_bytes + weight_bytes * (2 if backward else 1) + batch * view_width * dtype.itemsize
    finish_row(run, row, nbytes, flop)


def errors(
    contenders: dict[str, Step], model: Any, taps: Tensor, view: Tensor, target: Tensor, backward: bool
) -> dict[str, float]:
    """The largest relative error over all results against float64, ours and same-dtype eager's."""
    parameters = [p.detach().double().requires_grad_() for p in model.parameters()]
    named = dict(zip((n for n, _ in model.named_parameters()), parameters, strict=True))
    x = view.detach().double().requires_grad_()
    layer_logits = torch.func.functional_call(model, named, (taps.double(), x)).layer_logits
    exact = (layer_logits,)
    if backward:
        flat = layer_logits.flatten(0, 1)
        exact = torch.autograd.grad(F.cross_entropy(flat, target.repeat(len(taps))), [*parameters, x])
    return {
        name: max(error(one, two) for one, two in zip(contenders[name](0), exact, strict=True))
        for name in ("ours", "reference")
    }


def bench_loss(run: Run, case: tuple[int, int, int], name: str) -> None:
    """The layer-wise cross-entropy with its gradient."""
    logits = torch.randn(case, device=run.device, dtype=DTYPES[name], requires_grad=True)
    target = torch.randint(0, case[2], case[1:2], device=run.device)

    def step(loss: Any) -> Tensor:
        return torch.autograd.grad(loss(logits, target, KIND), [logits])[0]

    compiled = torch.compile(reference.layerwise_loss)
    contenders: dict[str, Step] = {
        "ours": lambda i: step(functional.layerwise_loss),
        "reference": lambda i: step(reference.layerwise_loss),
    }
    if not run.quick:
        contenders["compile"] = lambda i: step(compiled)
    double = logits.detach().double().requires_grad_()
    flat = double.flatten(0, 1)
    (exact,) = torch.autograd.grad(F.cross_entropy(flat, target.repeat(case[0])), [double])
    row = {
        "op": "layerwise_loss forward+backward",
        "case": dict(zip("LBC", case, strict=True)),
        "dtype": name,
        "error": {n: error(contenders[n](0), exact) for n in ("ours", "reference")},
        "ms": run.time(contenders, 1),
    }
    finish_row(run, row, 2 * logits.numel() * logits.element_size(), 0)


def facts(device: str) -> dict[str, Any]:
    """The machine, the versions and the commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or None
    found: dict[str, Any] = {
        "commit": commit,
        "python": platform.python_version(),
        "time": time.strftime("%FT%TZ", time.gmtime()),
    }
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    backends = levi_fast.kernels.backend_report()
    return found | {"serves": {op: by_device[device].serves for op, by_device in backends.items()}}


def main() -> None:
    """Run what the budget allows, the most telling rows first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=300, help="seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few repetitions of tiny cases, to try the script out")
    options = parser.parse_args()
    run = Run(options.output, options.device, time.monotonic() + options.budget, options.quick)
    torch.manual_seed(0)
    run.result |= facts(run.device)
    run.save()
    measure_ceilings(run)
    jobs: list[Callable[[], None]] = []
    ensembles = [(2, 16, 8, 8, 3, 4)] if run.quick else ENSEMBLES
    pools = [(2, 8, 16)] if run.quick else POOLS
    losses = [(2, 8, 3)] if run.quick else LOSSES
    for name in DTYPES:
        jobs += [lambda c=c, n=name: bench_pool(run, c, n) for c in pools[:2]]  # type: ignore[misc]
        for case in ensembles:
            for backward in (False, True):
                jobs.append(lambda c=case, n=name, b=backward: bench_ensemble(run, c, n, b, False))  # type: ignore[misc]
    # What torch.compile does takes its minutes last: as many of the cases as are left room for.
    slow: list[Callable[[], None]] = []
    if not run.quick:
        slow = [lambda c=c: bench_ensemble(run, c, "bfloat16", True, True) for c in ensembles]  # type: ignore[misc]
    for name in DTYPES:
        jobs += [lambda c=c, n=name: bench_loss(run, c, n) for c in losses]  # type: ignore[misc]
        jobs += [lambda c=c, n=name: bench_pool(run, c, n) for c in pools[2:]]  # type: ignore[misc]
    done = 0
    for job in jobs + slow:
        if run.left() < (60 if done >= len(jobs) else 10):
            break
        try:
            job()
        except Exception as failure:  # one failing row must not cost the others
            run.result.setdefault("failures", []).append(
                f"job {done}: {type(failure).__name__}: {str(failure)[:2000]}"
            )
            run.save()
        done += 1
    run.result["left_out"] = len(jobs) + len(slow) - done
    run.save()
    if run.result.get("failures"):
        raise SystemExit("\n".join(run.result["failures"]))


if __name__ == "__main__":
    main()
