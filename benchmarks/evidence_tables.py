"""The tables of docs/evidence.md, and README's of methods, from the JSON files under benchmarks/results/."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pages import row as _row

from levi_fast.report.statistics import mean_and_sd
from levi_fast.report.tables import METHOD_TITLES

_SHARES = ("accuracy", "macro_f1")


def methods(document: Mapping[str, Any], data: str, names: str = "") -> str:
    """Methods (all, or those named) × splits: mean ± standard deviation; the best mean of a column is bold.

    ``=`` marks what the paired test over examples cannot tell from the reference (Holm-corrected p of 0.05 or more),
    ``<`` what it finds worse and ``>`` what it finds better.
    """
    found = document["data"][data]
    metric, lower, splits = found["metric"], found["lower_is_better"], list(found["splits"])
    rows = {
        name: {**{s: row["scores"][s] for s in splits}, "OOD mean": _mean_of_ood(row["scores"], splits)}
        for name, row in found["methods"].items()
        if not names or name in names.split(",")
    }
    columns = [*splits, "OOD mean"] if len(splits) > 2 else splits
    best = {c: (min if lower else max)(rows, key=lambda name: rows[name][c]["mean"]) for c in columns}
    lines = [_row([f"{metric} {'↓' if lower else '↑'}", *columns]), _row(["---", *["---:"] * len(columns)])]
    for name, row in rows.items():
        tests = found["methods"][name].get("tests", {})
        cells = []
        for column in columns:
            shown = _cell(row[column], metric)
            shown = f"**{shown}**" if best[column] == name else shown
            mark = _mark(tests[column]) if column in tests else ""
            cells.append(f"{shown} {mark}".strip())
        lines.append(_row([METHOD_TITLES.get(name, name), *cells]))
    return "\n".join(lines)


def ablations(document: Mapping[str, Any]) -> str:
    """Every variant but the training sizes, and how far from the default it is, seed by seed."""
    variants = {k: v for k, v in document["variants"].items() if v["group"] != "training size"}
    metric = document["metric"]
    base = variants["levi"]["scores"]
    lines = [_row([metric, "ID", "OOD mean", "OOD mean, less the default's"]), _row(["---", "---:", "---:", "---:"])]
    for name, row in variants.items():
        cells = [_cell(row["scores"][split], metric) for split in ("ID", "mean of OOD")]
        pairs = zip(row["scores"]["mean of OOD"]["seeds"], base["mean of OOD"]["seeds"], strict=True)
        cells.append("" if name == "levi" else _cell(_figure([a - b for a, b in pairs]), metric, sign="+"))
        lines.append(_row(["levi (defaults)" if name == "levi" else name, *cells]))
    return "\n".join(lines)


def sizes(document: Mapping[str, Any]) -> str:
    """Training rows × methods: OOD mean (ID in brackets)."""
    found: dict[int, dict[str, str]] = {}
    for name, row in document["variants"].items():
        if row["group"] == "training size":
            shown = [_cell(row["scores"][split], document["metric"]) for split in ("mean of OOD", "ID")]
            found.setdefault(row["training_rows"], {})[name.partition(",")[0]] = f"{shown[0]} ({shown[1]})"
    columns = list(next(iter(found.values())))
    lines = [_row(["training rows", *(METHOD_TITLES.get(c, c) for c in columns)])]
    lines.append(_row(["---:", *["---:"] * len(columns)]))
    lines += [_row([f"{rows:,}", *(row[c] for c in columns)]) for rows, row in sorted(found.items())]
    return "\n".join(lines)


def rules(document: Mapping[str, Any]) -> str:
    """How the blend is chosen × data sets, trained by default; then LEVI's two parts by themselves."""
    data = document["data"]
    names = [rule for rule in next(iter(data.values()))["default"] if rule not in document["three_ways"]["rules"]]
    rows = {rule: {d: found["default"].get(rule) for d, found in data.items()} for rule in names}
    return _tried(document, {**rows, **_parts(data)}, "blend")


def trainings(document: Mapping[str, Any]) -> str:
    """Ways of training × data sets, under the rule that is the default; then LEVI's two parts by themselves."""
    data = document["data"]
    apart = (*_PARTS, *(name for name in document["three_ways"]["trainings"] if name != "default"))
    names = dict.fromkeys(name for found in data.values() for name in found if name not in apart)
    rows = {n: {d: found[n][document["rule"]] for d, found in data.items() if n in found} for n in names}
    return _tried(document, {**rows, **_parts(data)}, "training")


