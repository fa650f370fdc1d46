"""The charts of steps and of memory: each makes an SVG of a benchmark's document, or None without rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from levi_fast.bench.methods import FLOOR, METHODS, TRAINER_OF
from levi_fast.report.charts import COLOURS, MARKERS

Rows = Sequence[Mapping[str, Any]]
PANELS_ACROSS = 4


def over_forward(document: Mapping[str, Any]) -> str | None:
    """A step of every method over the bare forward, a group of bars per backbone: its case with the most methods."""
    most: dict[str, Mapping[str, Any]] = {}
    for row in document.get("step", []):
        known = most.setdefault(row["case"]["backbone"], row)
        if len(row["over_forward"]) > len(known["over_forward"]):
            most[row["case"]["backbone"]] = row
    rows = list(most.values())
    values = [{name: value for name, value in row["over_forward"].items() if name != FLOOR} for row in rows]
    return _bars(rows, values, "time of a step over the bare forward", "{:.2f}", line=1)


def scaling(document: Mapping[str, Any]) -> str | None:
    """Time of a step over the batch size and over the length, a panel per sweep; None where neither was swept."""
    from levi_fast.bench.plots import legend, pyplot, svg_of

    sweeps = []
    rows = document.get("step", [])
    for axis, fixed in (("batch", "length"), ("length", "batch")):
        for key in dict.fromkeys((row["case"]["backbone"], row["dtype"], row["case"][fixed]) for row in rows):
            own = [row for row in rows if (row["case"]["backbone"], row["dtype"], row["case"][fixed]) == key]
            if len(own) > 1:
                title = f"{key[0]} {key[1]}, {fixed} {key[2]}"
                sweeps.append((axis, title, sorted(own, key=lambda row: row["case"][axis])))
    if not sweeps:
        return None
    plt = pyplot()
    across_page = min(len(sweeps), PANELS_ACROSS)
    down = -(-len(sweeps) // across_page)
    size = (0.8 + 2.8 * across_page, 0.3 + 2.6 * down)
    figure, panels = plt.subplots(down, across_page, figsize=size, squeeze=False, layout="constrained")
    for axes in panels.flat[len(sweeps) :]:
        axes.set_visible(False)
    for axes, (axis, title, own) in zip(panels.flat, sweeps, strict=False):
        for name in METHODS:
            points = [(r["case"][axis], r["median_us"][name] / 1e3) for r in own if name in r["median_us"]]
            if points:
                across, up = zip(*points, strict=True)
                style = "--" if name in TRAINER_OF else "-"
                axes.plot(across, up, style, color=_colour(name), marker=_marker(name), markersize=4, label=name)
        ticks = [row["case"][axis] for row in own]
        axes.set(xscale="log", yscale="log", title=title, xlabel=axis)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    for first in panels[:, 0]:
        first.set_ylabel("ms a step")
    legend(figure, panels[0])
    return svg_of(figure)


def step_memory(document: Mapping[str, Any]) -> str | None:
    """What every method holds and one step adds, a group of bars per case."""
    rows = [row for row in document.get("step", []) if row.get("peak_memory")]
    values = [{name: found["total_mib"] for name, found in row["peak_memory"].items()} for row in rows]
    return _bars(rows, values, "MiB: weights, optimizer's state and one step", "{:.0f}")


def forward_memory(document: Mapping[str, Any]) -> str | None:
    """Peak of a forward, bars by depth and by what is kept of it."""
    from levi_fast.bench.plots import pyplot, svg_of

    rows = sorted(document.get("forward", []), key=lambda row: row["case"]["layers"])
    if not rows:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 0.8 + 0.3 * len(rows)))
    labels = []
    for place, row in enumerate(rows):
        what = row["case"]["forward"]
        kind = 0 if what == "bare" else 1 if what.isdecimal() else 2
        labels.append(f"{row['case']['layers']} layers, {what + ' taps' if kind == 1 else what}")
        axes.barh(place, row["peak_mib"], color=COLOURS[kind])
        axes.text(row["peak_mib"], place, f" {row['peak_mib']:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("peak of one forward, MiB")
    return svg_of(figure)


def _place(name: str) -> int:
    """Trainer's form of a method takes that one's colour."""
    return [name for name in METHODS if name not in TRAINER_OF].index(TRAINER_OF.get(name, name))


def _colour(name: str) -> str:
    return COLOURS[_place(name)]


def _marker(name: str) -> str:
    return MARKERS[_place(name)]


def _bars(rows: Rows, values: Sequence[Mapping[str, float]], label: str, form: str, line: float | None = None) -> Any:
    from levi_fast.bench.plots import legend, pyplot, svg_of

    names = [name for name in METHODS if any(name in value for value in values)]
    if not rows:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + (0.16 * len(names) + 0.15) * len(rows)))
    high = 0.8 / len(names)
    for place, name in enumerate(names):
        for group, value in enumerate(values):
            if name in value:
                y = group + (place - (len(names) - 1) / 2) * high
                hatch = "////" if name in TRAINER_OF else None
                axes.barh(y, value[name], high, color=_colour(name), hatch=hatch, edgecolor="white", label=name)
                axes.text(value[name], y, " " + form.format(value[name]), va="center", fontsize=7)
    if line is not None:
        axes.axvline(line, color="black", linewidth=0.8)
    cases = [row["case"] for row in rows]
    shown = [f"{case['backbone']}\n{case['batch']} x {case['length']}" for case in cases]
    axes.set_yticks(range(len(rows)), [f"{s}, {row['dtype']}" for s, row in zip(shown, rows, strict=True)])
    axes.invert_yaxis()
    if line is None:  # from tens to ten thousands of MiB; ratios begin at 0
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlabel(label)
    legend(figure, [axes])
    return svg_of(figure)
