"""A comparison as one HTML file: no network, no script; light, dark, printed, on a phone and to a screen reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from levi_fast.report.charts import chart_list
from levi_fast.report.tables import METHOD_TITLES, METRIC_TITLES, figure

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f6f7f9; --ink: #1b1f24; --muted: #5b6572; --line: #d9dee5;
  --accent: #0b62c4; --best: #e3f1e6; --best-ink: #14532d; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1c2026; --ink: #e8eaed; --muted: #a5afbb;
  --line: #343b45; --accent: #7db4ff; --best: #173424; --best-ink: #b7efc9; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main, header, footer { max-width: 72rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 2.5rem } h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem }
h2 { font-size: 1.4rem; margin: 2.6rem 0 .4rem; padding-top: 1.2rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.02rem; margin: 1.7rem 0 .35rem } p { margin: .35rem 0; max-width: 62rem }
.muted, figcaption p, caption { color: var(--muted); font-size: .875rem }
nav ul { list-style: none; padding: 0; margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .5rem }
nav a { display: block; padding: .25rem .75rem; border: 1px solid var(--line); border-radius: 1rem;
  text-decoration: none } a { color: var(--accent) }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: .6rem .8rem }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line) }
thead th { background: var(--card); font-weight: 600; vertical-align: bottom }
th:first-child, td:first-child { text-align: left; font-weight: 500 }
td.best { background: var(--best); color: var(--best-ink); font-weight: 650 }
tr.reference th::after { content: " (reference)"; color: var(--muted); font-weight: 400 }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem;
  margin-top: .6rem }
figure { margin: 0; padding: .9rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
figcaption strong { display: block } figure svg { width: 100%; height: auto; margin-top: .4rem }
svg text { font-family: inherit !important }
details { margin: .8rem 0 } summary { cursor: pointer; color: var(--accent) }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: .5rem; font-size: .82rem }
footer { padding-top: 1.5rem; padding-bottom: 2.5rem }
@media (max-width: 40rem) { th, td { padding: .4rem .5rem; font-size: .84rem }
  th:first-child { white-space: normal; min-width: 7.5rem } thead th { white-space: normal } }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #bbb; --accent: #000 }
  figure, table { break-inside: avoid } nav { display: none } .scroll { overflow: visible }
  body { font-size: 11px } details > * { display: block } }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of {{ methods|length }} methods</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ methods|length }} methods on {{ data|map(attribute="name")|join(", ") }}</h1>
<p class="muted">{{ seeds|length }} seed{{ "" if seeds|length == 1 else "s" }}. Epoch, learning rate and each method's
own choice were made on in-distribution (ID) validation rows alone. OOD: out of distribution.</p>
{% if data|length > 1 %}<nav aria-label="Data sets"><ul>
{% for one in data %}<li><a href="#data-{{ loop.index }}">{{ one.name }}</a></li>{% endfor %}
</ul></nav>{% endif %}
</header>
<main>
{% for one in data %}
<section aria-labelledby="data-{{ loop.index }}">
<h2 id="data-{{ loop.index }}">{{ one.name }}</h2>
<p class="muted">{{ one.sizes }}</p>
{% for table in one.tables %}
<h3>{{ table.title }}</h3>
{% if table.note %}<p class="muted">{{ table.note }}</p>{% endif %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ one.name }}: {{ table.title }}"><table>
<thead><tr>{% for head in table.heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr{% if row.reference %} class="reference"{% endif %}><th scope="row">{{ row.name }}</th>
{% for cell in row.cells %}<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if table.charts %}<div class="charts">
{% for chart in table.charts %}<figure>
<figcaption><strong>{{ chart.title }}</strong><p>{{ chart.note }}</p></figcaption>
{{ chart.svg|safe }}</figure>
{% endfor %}</div>{% endif %}
{% endfor %}
</section>
{% endfor %}
</main>
<footer><h3>How it was made</h3>
<p class="muted">levi_fast {{ versions.levi_fast }}: {{ version_list }}. Every figure of this page, of every seed,
is in comparison.json beside it; every example's prediction is in cells/.</p>
<details><summary>Settings</summary><pre>{{ settings }}</pre></details></footer>
</body>
</html>
"""


def comparison_page(document: Mapping[str, Any]) -> str:
    """HTML of a comparison.

    Args:
        document: the content of ``comparison.json``, see
            :func:`levi_fast.training.comparison_summary.summarise`.
    """
    import json

    import jinja2  # torch brings it

    environment = jinja2.Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string(_TEMPLATE)
    data = [_section(name, found, document["reference"]) for name, found in document["data"].items()]
    return template.render(
        style=environment.filters["safe"](_STYLE),
        methods=document["methods"],
        seeds=document["seeds"],
        data=data,
        versions=document["versions"],
        version_list=", ".join(f"{name} {version}" for name, version in document["versions"].items()),
        settings=json.dumps(document["settings"], indent=2),
    )


def _section(name: str, data: Mapping[str, Any], reference: str) -> dict[str, Any]:
    charts = chart_list(name, data, reference)
    others = [_calibration(data, reference), _cost(data, reference)]
    tables = [_scores(data, reference), *_tests(data, reference), *others]
    kept = [table for table in tables if table is not None]
    kept[0]["charts"] = charts
    return {"name": name, "sizes": _sizes(data["sizes"]), "tables": kept}


