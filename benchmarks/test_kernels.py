"""The cases of ``levi-fast bench kernels`` under pytest-benchmark, a group for each case: ours and its peers.

    OMP_NUM_THREADS=1 pytest benchmarks/ --benchmark-json kernels.json
    pytest benchmarks/ -k small --benchmark-max-time 0.1     # small inputs only, about a minute
    pytest benchmarks/ -k "small and loss and float32"       # one op, one dtype: seconds
    pytest benchmarks/ --compiled                            # torch.compile's contenders too
    pytest benchmarks/ --benchmark-autosave                  # then, after a change: --benchmark-compare

``--benchmark-max-time`` is the time spent on each contender of each case. Every case is compared with float64 before
its first contender is timed, and every round takes the next of its inputs, as far as the case rotates them. Here
contenders run one after another; ``levi-fast bench kernels`` interleaves them, so that its ratios hold on a machine
that is busy. ``extra_info`` has case, dtype, pass, and FLOP and bytes of one call (null where no count is meant).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from levi_fast.bench import ensemble, pooling, small_calls
from levi_fast.bench.kernels import COMPILED, DTYPES, HEAD_STEP_CASES, OPS, PEERS, KernelOptions

SMALL = {"pooling": pooling.CASES[:3], "ensemble": ensemble.CASES[:2], "head-step": ensemble.CASES[:2],
         "loss": small_calls.LOSS_CASES[:2], "overhead": [()]}  # fmt: skip
AXES = {"pooling": pooling.AXES, "ensemble": ensemble.AXES, "head-step": ensemble.AXES, "loss": small_calls.AXES}
CASES: dict[str, list[Any]] = {"pooling": pooling.CASES, "ensemble": ensemble.CASES, "head-step": HEAD_STEP_CASES,
                               "loss": small_calls.LOSS_CASES, "overhead": [()]}  # fmt: skip
VARIANTS = {  # of an op: passes, and for pooling whether inputs are in the cache
    "pooling": ("warm", "cold", "warm f+b"), "ensemble": ("f", "f+b"), "head-step": ("f+b",), "loss": ("f+b",),
    "overhead": ("",),
}  # fmt: skip


@functools.lru_cache(maxsize=1)  # contenders of a case follow each other, and a case is up to 400 MB
def built(op: str, shape: Any, dtype: torch.dtype, variant: str, peers: tuple[str, ...]) -> Any:
    """A checked case.

    Raises:
        WrongResultError: a result of ours is further from float64 than it may be.
    """
    torch.manual_seed(0)
    if op == "overhead":
        return small_calls.SmallestCalls()
    if op == "pooling":
        case: Any = pooling.Case(shape, dtype, variant == "cold", "f+b" in variant, peers)
    elif op == "ensemble":
        case = ensemble.Case(shape, dtype, variant == "f+b", peers)
    elif op == "head-step":
        case = ensemble.HeadStep(shape, dtype, peers)
    else:
        case = small_calls.LossCase(shape, dtype, peers)
    case.check()
    return case


def contenders(op: str, variant: str) -> tuple[str, ...]:
    """Ours, and the peers that this op has."""
    if op == "overhead":
        return tuple(small_calls.SmallestCalls().calls)
    known = {"pooling": pooling.PEERS, "ensemble": ensemble.PEERS}.get(op, ("eager", "hand-batched"))
    if variant == "warm f+b":
        known = ("sum-over-count", "bmm")
    return ("ours", *(peer for peer in PEERS if peer in known))


def rows(compiled: bool) -> Iterator[Any]:
    """Parameters of every benchmark."""
    for op in OPS:
        dtypes = ("float32",) if op == "overhead" else KernelOptions().dtypes
        for shape in CASES[op]:
            for dtype in dtypes:
                for variant in VARIANTS[op]:
                    if op == "pooling" and variant == "warm f+b" and shape == pooling.CASES[-1]:
                        continue  # as levi-fast bench kernels
                    for name in contenders(op, variant):
                        if name in COMPILED and not compiled:
                            continue
                        words = (op, "x".join(map(str, shape)), dtype, variant.replace(" ", "-"), name)
                        marks = [pytest.mark.small] if shape in SMALL[op] else []
                        identity = "-".join(word for word in words if word)
                        yield pytest.param(op, shape, dtype, variant, name, id=identity, marks=marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parameters = list(rows(metafunc.config.getoption("--compiled")))
    metafunc.parametrize(("op", "shape", "dtype", "variant", "name"), parameters)


def test_kernel(
    benchmark: Any, request: pytest.FixtureRequest, op: str, shape: Any, dtype: str, variant: str, name: str
) -> None:
    ours_and_peers = contenders(op, variant)
    peers = ("eager", name) if name in COMPILED else tuple(n for n in ours_and_peers[1:] if n not in COMPILED)
    case = built(op, shape, DTYPES[dtype], variant, peers)
    counted = {"flop": None, "bytes": None}
    for figure in counted:
        if hasattr(case, figure):
            counted[figure] = getattr(case, figure)()
    axes = dict(zip(AXES.get(op, ()), shape, strict=True))
    if op == "pooling":
        axes["input"] = variant.split(" ")[0]
    what = "" if op == "overhead" else "forward+backward" if "f+b" in variant else "forward"
    benchmark.group = " ".join(word for word in (op, *map(str, axes.values()), dtype, what) if word)
    benchmark.extra_info.update(
        op=op, case=axes, dtype=dtype, contender=name, threads=torch.get_num_threads(), **{"pass": what}, **counted
    )
    once = min(case.run(name, index) for index in range(3))
    seconds = float(request.config.getoption("benchmark_max_time"))
    least = int(request.config.getoption("benchmark_min_rounds"))
    index = 0

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal index
        index += 1
        return (name, *case.prepare(index)), {}

    benchmark.pedantic(case.call, setup=prepare, rounds=max(least, min(int(seconds / once), 10_000)))