def weighings(document: Mapping[str, Any]) -> str:
    """Trainings whose y(0, view) is weighed too, under one rule × data sets; then LEVI's two parts by themselves."""
    ways = document["three_ways"]
    return _three_ways(document, {name: (name, ways["rule"]) for name in ways["trainings"]}, "training")


def three_way_rules(document: Mapping[str, Any]) -> str:
    """Rules that weigh y(0, view) too, of one training × data sets; then LEVI's two parts by themselves."""
    ways = document["three_ways"]
    return _three_ways(document, {rule: (ways["training"], rule) for rule in ways["rules"]}, "weights")


def cross_fitting(document: Mapping[str, Any]) -> str:
    """Which rows choose the blend × data sets; then what there is to choose from."""
    data = document["data"]
    lines = [_row(["chosen by", *data]), _row(["---", *["---:"] * len(data)])]
    for name in next(iter(data.values()))["rules"]:
        cells = []
        for found in data.values():
            row = found["rules"][name]
            ood = {"mean": row["mean"]["OOD"], "sd": row["sd"]["OOD"]}
            own = {"mean": row["mean"]["ID"], "sd": None}
            cells.append(f"{_cell(ood, found['metric'])} ({_cell(own, found['metric'])})")
        lines.append(_row([f"**{name}**" if name == document["default"] else name, *cells]))
    lines.append(
        _row(
            [
                "rows: validation, held out",
                *(f"{d['validation_rows']}, {d['held_out_rows']:,}" for d in data.values()),
            ]
        )
    )
    return "\n".join(lines)


def _three_ways(document: Mapping[str, Any], wanted: Mapping[str, tuple[str, str]], first: str) -> str:
    data = document["data"]
    shown = {"default, with its own rule": ("default", document["rule"]), **wanted}
    rows = {n: {d: found.get(t, {}).get(rule) for d, found in data.items()} for n, (t, rule) in shown.items()}
    return _tried(document, {**rows, **_parts(data)}, first)


_PARTS = ("taps-only", "task-model")


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    return {METHOD_TITLES[part]: {d: found[part][""] for d, found in data.items()} for part in _PARTS}


def _tried(document: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], first: str) -> str:
    """OOD mean with the ID score in brackets; the data sets that chose come before those that confirmed."""
    columns = [*document["chosen_on"], *document["confirmed_on"]]
    metrics = document["metrics"]
    lines = [_row([first, *columns]), _row(["---", *["---:"] * len(columns)])]
    for name, row in rows.items():
        cells = []
        for column in columns:
            found = row.get(column)
            if found is None:
                cells.append("-")
                continue
            ood, own = (_cell({"mean": found["mean"][split], "sd": None}, metrics[column]) for split in ("OOD", "ID"))
            cells.append(f"{ood} ({own})")
        lines.append(_row([name, *cells]))
    return "\n".join(lines)


def _mean_of_ood(scores: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
    return _figure([sum(v) / len(v) for v in zip(*(scores[s]["values"] for s in splits[1:]), strict=True)])


def _figure(values: Sequence[float]) -> dict[str, Any]:
    mean, sd = mean_and_sd(values)
    return {"mean": mean, "sd": sd}


def _mark(test: Mapping[str, Any]) -> str:
    p = test["p_examples_holm"]
    if p is None or p >= 0.05:
        return "="
    return "&lt;" if test["difference"] > 0 else "&gt;"  # the difference is of errors


def _cell(figure: Mapping[str, Any], metric: str, sign: str = "") -> str:
    scale, digits = (100, 1) if metric in _SHARES else (1, 3)
    shown = f"{scale * figure['mean']:{sign}.{digits}f}"
    return shown if figure["sd"] is None else f"{shown} ± {scale * figure['sd']:.{digits}f}"


MAKERS = {
    "methods": methods,
    "ablations": ablations,
    "sizes": sizes,
    "rules": rules,
    "trainings": trainings,
    "weighings": weighings,
    "three-way-rules": three_way_rules,
    "cross-fitting": cross_fitting,
}
