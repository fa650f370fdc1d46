"""The plots of docs/evidence.md, from the JSON files under benchmarks/results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import RESULTS, read

from levi_fast.bench.plots import pyplot, svg_of
from levi_fast.report.charts import COLOURS, MARKERS
from levi_fast.report.tables import METHOD_TITLES
from levi_fast.storage import write_atomic

plt = pyplot()
_SIZES = ("levi", "taps-only", "linear-probe", "task-model")


def draw(folder: Path) -> None:
    """Every plot whose results are there, as SVG files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("frozen", "all", "all-movielens", "digits"):
        if (RESULTS / f"evidence-{name}.json").is_file():
            id_against_ood(read(f"evidence-{name}"), folder / f"{name}.svg")
    found = [p.stem.removeprefix("evidence-ablations-") for p in sorted(RESULTS.glob("evidence-ablations-*.json"))]
    if found:
        documents = {name: read(f"evidence-ablations-{name}") for name in found}
        ablations(documents, folder / "ablations.svg")
        sizes(documents, folder / "sizes.svg")


def id_against_ood(document: Mapping[str, Any], path: Path) -> None:
    """A panel per data set, a point per method: ID across, mean over OOD sets up, better is up and right."""
    data = document["data"]
    figure, panels = plt.subplots(1, len(data), figsize=(1.2 + 3.4 * len(data), 3.9), squeeze=False)
    for axes, (name, found) in zip(panels[0], data.items(), strict=True):
        scale = 1 if found["lower_is_better"] else 100
        oods = [split for split in found["splits"] if split != "ID"]
        for place, (method, row) in enumerate(found["methods"].items()):
            ood = sum(row["scores"][split]["mean"] for split in oods) / len(oods)
            axes.plot(
                scale * row["scores"]["ID"]["mean"], scale * ood, MARKERS[place % len(MARKERS)], markersize=8,
                color=COLOURS[place % len(COLOURS)], label=METHOD_TITLES.get(method, method),
            )  # fmt: skip
        if found["lower_is_better"]:
            axes.invert_xaxis()
            axes.invert_yaxis()
        axes.set(title=name, xlabel=f"ID {found['metric']}", ylabel=f"OOD {found['metric']}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, frameon=False)
    _save(figure, path)


def ablations(documents: Mapping[str, Any], path: Path) -> None:
    """Per data set and variant: how far its OOD mean is from the default's, seed by seed; right is better."""
    figure, panels = plt.subplots(1, len(documents), figsize=(2.2 + 3.2 * len(documents), 5.4), squeeze=False)
    for axes, (name, document) in zip(panels[0], documents.items(), strict=True):
        lower = document["metric"] == "rmse"
        rows = {k: v for k, v in document["variants"].items() if v["group"] not in ("default", "training size")}
        base = document["variants"]["levi"]["scores"]["mean of OOD"]["seeds"]
        for place, row in enumerate(rows.values()):
            own = row["scores"]["mean of OOD"]["seeds"]
            apart = [(b - a if lower else 100 * (a - b)) for a, b in zip(own, base, strict=True)]
            axes.plot(apart, [place] * len(apart), "o", color=COLOURS[0], alpha=0.35, markersize=5)
            axes.plot(sum(apart) / len(apart), place, "D", color=COLOURS[1], markersize=6)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(rows)), list(rows) if axes is panels[0][0] else [""] * len(rows))
        axes.invert_yaxis()
        unit = "less RMSE" if lower else "points more accuracy"
        axes.set(title=name, xlabel=f"OOD, beside the defaults: {unit}")
    _save(figure, path)


def sizes(documents: Mapping[str, Any], path: Path) -> None:
    """Per data set: the OOD mean over training rows, a line per method."""
    figure, panels = plt.subplots(1, len(documents), figsize=(1.2 + 3.2 * len(documents), 3.4), squeeze=False)
    for axes, (name, document) in zip(panels[0], documents.items(), strict=True):
        lower = document["metric"] == "rmse"
        for place, method in enumerate(_SIZES):
            points = sorted(_points(document, method))
            scale = 1 if lower else 100
            axes.plot(
                [rows for rows, _ in points], [scale * score for _, score in points], marker=MARKERS[place],
                color=COLOURS[place], label=METHOD_TITLES[method],
            )  # fmt: skip
        axes.set_xscale("log")
        if lower:
            axes.invert_yaxis()
        axes.set(title=name, xlabel="training rows", ylabel=f"OOD {document['metric']}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
    _save(figure, path)


def _points(document: Mapping[str, Any], method: str) -> Sequence[tuple[int, float]]:
    return [
        (row["training_rows"], row["scores"]["mean of OOD"]["mean"])
        for name, row in document["variants"].items()
        if row["group"] == "training size" and name.partition(",")[0] == method
    ]


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    write_atomic(path, svg_of(figure))
