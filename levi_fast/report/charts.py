"""Charts of a comparison as inline SVG: text stays text, and colours follow the page's light or dark scheme."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from levi_fast.report.tables import METHOD_TITLES, METRIC_TITLES

# Stand-ins, drawn by matplotlib and replaced by the page's variables; no chart uses them otherwise.
_VARIABLES = {
    "#010203": "var(--ink)",
    "#010204": "var(--muted)",
    "#010205": "var(--line)",
    "#010206": "var(--accent)",
}
INK, MUTED, LINE, ACCENT = _VARIABLES
# Okabe and Ito's colours, which are told apart by the colour-blind too; markers tell methods apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "*", "d", "8")
_SHARES = ("accuracy", "macro_f1", "micro_f1", "subset_accuracy")


def id_against_ood(data: Mapping[str, Any], ood: str, *, label: str) -> str:
    """Every method as a point: ID across, OOD up, bars of one standard deviation over seeds."""
    plt = _pyplot()
    scale = 100 if data["metric"] in _SHARES else 1
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    for place, (method, row) in enumerate(data["methods"].items()):
        x, y = row["scores"]["ID"], row["scores"][ood]
        axes.errorbar(
            scale * x["mean"],
            scale * y["mean"],
            xerr=scale * (x["sd"] or 0),
            yerr=scale * (y["sd"] or 0),
            fmt=_marker(place),
            color=_colour(place),
            markersize=8,
            elinewidth=1,
            label=METHOD_TITLES.get(method, method),
        )
    name = _metric(data)
    axes.set_xlabel(f"ID {name}")
    axes.set_ylabel(f"{ood} {name}")
    if data["lower_is_better"]:
        axes.invert_xaxis()
        axes.invert_yaxis()
    _legend(axes, len(data["methods"]))
    return _svg(figure, label)


def differences(data: Mapping[str, Any], split: str, reference: str, *, label: str) -> str:
    """Forest plot: each method's error above the reference's, with its bootstrap interval over examples."""
    plt = _pyplot()
    scale = 100 if data["metric"] in _SHARES else 1
    rows = [(m, row["tests"][split]) for m, row in data["methods"].items() if "tests" in row]
    figure, axes = plt.subplots(figsize=(3.9, 0.9 + 0.34 * len(rows)))
    for place, (_, test) in enumerate(rows):
        value, (low, high) = test["difference"], test["interval"]
        clear = low > 0 or high < 0
        axes.plot([scale * low, scale * high], [place, place], color=ACCENT if clear else MUTED, linewidth=2)
        axes.plot(scale * value, place, "o", color=ACCENT if clear else MUTED, markersize=6)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [METHOD_TITLES.get(method, method) for method, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    unit = "error, percentage points" if scale == 100 else f"{_metric(data)}"
    axes.set_xlabel(f"{unit} above {METHOD_TITLES.get(reference, reference)} (right of 0 is worse)")
    return _svg(figure, label)


def layers(data: Mapping[str, Any], *, label: str) -> str | None:
    """Each layer's own prediction on ID and OOD data, by method; None where no method has several layers."""
    found = {m: row["per_layer"] for m, row in data["methods"].items() if row["per_layer"]}
    if not found:
        return None
    plt = _pyplot()
    scale = 100 if data["metric"] in _SHARES else 1
    figure, axes = plt.subplots(figsize=(6.4, 3.8))
    splits = [data["id_split"], *(split.replace("OOD ", "ood ") for split in data["splits"] if split != "ID")]
    styles = ("-", "--", ":", "-.")
    for place, (method, row) in enumerate(data["methods"].items()):
        if method not in found:
            continue
        for style, split in enumerate(split for split in splits if split in found[method]["scores"]):
            title = "ID" if split == data["id_split"] else f"OOD {split.removeprefix('ood ')}"
            axes.plot(
                [layer + 1 for layer in row["per_layer"]["layers"]],
                [scale * value for value in row["per_layer"]["scores"][split]],
                styles[style % len(styles)],
                marker=_marker(place),
                markersize=5,
                color=_colour(place),
                label=f"{METHOD_TITLES.get(method, method)}, {title}",
            )
    axes.set_xticks(sorted({layer + 1 for row in found.values() for layer in row["layers"]}))
    axes.set_xlabel("layer of the backbone, from 1")
    axes.set_ylabel(_metric(data))
    _legend(axes, len(found) * len(splits))
    return _svg(figure, label)


def _metric(data: Mapping[str, Any]) -> str:
    title = METRIC_TITLES.get(data["metric"], data["metric"])
    return f"{title}, %" if data["metric"] in _SHARES else title


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _marker(place: int) -> str:
    return MARKERS[place % len(MARKERS)]


def _legend(axes: Any, count: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    axes.figure.set_size_inches(6.4, axes.figure.get_figheight() + 0.24 * ((count + 1) // 2))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg", force=True)
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none", "svg.hashsalt": "levi_fast", "font.family": "sans-serif", "font.size": 10,
            "text.color": INK, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
            "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.edgecolor": MUTED, "grid.color": LINE,
            "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        }
    )  # fmt: skip
    return pyplot


def _svg(figure: Any, label: str) -> str:
    from html import escape

    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    # ids are made from the content: two charts of a page must not share one
    prefix = f"c{abs(hash_of(label)) % 10**8}-"
    text = re.sub(r'id="([^"]+)"', lambda m: f'id="{prefix}{m[1]}"', text)
    text = re.sub(r'href="#([^"]+)"', lambda m: f'href="#{prefix}{m[1]}"', text)
    text = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{prefix}{m[1]})", text)
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", text, count=1)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def hash_of(text: str) -> int:
    """A number from a text, the same in every process."""
    import zlib

    return zlib.crc32(text.encode())


def chart_list(name: str, data: Mapping[str, Any], reference: str) -> Sequence[dict[str, str]]:
    """All charts of a data set: ``title``, ``note`` and ``svg``."""
    charts = []
    oods = [split for split in data["splits"] if split != "ID"]
    for ood in oods:
        title = f"ID against {ood}"
        note = "Up and to the right is better. Bars: one standard deviation over seeds."
        charts.append({"title": title, "note": note, "svg": id_against_ood(data, ood, label=f"{name}: {title}")})
    if len(data["methods"]) > 1:
        for split in data["splits"]:
            title = f"Difference to {METHOD_TITLES.get(reference, reference)}, {split}"
            note = "95 % bootstrap intervals over examples, paired. Coloured: the interval leaves out 0."
            svg = differences(data, split, reference, label=f"{name}: {title}")
            charts.append({"title": title, "note": note, "svg": svg})
    per_layer = layers(data, label=f"{name}: what each layer predicts")
    if per_layer is not None:
        note = "The prediction of each adapting layer by itself, mean over seeds."
        charts.append({"title": "What each layer predicts", "note": note, "svg": per_layer})
    return charts
