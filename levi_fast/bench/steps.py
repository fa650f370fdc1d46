"""``levi-fast bench step``: one training step of LEVI beside other ways to tune a backbone."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table
from torch import nn

from levi_fast.bench.backbones import BACKBONES, DEFAULT, DTYPES, Backbone, Size
from levi_fast.bench.memory import step_peak
from levi_fast.bench.methods import (
    FLOOR,
    METHODS,
    OURS,
    PEERS,
    TRAINER_OF,
    WITH_ADAPTERS,
    Method,
    build_methods,
    check,
)
from levi_fast.bench.options import check_choices, check_seconds
from levi_fast.bench.record import Record
from levi_fast.bench.timing import compared, interleaved
from levi_fast.errors import DataError

LEAST_ROUNDS = 3
BATCHES = 4  # that a contender's steps rotate through
GIB = 2**30
SLACK = GIB  # libraries, the other contenders' own parts
ACTIVATIONS = 24  # hidden states' worth that a trained layer keeps for its backward pass, roughly


@dataclass(frozen=True)
class StepOptions:
    """What is measured.

    Args:
        backbones: of :data:`levi_fast.bench.backbones.BACKBONES`.
        batch_sizes, lengths: every one with every other; empty is the backbone's own. A length is in tokens, of an
            image model the side in pixels.
        dtype: of the backbone's weights, of :data:`DTYPES`; None is the backbone's own.
        peers: of :data:`PEERS`; the bare forward and LEVI are always there.
        seconds: of interleaved rounds for every row; three rounds are run however long they take.
        device: "cpu" or "cuda".
        memory: also the peak memory of every contender, each from a process of its own.
    """

    backbones: tuple[str, ...] = DEFAULT
    batch_sizes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    dtype: str | None = None
    peers: tuple[str, ...] = PEERS
    seconds: float = 3.0
    device: str = "cpu"
    memory: bool = False
    cases: tuple[tuple[str, int, int], ...] = field(init=False)

    def __post_init__(self) -> None:
        check_choices("backbones", self.backbones, tuple(BACKBONES))
        check_choices("peers", self.peers, METHODS)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise DataError(f"dtype: expected one of {', '.join(DTYPES)}; got {self.dtype!r}")
        for name in ("batch_sizes", "lengths"):
            for number in getattr(self, name):
                if number < 1:
                    raise DataError(f"{name}: expected numbers from 1; got {number}")
        check_seconds("seconds", self.seconds)
        cases = []
        for name in self.backbones:
            spec, size = BACKBONES[name], BACKBONES[name].size()
            for length in self.lengths or (spec.length,):
                check_length(name, length)
                for batch in self.batch_sizes or (spec.batch,):
                    needed = requirements(size, spec, batch, length, self.dtype_of(name))
                    if needed[FLOOR] > (free := free_memory(self.device)):
                        raise DataError(
                            f"backbone {name}: its weights in {self.dtype_of(name)} and a forward of {batch} x "
                            f"{length} need about {needed[FLOOR] / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free"
                        )
                    cases.append((name, batch, length))
        object.__setattr__(self, "cases", tuple(cases))

    def dtype_of(self, name: str) -> str:
        """The dtype that a backbone is run in."""
        return self.dtype or BACKBONES[name].dtype


def check_length(name: str, length: int) -> None:
    """Raise DataError unless the backbone takes inputs of this length."""
    spec, longest = BACKBONES[name], BACKBONES[name].size().longest
    if spec.vocabulary is None and length != longest:
        raise DataError(f"lengths: {name} takes images of {longest} pixels a side; got {length}")
    if longest is not None and length > longest:
        raise DataError(f"lengths: {name} takes at most {longest} tokens; got {length}")


def free_memory(device: str) -> int:
    """Bytes that a new allocation may take."""
    return int(torch.cuda.mem_get_info()[0] if device != "cpu" else psutil.virtual_memory().available)


def requirements(size: Size, spec: Backbone, batch: int, length: int, dtype: str) -> dict[str, int]:
    """Bytes, roughly, that each contender adds to the memory; to the bare forward's belong the shared weights."""
    wide = DTYPES[dtype].itemsize
    hidden = batch * spec.positions(length) * size.width * wide
    # Peers run one after the other, so activations do not add up; weights, copies and optimizer states do.
    trained = ACTIVATIONS * size.layers * hidden
    return {
        FLOOR: size.parameters * wide + ACTIVATIONS * hidden + SLACK,
        "lora": trained,
        "full": 4 * size.parameters * wide + trained,  # a copy of its own, gradients, AdamW's two moments
    }


