"""The order of the rows on a GPU, and the JSON file that grows with them.

A row holds one op at one size: milliseconds of each contender, launched one by one ("plain") and replayed as one CUDA
graph ("graph"), our error beside same-dtype eager's, and which fraction of the roofline we reach. The roofline is the
larger of bytes over the copy bandwidth and operations over the matrix rate, both measured first, in this run. The
contenders take turns, over input sets that together exceed the L2 cache.

"ours" is the backend that serves by itself; another compiled one that could serve stands under its own name, and pays
for being asked for by name: its gradient goes through torch.library, which shows where nothing is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from levi_fast.bench.gpu.rows import bench_ensemble, bench_head_step, bench_loss, bench_pool, bench_unequal
from levi_fast.bench.gpu.timing import DTYPES, Run, facts, measure_ceilings

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
UNEQUAL = [((128, 256, 512, 1024), 128, 256, 10, 256), ((96, 192, 384, 768), 64, 128, 5, 8)]  # (D_l, V, H, C, B)
HEADS = [(6, 384, 64, 128, 2, 32), (24, 1024, 128, 512, 5, 64), (12, 768, 128, 256, 10, 1024)]  # as ENSEMBLES


def bench_gpu(output: Path | None, device: str, budget: float, quick: bool = False) -> Run:
    """Time what the budget allows, the most telling rows first.

    Args:
        output: written after every row.
        device: "cuda"; "cpu" tries the rows out.
        budget: seconds.
        quick: few repetitions of tiny cases.

    Returns:
        The run. ``result`` has ``rows``, ``ceilings``, ``left_out`` (rows without time) and ``failures``, where a row
        failed: one does not cost the others.
    """
    run = Run(output, device, time.monotonic() + budget, quick)
    torch.manual_seed(0)
    run.result |= facts(run.device)
    run.save()
    measure_ceilings(run)
    jobs: list[Callable[[], None]] = []
    ensembles = [(2, 16, 8, 8, 3, 4)] if quick else ENSEMBLES
    pools = [(2, 8, 16)] if quick else POOLS
    losses = [(2, 8, 3)] if quick else LOSSES
    heads = [(2, 16, 8, 8, 3, 4)] if quick else HEADS
    unequal = [((8, 16), 8, 16, 8, 8)] if quick else UNEQUAL
    for name in DTYPES:
        jobs += [lambda c=c, n=name: bench_pool(run, c, n) for c in pools[:2]]  # type: ignore[misc]
        for case in ensembles:
            for backward in (False, True):
                jobs.append(lambda c=case, n=name, b=backward: bench_ensemble(run, c, n, b, False))  # type: ignore[misc]
    jobs += [lambda c=c: bench_head_step(run, c, "bfloat16") for c in heads]  # type: ignore[misc]
    jobs += [lambda c=c: _bench_lean_step(run, c) for c in heads]  # type: ignore[misc]
    for backward in (False, True):
        jobs += [lambda c=c, b=backward: bench_unequal(run, c, b) for c in unequal]  # type: ignore[misc]
    # What torch.compile does takes its minutes last: as many of the cases as are left room for.
    slow: list[Callable[[], None]] = []
    if not quick:
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
    return run


def _bench_lean_step(run: Run, case: tuple[int, ...]) -> None:
    from levi_fast.bench.gpu.lean_step import bench_lean_step  # imports transformers, which no other row needs

    bench_lean_step(run, case)
