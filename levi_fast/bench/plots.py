"""The charts of ``levi-fast bench --plots``: each makes an SVG of a benchmark's document, or None without rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from levi_fast.bench import step_charts
from levi_fast.bench.ensemble import PRODUCTS
from levi_fast.report.charts import COLOURS, MARKERS

Draw = Callable[[Mapping[str, Any]], str | None]


def pyplot() -> Any:
    """matplotlib set so that text stays text and the same figures give the same file."""
    import matplotlib

    matplotlib.use("svg", force=True)
    from matplotlib import pyplot as plt

    plt.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "levi_fast", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip
    return plt


def svg_of(figure: Any) -> str:
    """The figure as SVG text on white, without a date."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
    pyplot().close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def case_name(row: Mapping[str, Any]) -> str:
    """``6, 384, 64``: the values of a row's case."""
    return ", ".join(str(value) for value in row["case"].values())


def ratios(document: Mapping[str, Any]) -> str | None:
    """The ensemble: time of each peer over ours per case, with the 95 % interval of the median; a panel per pass."""
    rows = document.get("ensemble", [])
    if not rows:
        return None
    kinds = list(dict.fromkeys((row["pass"], row["dtype"]) for row in rows))
    plt = pyplot()
    cases = list(dict.fromkeys(case_name(row) for row in rows))
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(1.8 + 2.5 * len(kinds), 1.2 + 0.55 * len(cases)), sharey=True, squeeze=False
    )
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peer_over_ours"] if peer != PRODUCTS))
    for axes, (which, dtype) in zip(panels[0], kinds, strict=True):
        for row in rows:
            if (row["pass"], row["dtype"]) != (which, dtype):
                continue
            for place, peer in enumerate(peers):
                found = row["peer_over_ours"].get(peer)
                if found is None:
                    continue
                low, high = found["interval"]
                y = cases.index(case_name(row)) + (place - (len(peers) - 1) / 2) * 0.13
                axes.plot([low, high], [y, y], color=COLOURS[place], linewidth=1)
                axes.plot(found["median"], y, MARKERS[place], color=COLOURS[place], markersize=4, label=peer)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(f"{which}, {dtype}", fontsize=9)
    panels[0][0].set_yticks(range(len(cases)), cases)
    panels[0][0].invert_yaxis()
    panels[0][0].set_ylabel(", ".join(rows[0]["case"]))
    figure.supxlabel("time of the peer over ours; right of 1 ours is faster", fontsize=9)
    legend(figure, panels[0])
    return svg_of(figure)


def roofline(document: Mapping[str, Any]) -> str | None:
    """The ensemble: arithmetic intensity across, GFLOP/s up, under the rates measured beside the rows."""
    rows = document.get("ensemble", [])
    if not rows:
        return None
    plt = pyplot()
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(0.6 + 3.4 * len(dtypes), 3.2), sharey=True, squeeze=False)
    for axes, dtype in zip(panels[0], dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        intensity = {id(row): 1e3 * row["gflop"] / row["megabytes"] for row in own}
        across = sorted((0.5 * min(intensity.values()), 2 * max(intensity.values())))
        read = _middle([row["read_gigabytes_per_s"] for row in own])
        gemm = _middle([row["gemm_gflop_per_s"] for row in own])
        bends = sorted({*across, min(max(gemm / read, across[0]), across[1])})
        axes.plot(bends, [min(gemm, read * x) for x in bends], color="black", linewidth=1)
        for place, which in enumerate(dict.fromkeys(row["pass"] for row in own)):
            chosen = [row for row in own if row["pass"] == which]
            axes.plot(
                [intensity[id(row)] for row in chosen], [row["gflop_per_s"] for row in chosen], MARKERS[place],
                color=COLOURS[place], markersize=5, label=which,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", title=dtype, xlabel="FLOP per byte")
    panels[0][0].set_ylabel("GFLOP/s")
    legend(figure, panels[0])
    return svg_of(figure)


def epochs(document: Mapping[str, Any]) -> str | None:
    """Seconds of every row as a bar, log scale, with the quartiles; a panel per data set; hatched: extrapolated."""
    rows = document.get("epoch", [])
    if not rows:
        return None
    plt = pyplot()
    names = list(dict.fromkeys(row["case"]["data"] for row in rows))
    groups = [[row for row in rows if row["case"]["data"] == name] for name in names]
    heights = [len(group) for group in groups]
    figure, panels = plt.subplots(
        len(names), 1, figsize=(6.4, 0.8 * len(names) + 0.26 * sum(heights)), sharex=True, squeeze=False,
        height_ratios=heights,
    )  # fmt: skip
    kinds = list(dict.fromkeys(row["case"]["what"].split(":")[0] for row in rows))
    for axes, name, group in zip(panels[:, 0], names, groups, strict=True):
        for place, row in enumerate(group):
            middle, (low, _, high) = row["median_seconds"], row["quartiles_seconds"]
            colour = COLOURS[kinds.index(row["case"]["what"].split(":")[0])]
            hatch = "///" if "extrapolated_from" in row else None
            axes.barh(place, middle, color=colour, height=0.7, hatch=hatch, edgecolor="white")
            axes.plot([low, high], [place, place], color="black", linewidth=1)
            axes.annotate(
                f"{middle:,.2f}", (max(middle, high), place), (4, 0), textcoords="offset points", va="center"
            )
        axes.set(xscale="log", title=name)
        axes.set_yticks(range(len(group)), [row["case"]["what"] for row in group])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.15)
    panels[-1][0].xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
    panels[-1][0].set_xlabel("seconds, log scale; hatched: extrapolated from a few batches by tokens")
    return svg_of(figure)


def scaling(document: Mapping[str, Any]) -> str | None:
    """Median time over size, both on log scales; a panel per variable, exponents of the fits in its legend."""
    rows = document.get("growth", [])
    if not rows:
        return None
    plt = pyplot()
    across = min(len(rows), 3)
    down = -(-len(rows) // across)
    figure, panels = plt.subplots(down, across, figsize=(0.4 + 2.9 * across, 2.9 * down), squeeze=False)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels.flat, rows, strict=False):
        for place, (name, found) in enumerate({"ours": row, **row["peers"]}.items()):
            error = "" if found["exponent_stderr"] is None else f" ± {found['exponent_stderr']:.2f}"
            label = f"{name}: {found['exponent']:.2f}{error}"
            style = {"marker": MARKERS[place], "color": COLOURS[place], "markersize": 4, "linewidth": 1}
            axes.plot(row["sizes"], [1e-3 * value for value in found["median_us"]], label=label, **style)
        axes.set(xscale="log", yscale="log", xlabel=row["case"]["variable"])
        axes.set_title(row["case"]["what"], fontsize=9)
        axes.legend(title="exponent", frameon=False, fontsize=8, title_fontsize=8)
    for line in panels:
        line[0].set_ylabel("ms")
    figure.tight_layout()
    return svg_of(figure)


def legend(figure: Any, panels: Sequence[Any]) -> None:
    """One legend under the whole figure, with every label once."""
    found: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        found = {**dict(zip(labels, handles, strict=True)), **found}
    figure.legend(
        list(found.values()), list(found), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=6, frameon=False
    )


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


CHARTS: dict[str, dict[str, Draw]] = {
    "kernels": {"ratios": ratios, "roofline": roofline},
    "epoch": {"epochs": epochs},
    "growth": {"scaling": scaling},
    "step": {
        "over-forward": step_charts.over_forward,
        "scaling": step_charts.scaling,
        "memory": step_charts.step_memory,
    },
    "memory": {"forward": step_charts.forward_memory, "step": step_charts.step_memory},
}