def affordable(names: Sequence[str], needed: dict[str, int], free: int) -> tuple[tuple[str, ...], dict[str, str]]:
    """The contenders that can run together, in the order of :data:`METHODS`, and why each other one cannot."""
    kept, skipped, taken = [], {}, needed[FLOOR]
    for name in METHODS:
        plain = TRAINER_OF.get(name, name)
        # Trainer's form has the modules and the optimizer of the plain one
        more = needed.get(plain, 0) if name != FLOOR and (name == plain or plain not in kept) else 0
        if name not in names:
            continue
        if name in WITH_ADAPTERS and importlib.util.find_spec("peft") is None:
            skipped[name] = "peft is not installed: pip install levi_fast[lora]"
        elif taken + more > free:
            skipped[name] = (
                f"needs about {more / GIB:.1f} GiB beside the others' {taken / GIB:.1f}, and {free / GIB:.1f} GiB "
                "are free"
            )
        else:
            kept.append(name)
            taken += more
    return tuple(kept), skipped


def step_row(name: str, backbone: nn.Module, batch: int, length: int, options: StepOptions) -> dict[str, Any]:
    """One row: the contenders' times, after checking that LEVI's forms agree on the loss."""
    spec, dtype, device = BACKBONES[name], options.dtype_of(name), options.device
    size = spec.size()
    needed = requirements(size, spec, batch, length, dtype)
    free = free_memory(device) + sum(p.nbytes for p in backbone.parameters())  # which are among what is needed
    names, skipped = affordable((FLOOR, OURS, *options.peers), needed, free)
    methods = build_methods(names, backbone, spec.config())
    batches = spec.batches(BATCHES, batch, length, device)
    errors = check(methods, batches[0], DTYPES[dtype], spec.final_norm)

    def run(method: Method, index: int) -> float:
        return method.seconds(batches[index % BATCHES])

    times = interleaved({key: partial(run, method) for key, method in methods.items()}, options.seconds, LEAST_ROUNDS)
    found = compared(times, ours=OURS, also=(FLOOR,))
    median = found["median_us"]
    trained = {key: method.trained_parameters() for key, method in methods.items()}
    methods.clear()
    gc.collect()  # the next row, and the processes that measure memory, need it
    row: dict[str, Any] = {
        "case": {"backbone": name, "batch": batch, "length": length},
        "dtype": dtype,
        "pass": "step",
        "device": device,
        "weights": spec.weights,
        **found,
        "over_forward": {key: round(value / median[FLOOR], 3) for key, value in median.items()},
        "floor_fraction": round(median[FLOOR] / median[OURS], 3),
        "backbone_parameters": size.parameters,
        "trained_parameters": trained,
        "relative_loss_error": errors,
        "skipped": skipped,
    }
    if options.memory:
        row["peak_memory"] = {key: step_peak(name, key, batch, length, dtype, device) for key in names}
    return row


def bench_step(
    options: StepOptions, output: Path | None, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure; the document as described in :mod:`levi_fast.bench.record`, with one part, ``step``.

    Args:
        options: what.
        output: a JSON file, written after every row; rows of other cases in it stay.
        note: told of every row as it begins, and of contenders that are left out.

    Raises:
        WrongResultError: LEVI's forms do not agree on the loss.
    """
    record = Record(output, asdict(options), keep=True)
    for name, cases in groupby(options.cases, key=itemgetter(0)):
        dtype = options.dtype_of(name)
        backbone = BACKBONES[name].load(DTYPES[dtype], options.device)
        for _, batch, length in cases:
            note(f"step {name} {batch} x {length} {dtype}")
            row = step_row(name, backbone, batch, length, options)
            for peer, reason in row["skipped"].items():
                note(f"  without {peer}: {reason}")
            record.add("step", row)
        del backbone
    return record.document


def step_tables(document: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal."""
    rows = document.get("step", [])
    if not rows:
        return []
    table = Table(title="one training step, median of rounds [95 % interval]", title_justify="left")
    table.add_column("case")
    table.add_column("method", no_wrap=True)
    memory = any("peak_memory" in row for row in rows)
    titles = ("ms", "over levi", "over forward", "trained", *(("held + step MiB",) if memory else ()))
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        case = f"{row['case']['backbone']} {row['case']['batch']} x {row['case']['length']} {row['dtype']}"
        for name in (name for name in METHODS if name in row["median_us"]):
            cells = [f"{row['median_us'][name] / 1e3:,.1f}", _ratio(row, name), f"{row['over_forward'][name]:.2f}"]
            cells += [f"{row['trained_parameters'][name]:,}", *((memory_cell(row, name),) if memory else ())]
            table.add_row(case, name, *cells)
            case = ""
        for name in row["skipped"]:
            table.add_row(case, name, "left out")
        table.add_section()
    return [table]


def _ratio(row: dict[str, Any], name: str) -> str:
    found = row["peer_over_ours"].get(name)
    return f"{found['median']:.2f} [{found['interval'][0]:.2f}, {found['interval'][1]:.2f}]" if found else ""


def memory_cell(row: dict[str, Any], name: str) -> str:
    """``held + rise`` of one contender, in MiB."""
    found = row.get("peak_memory", {}).get(name)
    return f"{found['held_mib']:,.1f} + {found['step_mib']:,.1f}" if found else ""
