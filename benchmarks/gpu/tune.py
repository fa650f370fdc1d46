"""Tunes the Triton kernels' launches on this machine's GPU, and writes them as kernels/configs/<device>.json.

    LEVI_FAST_TRITON=1 python benchmarks/gpu/tune.py --output kernels/configs [--budget 120]

From the configuration that a launch has now, one field at a time is halved or doubled; what makes the whole call
faster by more than the spread of two equal timings is kept, and tried further. Every configuration's results are
compared with those of the one before it: a fast wrong launch is none. Entries whose heuristic stayed best are not
written. `--device cpu --quick` with TRITON_INTERPRET=1 tries the script out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from levi_fast.bench.gpu.timing import DTYPES, Run, facts
from levi_fast.kernels import (
    launch_configs,
    layerwise_ensemble_backward_triton,
    layerwise_ensemble_triton,
    layerwise_loss_triton,
    masked_mean_pool_triton,
)
from levi_fast.kernels.launch_configs import device_slug, device_traits
from levi_fast.storage import write_atomic

POOLS = [(256, 512, 768), (64, 128, 384), (4096, 64, 384), (1, 4096, 4096)]  # (B, T, D)
ENSEMBLES = [  # (L, D, V, H, C, B)
    (6, 384, 64, 128, 2, 32),
    (24, 1024, 128, 512, 5, 64),
    (6, 384, 64, 128, 10, 65536),
    (32, 4096, 256, 512, 2, 16),
    (12, 768, 128, 256, 10, 1024),
]
GAIN = 0.97  # a configuration must take less than this part of the time to be kept
Call = Callable[[], list[Tensor]]


def pool_calls(case: tuple[int, int, int], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    """Pooling, forward and backward, at one size."""
    hidden = torch.randn(case, device=device).to(dtype)
    mask = torch.ones(case[:2], device=device, dtype=torch.int64)
    grad = hidden[:, 0].contiguous()
    yield f"pool {case}", lambda: [masked_mean_pool_triton.forward(hidden, mask)]
    yield f"pool_backward {case}", lambda: [masked_mean_pool_triton.backward(grad, mask, case[1])]


def ensemble_calls(case: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    """The ensemble, forward and backward, and its loss, at one size."""
    layers, width, view_width, first, outputs, batch = case

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    taps, view = [randn(layers, batch, width)], randn(batch, view_width)
    weights = [randn(layers * width, first), randn(view_width, layers, first)]
    output = [randn(outputs, layers, first), randn(layers, outputs)]
    rest = [view, None, *weights, randn(layers, first), *output, None, None, 0, True, 0.0, False, True]
    results = layerwise_ensemble_triton.forward(taps, *rest)
    grads = [None, randn(layers, batch, outputs), None, None]
    saved = [taps, view, None, *weights, output[0], None, None, None, None, results[4], results[5]]
    logits, target = randn(layers, batch, outputs), torch.randint(0, outputs, (batch,), device=device)
    yield f"ensemble {case}", lambda: list(layerwise_ensemble_triton.forward(taps, *rest)[:2])
    yield (
        f"ensemble_backward {case}",
        lambda: layerwise_ensemble_backward_triton.backward(*grads, *saved, 0, True, 0.0, 0b0111111)[:6],
    )
    yield f"loss {case}", lambda: list(layerwise_loss_triton.forward(logits, target, 0, True))


def calls(dtype: torch.dtype, device: str, quick: bool) -> Iterator[tuple[str, Call]]:
    """Every workload: its name, and a call that launches all its kernels."""
    for pool in [(3, 20, 40)] if quick else POOLS:
        yield from pool_calls(pool, dtype, device)
    for ensemble in [(2, 16, 8, 8, 3, 5)] if quick else ENSEMBLES:
        yield from ensemble_calls(ensemble, dtype, device)


def neighbours(config: Any) -> Iterator[Any]:
    """Configurations that differ in one field, by a factor of two."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for other in (value // 2, value * 2):
            least = 16 if field.name.startswith("block") and isinstance(config, launch_configs.ProductConfig) else 1
            most = {"num_warps": 16, "num_stages": 6, "splits": 64, "group_m": 16}.get(field.name, 4096)
            if least <= other <= most and other != value:
                yield dataclasses.replace(config, **{field.name: other})


def milliseconds(run: Run, call: Call) -> float:
    """The median of one call's times."""
    for _ in range(2):
        call()
    return statistics.median(run.clock(call) for _ in range(2 if run.quick else 20))


def agree(one: list[Tensor], two: list[Tensor]) -> bool:
    """Whether two configurations gave the same but for rounding."""
    return all(
        (a.double() - b.double()).norm() <= 64 * torch.finfo(a.dtype).eps * (b.double().norm() + 1)
        for a, b in zip(one, two, strict=True)
    )


def tune(run: Run, name: str, call: Call) -> Iterator[dict[str, Any]]:
    """Entries for the kernels of one call that a launch better than now's was found for."""
    with launch_configs.trial() as now:
        expected = call()
        best = milliseconds(run, call)
    asked, chosen = dict(now.asked), {kernel: config for kernel, (_, _, config) in now.asked.items()}
    for kernel in asked:
        improved = True
        while improved and run.left() > 0:
            improved = False
            for candidate in neighbours(chosen[kernel]):
                if run.left() <= 0:
                    break
                try:
                    with launch_configs.trial(**{**chosen, kernel: candidate}):
                        if not agree(call(), expected):
                            raise RuntimeError("other results")
                        ms = milliseconds(run, call)
                except Exception as refused:  # too much shared memory, a block the kernel does not take, ...
                    run.result["refused"].append(f"{name} {candidate}: {str(refused)[:120]}")
                    continue
                if ms < GAIN * best:
                    best, chosen[kernel], improved = ms, candidate, True
                    break
    for kernel, (dtype, shape, config) in asked.items():
        if chosen[kernel] != config:
            yield {"kernel": kernel, "dtype": dtype, "shape": shape, "config": dataclasses.asdict(chosen[kernel])}


def main() -> None:
    """Tune what the budget allows; the file is written after every workload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the device's file")
    parser.add_argument("--budget", type=float, default=120, help="seconds")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    slug = device_slug(device_traits(torch.device(options.device)).name)
    run = Run(options.output / f"{slug}.json", options.device, time.monotonic() + options.budget, options.quick)
    run.result = {**facts(options.device), "refused": [], "entries": []}
    for dtype in (torch.float32,) if options.quick else DTYPES.values():
        for name, call in calls(dtype, options.device, options.quick):
            if run.left() <= 0:
                break
            try:
                found = list(tune(run, name, call))
            except Exception as failure:
                run.result["refused"].append(f"{name}: {type(failure).__name__}: {str(failure)[:200]}")
                continue
            run.result["entries"] += found
            print(name, json.dumps(found), flush=True)
            write_atomic(run.output, json.dumps(run.result, indent=1) + "\n")
    write_atomic(run.output, json.dumps(run.result, indent=1) + "\n")


if __name__ == "__main__":
    main()
