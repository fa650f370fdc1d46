"""``levi-fast bench kernels``: every op, every case, beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from levi_fast.bench import ensemble, pooling, small_calls
from levi_fast.bench.options import check_choices, check_seconds
from levi_fast.bench.record import Record
from levi_fast.bench.timing import Rates
from levi_fast.errors import DataError

OPS = ("pooling", "ensemble", "loss", "head-step", "overhead")
PEERS = tuple(dict.fromkeys((*ensemble.PEERS, *pooling.PEERS)))
COMPILED = ("compile", "max-autotune")  # seconds to a minute of compiling a row
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD_STEP_CASES = ensemble.CASES[:4]


@dataclass(frozen=True)
class KernelOptions:
    """What is measured.

    Args:
        ops: of :data:`OPS`.
        dtypes: of :data:`DTYPES`.
        cases: places in :data:`levi_fast.bench.ensemble.CASES`; None is all. Other ops have cases of their own.
        peers: of :data:`PEERS`.
        seconds: of interleaved rounds for every row; the fewest rounds are run however long they take.
    """

    ops: tuple[str, ...] = OPS
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    cases: tuple[int, ...] | None = None
    peers: tuple[str, ...] = tuple(peer for peer in PEERS if peer not in COMPILED)
    seconds: float = 1.0

    def __post_init__(self) -> None:
        check_choices("ops", self.ops, OPS)
        check_choices("dtypes", self.dtypes, tuple(DTYPES))
        check_choices("peers", self.peers, PEERS)
        for case in self.cases or ():
            if not 0 <= case < len(ensemble.CASES):
                raise DataError(f"cases: expected numbers from 0 to {len(ensemble.CASES) - 1}; got {case}")
        check_seconds("seconds", self.seconds)


def bench_kernels(
    options: KernelOptions, output: Path | None, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure on CPU; the document as described in :mod:`levi_fast.bench.record`, parts named by op.

    Args:
        options: what.
        output: a JSON file, written after every row; rows of other cases in it stay.
        note: told of every row as it begins.

    Raises:
        WrongResultError: a result of ours is further from float64 than twice PyTorch's own.
    """
    record = Record(output, asdict(options), keep=True)
    dtypes = [DTYPES[name] for name in options.dtypes]
    peers: Sequence[str] = options.peers
    if "overhead" in options.ops:
        note("call overhead")
        record.put("call_overhead_us", small_calls.call_overhead(options.seconds))
    if "loss" in options.ops:
        for shape in small_calls.LOSS_CASES:
            for dtype in dtypes:
                note(f"loss {shape} {dtype}")
                record.add("loss", small_calls.loss_row(shape, dtype, peers, options.seconds))
    if "pooling" in options.ops:
        for size in pooling.CASES:
            for dtype in dtypes:
                for cold in (False, True):
                    note(f"pooling {size} {dtype} {'out of' if cold else 'in'} cache")
                    record.add("pooling", pooling.pooling_row(size, dtype, cold, peers, options.seconds))
                if size != pooling.CASES[-1]:
                    record.add("pooling", pooling.pooling_backward_row(size, dtype, peers, options.seconds))
    chosen = [case for place, case in enumerate(ensemble.CASES) if options.cases is None or place in options.cases]
    rates = Rates()
    for case in chosen if "ensemble" in options.ops else ():
        for dtype in dtypes:
            for backward in (False, True):
                note(f"ensemble {case} {dtype} {'forward and backward' if backward else 'forward'}")
                row = ensemble.ensemble_row(case, dtype, backward, peers, options.seconds, rates)
                record.add("ensemble", row)
    for case in chosen if "head-step" in options.ops else ():
        if case in HEAD_STEP_CASES:
            for dtype in dtypes:
                note(f"ensemble and loss {case} {dtype}")
                record.add("head-step", ensemble.head_step_row(case, dtype, peers, options.seconds))
    return record.document


def kernel_tables(document: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal."""
    tables = []
    for part in ("pooling", "ensemble", "loss", "head-step"):
        rows = document.get(part, [])
        if not rows:
            continue
        names = [name for name in PEERS if any(name in row["peer_over_ours"] for row in rows)]
        table = Table(
            title=f"{part}: time of each peer over ours, median of rounds [95 % interval]", title_justify="left"
        )
        for title in ("case", "dtype", "pass"):
            table.add_column(title, justify="left", no_wrap=title != "case")
        for title in ("ours µs", *names, "of roofline"):
            table.add_column(title, justify="right")
        for row in rows:
            cells = [" ".join(str(value) for value in row["case"].values()), row["dtype"]]
            cells += [row["pass"].replace("forward+backward", "f+b"), f"{row['median_us']['ours']:,.1f}"]
            for name in names:
                found = row["peer_over_ours"].get(name)
                low, high = found["interval"] if found else (0, 0)
                cells.append(f"{found['median']:.2f} [{low:.2f}, {high:.2f}]" if found else "")
            cells.append(f"{row['fraction_of_roofline']:.0%}" if "fraction_of_roofline" in row else "")
            table.add_row(*cells)
        tables.append(table)
    if "call_overhead_us" in document:
        table = Table(title="one call on the smallest input", title_justify="left")
        table.add_column("call")
        table.add_column("µs", justify="right")
        for name, value in document["call_overhead_us"].items():
            table.add_row(name.replace("_", " "), f"{value:.1f}")
        tables.append(table)
    return tables
