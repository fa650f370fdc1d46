"""``levi-fast bench memory``: peaks of a forward over its taps, and of a training step of each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from levi_fast.bench.backbones import BACKBONES
from levi_fast.bench.memory import BATCH, CASES, TOKENS, WIDTH, forward_memory, step_peak
from levi_fast.bench.methods import FLOOR, METHODS, OURS
from levi_fast.bench.record import Record
from levi_fast.bench.steps import StepOptions, affordable, free_memory, memory_cell, requirements
from levi_fast.errors import DataError

PARTS = ("forward", "step")


def bench_memory(
    options: StepOptions,
    output: Path | None,
    note: Callable[[str], None] = lambda _: None,
    parts: tuple[str, ...] = PARTS,
) -> dict[str, Any]:
    """Measure; the document as described in :mod:`levi_fast.bench.record`, with the parts ``forward`` and ``step``.

    Args:
        options: which backbones, inputs and contenders; nothing is timed.
        output: a JSON file, written after every row; rows of other cases in it stay.
        note: told of every figure.
        parts: of :data:`PARTS`; the forward is that of random BERTs of several depths.

    Raises:
        DataError: an unknown part; a process that measures ended without an answer.
    """
    for part in parts:
        if part not in PARTS:
            raise DataError(f"parts: expected some of {', '.join(PARTS)}; got {part!r}")
    settings = {name: value for name, value in asdict(options).items() if name not in ("seconds", "memory")}
    record = Record(output, {**settings, "parts": parts}, keep=True)
    if "forward" in parts:
        found = forward_memory(CASES, note, device=options.device)
        record.put("forward_of", {"batch": BATCH, "tokens": TOKENS, "width": WIDTH,
                                  "one_hidden_state_mib": found["one_hidden_state_mib"]})  # fmt: skip
        for row in found["rows"]:
            case = {"layers": row.pop("layers"), "forward": row.pop("forward")}
            record.add("forward", {"case": case, "dtype": "float32", "pass": "forward", **row})
    for name, batch, length in options.cases if "step" in parts else ():
        record.add("step", _step_row(name, batch, length, options, note))
    return record.document


def _step_row(
    name: str, batch: int, length: int, options: StepOptions, note: Callable[[str], None]
) -> dict[str, Any]:
    spec, dtype, device = BACKBONES[name], options.dtype_of(name), options.device
    needed = requirements(spec.size(), spec, batch, length, dtype)
    peaks, skipped = {}, {}
    for method in METHODS:
        if method not in (FLOOR, OURS, *options.peers):
            continue
        fits, why_not = affordable((method,), needed, free_memory(device))
        skipped.update(why_not)
        if fits:
            peaks[method] = step_peak(name, method, batch, length, dtype, device)
            note(f"{name} {batch} x {length} {dtype} {method}: {peaks[method]}")
    case = {"backbone": name, "batch": batch, "length": length}
    return {"case": case, "dtype": dtype, "pass": "step", "device": device, "peak_memory": peaks, "skipped": skipped}


def memory_tables(document: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal."""
    tables = []
    if document.get("forward"):
        table = Table(title="a forward of a random BERT: peak, MiB", title_justify="left")
        for title in ("layers", "forward", "peak", "beyond bare"):
            table.add_column(title, justify="left" if title == "forward" else "right")
        for row in document["forward"]:
            case = row["case"]
            what = f"{case['forward']} taps" if case["forward"].isdecimal() else case["forward"]
            table.add_row(str(case["layers"]), what, f"{row['peak_mib']:.2f}", f"{row['beyond_bare_mib']:.2f}")
        tables.append(table)
    rows = document.get("step", [])
    if rows:
        table = Table(title="a training step, MiB: held between steps + rise over one step", title_justify="left")
        for title in ("case", "method", "held + step"):
            table.add_column(title, justify="right" if title == "held + step" else "left")
        for row in rows:
            shown = f"{row['case']['backbone']} {row['case']['batch']} x {row['case']['length']} {row['dtype']}"
            for name in row["peak_memory"]:
                table.add_row(shown, name, memory_cell(row, name))
                shown = ""
            for name in row["skipped"]:
                table.add_row(shown, name, "left out")
            table.add_section()
        tables.append(table)
    return tables
