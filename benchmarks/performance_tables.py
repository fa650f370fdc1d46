"""The tables and plots of docs/performance.md, and README's of speed, from benchmarks/results/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pages import RESULTS, read, row
from targets import targets

from levi_fast.bench.plots import CHARTS
from levi_fast.storage import write_atomic

FILES = {
    "kernels": "kernels_cpu",
    "step": "steps_cpu",
    "memory": "memory_cpu",
    "epoch": "epochs_cpu",
    "growth": "growth_cpu",
}


def kernels(document: Mapping[str, Any], which: str = "forward+backward") -> str:
    """Cases of the ensemble by dtype: times faster than the eager reference and than the best peer."""
    rows = [r for r in document["ensemble"] if r["pass"] == which]
    dtypes = {"float32": "fp32", "bfloat16": "bf16"}
    head = [", ".join(rows[0]["case"])]
    for name in dtypes.values():
        head += [f"{name}: over eager", "over the best peer", "of roofline"]
    lines = [row(head), row(["---", *["---:"] * (len(head) - 1)])]
    for case in {str(r["case"]): r["case"] for r in rows}.values():
        cells = [", ".join(f"{value:,}" if value > 9999 else str(value) for value in case.values())]
        for dtype in dtypes:
            (found,) = [r for r in rows if r["case"] == case and r["dtype"] == dtype]
            eager = found["median_us"]["eager"] / found["median_us"]["ours"]
            cells += [f"{eager:.1f}", f"{found['best_peer_over_ours']:.2f}", f"{found['fraction_of_roofline']:.0%}"]
        lines.append(row(cells))
    return "\n".join(lines)


def pooling(document: Mapping[str, Any]) -> str:
    """Pooling by case and dtype: times faster than bmm in cache, and of the read bandwidth out of it."""
    rows = [r for r in document["pooling"] if r["pass"] == "forward"]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    head = ["B, T, D"]
    for dtype in dtypes:
        head += [f"{dtype}: over bmm, in cache", "of read bandwidth, out of cache"]
    lines = [row(head), row(["---", *["---:"] * (len(head) - 1)])]
    for case in dict.fromkeys(tuple(r["case"][axis] for axis in "BTD") for r in rows):
        cells = [", ".join(str(value) for value in case)]
        for dtype in dtypes:
            own = {r["case"]["input"]: r for r in rows
                   if tuple(r["case"][axis] for axis in "BTD") == case and r["dtype"] == dtype}  # fmt: skip
            warm = own["warm"]["median_us"]
            cells += [f"{warm['bmm'] / warm['ours']:.2f}", f"{own['cold']['fraction_of_roofline']:.0%}"]
        lines.append(row(cells))
    return "\n".join(lines)


def overhead(document: Mapping[str, Any]) -> str:
    """Microseconds of a call on the smallest input."""
    lines = [row(["call", "µs"]), row(["---", "---:"])]
    lines += [row([name.replace("_", " "), f"{value:.1f}"]) for name, value in document["call_overhead_us"].items()]
    return "\n".join(lines)


def goals(state: str = "") -> str:
    """Every target, its figure, and whether it is met; what misses it below. ``state``: met, missed or unmeasured."""
    wanted = {"": (True, False, None), "met": (True,), "missed": (False,), "unmeasured": (None,)}[state]
    lines = [row(["", "target", "figure", "", "file"]), row(["---", "---", "---", "---", "---"])]
    for target in targets(RESULTS):
        if target.met in wanted:
            verdict = "not measured" if target.met is None else "met" if target.met else "**not met**"
            goal = "<br>".join((target.goal, *(f"&nbsp; {line}" for line in target.missed)))
            figure = "" if target.met is None else target.figure
            lines.append(row([target.group, goal, figure, verdict, f"`{target.source}`"]))
    return "\n".join(lines)


MAKERS: dict[str, Callable[..., str]] = {
    "kernels": kernels,
    "pooling": pooling,
    "overhead": overhead,
    "targets": goals,
}


def draw(folder: Path) -> None:
    """Every chart of ``levi-fast bench`` whose results are there, as SVG files in ``folder``."""
    for name, file in FILES.items():
        if (RESULTS / f"{file}.json").is_file():
            for chart, make in CHARTS.get(name, {}).items():
                svg = make(read(file))
                if svg is not None:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_atomic(folder / f"{name}-{chart}.svg", svg)