def _scores(data: Mapping[str, Any], reference: str) -> dict[str, Any]:
    metric = data["metric"]
    choose = min if data["lower_is_better"] else max
    best = {s: choose(row["scores"][s]["mean"] for row in data["methods"].values()) for s in data["splits"]}
    arrow = "↓" if data["lower_is_better"] else "↑"
    title = METRIC_TITLES.get(metric, metric)

    def cell(row: Mapping[str, Any], split: str) -> dict[str, Any]:
        found = row["scores"][split]
        return {"text": with_sd(found, metric), "best": found["mean"] == best[split]}

    note = None
    if data["id_split"] == "validation":
        note = "There is no ID test data: the ID column is of the validation rows that the choices were made on."
    return {
        "title": f"{title[0].upper()}{title[1:]} {arrow}, mean ± standard deviation over seeds",
        "note": note,
        "heads": ["method", *data["splits"]],
        "rows": _rows(data, reference, lambda row: [cell(row, split) for split in data["splits"]]),
    }


def _tests(data: Mapping[str, Any], reference: str) -> list[dict[str, Any]]:
    """A table per split; none for one method."""
    if len(data["methods"]) < 2:
        return []
    share = data["metric"] in ("accuracy", "macro_f1")

    def cells(row: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
        if "tests" not in row:
            return [{"text": "-"}] * 3
        test = row["tests"][split]
        shown = [f"{100 * v:+.1f}" if share else f"{v:+.3f}" for v in (test["difference"], *test["interval"])]
        found = [f"{shown[0]} [{shown[1]}, {shown[2]}]"]
        return [{"text": text} for text in (*found, p_value(test["p_examples_holm"]), p_value(test["p_seeds_holm"]))]

    unit = " (percentage points)" if share else ""
    note = (
        f"Difference of errors{unit} with its 95 % bootstrap interval over examples; p values of a permutation test "
        "over examples and of a t-test over seeds, Holm-corrected over methods. Few seeds make the latter weak."
    )
    return [
        {
            "title": f"Paired tests against {METHOD_TITLES.get(reference, reference)}, {split}",
            "note": note if place == 0 else None,
            "heads": ["method", "error above reference", "p, examples", "p, seeds"],
            "rows": _rows(data, reference, lambda row, split=split: cells(row, split)),
        }
        for place, split in enumerate(data["splits"])
    ]


def _calibration(data: Mapping[str, Any], reference: str) -> dict[str, Any] | None:
    if any(row["calibration"] is None for row in data["methods"].values()):
        return None
    return {
        "title": "Calibration: expected calibration error ↓",
        "note": "15 bins of equal width (Guo et al. 2017), in percent.",
        "heads": ["method", *data["splits"]],
        "rows": _rows(
            data,
            reference,
            lambda row: [{"text": with_sd(row["calibration"][split], "accuracy")} for split in data["splits"]],
        ),
    }


def _cost(data: Mapping[str, Any], reference: str) -> dict[str, Any]:
    def cells(row: Mapping[str, Any]) -> list[dict[str, Any]]:
        cost = row["cost"]
        memory = f"{cost['peak_resident_bytes'] / 2**20:,.0f} MiB"
        if cost["peak_cuda_bytes"]:
            memory += f" + {cost['peak_cuda_bytes'] / 2**20:,.0f} MiB GPU"
        return [
            {"text": f"{cost['seconds']['mean']:,.1f} s"},
            {"text": f"{cost['trained_parameters']:,}"},
            {"text": memory},
        ]

    return {
        "title": "Cost",
        "note": "Seconds to train and score one cell, all its learning rates together; the frozen backbone's one "
        "pass, which frozen methods share, is not in it. Memory: the whole process's highest resident set meanwhile.",
        "heads": ["method", "seconds", "trained parameters", "peak memory"],
        "rows": _rows(data, reference, cells),
    }


def _rows(data: Mapping[str, Any], reference: str, cells: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": METHOD_TITLES.get(m, m),
            "reference": m == reference and len(data["methods"]) > 1,
            "cells": cells(row),
        }
        for m, row in data["methods"].items()
    ]


def with_sd(found: Mapping[str, Any], metric: str) -> str:
    """``85.8 ± 0.7 %`` or ``0.927 ± 0.022``; without deviation for one seed."""
    mean = figure(found["mean"], metric).strip()
    if found["sd"] is None:
        return mean
    sd = figure(found["sd"], metric).strip()
    return f"{mean.removesuffix(' %')} ± {sd}"


def p_value(value: float | None) -> str:
    """A p value as it is printed."""
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _sizes(sizes: Mapping[str, Any]) -> str:
    named: Sequence[tuple[str, Any]] = [(name, sizes[name]) for name in ("train", "validation", "test")]
    shown = [f"{count:,} {name}" for name, count in named if count is not None]
    shown += [f"{count:,} OOD {name}" for name, count in sizes["ood"].items()]
    return "Rows: " + ", ".join(shown) + "."
