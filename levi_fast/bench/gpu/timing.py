"""What the GPU benchmarks share: fair timing, the ceilings of the device, and the JSON file that grows row by row."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from levi_fast.bench.record import facts as machine_facts
from levi_fast.storage import write_atomic

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROTATED = 256 * 2**20  # bytes of all input sets together: several times an H200's L2
Step = Callable[[int], Any]


@dataclass
class Run:
    """One run of the script: where it writes, how long it may take, and what it has found."""

    output: Path | None
    device: str
    deadline: float
    quick: bool
    result: dict[str, Any] = field(default_factory=lambda: {"rows": []})

    def save(self) -> None:
        """Write what there is so far."""
        if self.output is not None:
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


def facts(device: str) -> dict[str, Any]:
    """The machine, the versions, the commit, and which backend serves each op on this device."""
    found = machine_facts()
    name = torch.cuda.get_device_name() if device == "cuda" else found["cpu"]["name"]
    return {**found, "device": name, "serves": {op: served[device] for op, served in found["serves"].items()}}
