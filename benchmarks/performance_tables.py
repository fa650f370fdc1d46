"""The tables and plots of docs/performance.md, and those of speed and size elsewhere, from benchmarks/results/."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pages import RESULTS, read, row
from targets import targets

from levi_fast.bench.backbones import BACKBONES
from levi_fast.bench.epochs import remark
from levi_fast.bench.methods import FLOOR, METHODS
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


def steps(document: Mapping[str, Any], memory_of: str = "") -> str:
    """Training steps on each backbone's own batch: time and memory of every method, beside the bare frozen forward.

    Args:
        document: of ``levi-fast bench step``.
        memory_of: the results file of ``levi-fast bench memory``, for the peaks of the same cases.
    """
    measured = read(memory_of).get("step", []) if memory_of else []
    peaks = {(str(found["case"]), found["dtype"]): found["peak_memory"] for found in measured}
    head = ["backbone, batch x length", "method", "ms", "over the bare forward", "trained", "held + step, MiB"]
    lines = [row(head), row(["---", "---", *["---:"] * 4])]
    for found in (own for own in document["step"] if _usual(own)):
        case = found["case"]
        title = f"{case['backbone']}, {case['batch']} x {case['length']}, {found['dtype']}"
        own = peaks.get((str(case), found["dtype"]), {})
        for name in (*found["median_us"], *found["skipped"]):
            cells = ["no room", "", "", ""]
            if name not in found["skipped"]:
                peak = own.get(name)
                cells = [f"{found['median_us'][name] / 1e3:,.1f}", f"{found['over_forward'][name]:.2f}",
                         f"{found['trained_parameters'][name]:,}",
                         f"{peak['held_mib']:,.0f} + {peak['step_mib']:,.0f}" if peak else ""]  # fmt: skip
            lines.append(row([title, name, *cells]))
            title = ""
    return "\n".join(lines)


def sweep(document: Mapping[str, Any]) -> str:
    """Steps over batch and length, a line per case: the bare forward, and what others take of it."""
    rows = sorted((found for found in document["step"] if not _usual(found)), key=_by_backbone)
    names = [name for name in METHODS if name != FLOOR and any(name in found["median_us"] for found in rows)]
    lines = [row(["backbone, batch x length", "bare forward, ms", *(f"{name}, over it" for name in names)])]
    lines.append(row(["---", *["---:"] * (len(names) + 1)]))
    for found in rows:
        case, over = found["case"], found["over_forward"]
        title = f"{case['backbone']}, {case['batch']} x {case['length']}, {found['dtype']}"
        cells = [f"{over[name]:.2f}" if name in over else "" for name in names]
        lines.append(row([title, f"{found['median_us'][FLOOR] / 1e3:,.1f}", *cells]))
    return "\n".join(lines)


def _usual(found: Mapping[str, Any]) -> bool:
    case = found["case"]
    spec = BACKBONES[case["backbone"]]
    return (case["batch"], case["length"], found["dtype"]) == (spec.batch, spec.length, spec.dtype)


def _by_backbone(found: Mapping[str, Any]) -> tuple[int, int, int]:
    case = found["case"]
    return list(BACKBONES).index(case["backbone"]), case["length"], case["batch"]


def memory(document: Mapping[str, Any]) -> str:
    """A forward's peak memory by depth and taps."""
    lines = [row(["layers", "forward", "peak, MiB", "beyond the bare one"]), row(["---:", "---", "---:", "---:"])]
    for own in document["forward"]:
        what = own["case"]["forward"]
        what = f"{what} taps, pooled" if what.isdecimal() else f"`{what}`" if "_" in what else what
        lines.append(
            row([str(own["case"]["layers"]), what, f"{own['peak_mib']:.1f}", f"{own['beyond_bare_mib']:+.1f}"])
        )
    return "\n".join(lines)


def epochs(document: Mapping[str, Any]) -> str:
    """Epochs and times to a target, by data set."""
    lines = [row(["data", "what", "seconds", "rounds", ""]), row(["---", "---", "---:", "---:", "---"])]
    for found in document["epoch"]:
        cells = [
            found["case"]["data"],
            found["case"]["what"],
            f"{found['median_seconds']:,.2f}",
            str(found["rounds"]),
        ]
        lines.append(row([*cells, remark(found)]))
    return "\n".join(lines)


def growth(document: Mapping[str, Any]) -> str:
    """Fits of time over size."""
    lines = [row(["what", "over", "sizes", "exponent", "fixed, µs", "µs per unit"])]
    lines.append(row(["---", "---", "---", "---:", "---:", "---:"]))
    for found in document["growth"]:
        error = found["exponent_stderr"]
        shown = f"{found['exponent']:.2f}" + ("" if error is None else f" ± {error:.2f}")
        sizes = f"{found['sizes'][0]:,} to {found['sizes'][-1]:,}"
        cells = [found["case"]["what"], found["case"]["variable"], sizes, shown]
        lines.append(row([*cells, f"{found['fixed']:,.4g}", f"{found['per_unit']:,.4g}"]))
    return "\n".join(lines)


def package(document: Mapping[str, Any]) -> str:
    """Import times in fresh interpreters, sizes, and the build."""
    lines = [row(["", "", "rounds"]), row(["---", "---:", "---:"])]
    for name, found in document["imports"]["statements"].items():
        lines.append(row([f"import: {name}", f"{found['seconds']['median']:.3f} s", str(found["rounds"])]))
    asked = document["help"]
    lines.append(row(["`levi-fast --help`", f"{asked['seconds']['median']:.3f} s", str(asked["rounds"])]))
    sizes = {"installed files": document["sizes"]["package_bytes"]}
    if "build" in document:
        built = document["build"]
        jobs, seconds = built["jobs"], built["native_build_seconds"]
        lines.append(row([f"building the native library, {jobs} jobs", f"{seconds:.1f} s", "1"]))
        sizes["wheel"] = built["wheel_bytes"]
    lines += [row([name, f"{size / 1e6:.2f} MB", ""]) for name, size in sizes.items()]
    return "\n".join(lines)


def dtypes(document: Mapping[str, Any]) -> str:
    """Backbones in fewer bits: how far their taps are off, and what that changes in accuracy, seed by seed."""
    lines = [row(["backbone", "error of its taps", "ID accuracy", "change", "OOD accuracy", "change"])]
    lines.append(row(["---", "---:", "---:", "---:", "---:", "---:"]))
    exact = document["rows"][0]["backbone_dtype"]
    for found in document["rows"]:
        cells = [f"`{found['backbone_dtype']}`", f"{100 * found['relative_error_of_taps']:.1f}%"]
        for split in ("id_accuracy", "ood_accuracy"):
            change, error = (100 * found[f"{split}_change{part}"] for part in ("", "_standard_error"))
            cells.append(f"{100 * found[split]['mean']:.1f}")
            cells.append("" if found["backbone_dtype"] == exact else f"{change:+.1f} ± {error:.1f}")
        lines.append(row(cells))
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
    "steps": steps,
    "sweep": sweep,
    "memory": memory,
    "epochs": epochs,
    "growth": growth,
    "package": package,
    "dtypes": dtypes,
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
