"""A row of the lean loop's step on a GPU: launched kernel by kernel, and replayed as a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

from levi_fast.bench.gpu.rows import KIND
from levi_fast.bench.gpu.timing import Run, Step, error, finish_row
from levi_fast.config import LeviConfig
from levi_fast.modeling import LeviModel
from levi_fast.training.device_bank import DeviceTaps
from levi_fast.training.graphed_step import WARM_UP, CudaGraphs, GraphedStep, Graphs
from levi_fast.training.lean import TrainingStep
from levi_fast.training.replicas import Replicas


class _NoGraphs:
    """In place of CUDA graphs where the rows are tried out on the CPU: a replay does the work itself."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, work: Callable[[], object]) -> Callable[[], object]:
        return work


def bench_lean_step(run: Run, case: tuple[int, ...]) -> None:
    """A step of the lean loop from a bank on the device, as it is, and with ``--loop graph``: copies and replay."""
    layers, width, view_width, hidden, outputs, batch = case
    device = torch.device(run.device)
    bank = DeviceTaps(torch.randn(8 * batch, layers * width, device=device))
    numeric, labels = torch.randn(8 * batch, 16), torch.randint(0, outputs, (8 * batch,))
    fields: dict[str, Any] = {
        "tap_layers": list(range(layers)), "tap_widths": [width] * layers, "hidden_width": hidden,
        "num_labels": outputs, "problem_type": KIND, "view_width": view_width,
        "task_model": {"type": "tabular", "num_numeric": 16, "view_width": view_width},
    }  # fmt: skip
    graphs: Graphs = CudaGraphs(device) if device.type == "cuda" else _NoGraphs()

    def trained(graphed: bool) -> tuple[Step, LeviModel]:
        torch.manual_seed(0)
        model = LeviModel(LeviConfig(**fields))
        torch.nn.Module.to(model, device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        plain = TrainingStep(model, optimizer, 1.0, Replicas(device=device))
        take = GraphedStep(plain, optimizer, graphs, device) if graphed else plain
        torch.manual_seed(1)  # of dropout

        def step(index: int) -> None:
            rows = torch.arange(batch) + index % 8 * batch
            take({"taps": bank[rows], "numeric": numeric[rows], "labels": labels[rows]})
            if isinstance(take, GraphedStep) and take.failed:
                raise RuntimeError("the step could not be captured")

        for index in range(WARM_UP + 2):
            step(index)
        return step, model

    steps = {mode: trained(graphed) for mode, graphed in (("plain", False), ("graph", True))}
    weights = {
        mode: torch.cat([p.detach().flatten() for p in model.parameters()]) for mode, (_, model) in steps.items()
    }

    def ten(step: Step) -> None:
        for index in range(10):
            step(index)

    times: dict[str, list[float]] = {mode: [] for mode in steps}
    for _ in range(3 if run.quick else 25):
        for mode, (step, _) in steps.items():
            times[mode].append(run.clock(functools.partial(ten, step)) / 10)
    row = {
        "op": "training step of the lean loop",
        "case": dict(zip("LDVHCB", case, strict=True)),
        "dtype": "float32",
        "error": {"graph": error(weights["graph"], weights["plain"].double())},
        "ms": {"ours": {mode: statistics.median(values) for mode, values in times.items()}},
    }
    flop = 2 * layers * batch * hidden * (2 * width + 3 * view_width + 3 * outputs)
    # Taps, and weights with both moments, read and written once.
    finish_row(run, row, 4 * (batch * layers * width + 6 * weights["plain"].numel()), flop)
