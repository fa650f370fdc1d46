"""Tables of ID and OOD figures in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from levi_fast.training.metrics import LOWER_IS_BETTER

METRIC_TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "subset_accuracy": "subset accuracy",
    "log_loss": "log loss",
    "rmse": "RMSE",
    "mae": "MAE",
    "spearman": "Spearman",
}

METHOD_TITLES = {
    "levi": "LEVI",
    "levi-no-standalone": "LEVI without standalone task model",
    "levi-last-tap": "LEVI, last tap only",
    "taps-only": "LEVI without view (taps only)",
    "linear-probe": "linear probe, last layer",
    "mlp-probe": "MLP probe on all taps",
    "head2toe": "Head2Toe",
    "output-ensemble": "output ensemble of probe and task model",
    "task-model": "task model alone",
    "fine-tuning": "full fine-tuning",
    "lora": "LoRA",
    "lp-ft": "LP-FT",
    "wise-ft": "WiSE-FT",
    "levi-fine-tuned": "LEVI, backbone fine-tuned",
    "levi-lora": "LEVI, backbone with LoRA",
}


def split_table(title: str, rows: Sequence[tuple[str, int, Mapping[str, float]]]) -> Table:
    """One method: a row per split, a column per metric.

    Args:
        title: above the table.
        rows: (name of the split, number of rows, metrics).
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("data")
    table.add_column("rows", justify="right")
    metrics = list(dict.fromkeys(name for _, _, scores in rows for name in scores))
    for name in metrics:
        arrow = "↓" if name in LOWER_IS_BETTER else "↑"
        table.add_column(f"{METRIC_TITLES.get(name, name)} {arrow}", justify="right")
    for split, count, scores in rows:
        table.add_row(split, f"{count:,}", *(figure(scores.get(name), name) for name in metrics))
    return table


def method_table(
    title: str,
    metric: str,
    splits: Sequence[str],
    results: Mapping[str, Mapping[str, float]],
    notes: Mapping[str, str],
) -> Table:
    """Several methods: a row per method, a column per split, the best of each column in bold with a star.

    Args:
        title: above the table.
        metric: which metric the figures are.
        splits: columns.
        results: method -> split -> figure.
        notes: method -> what training chose.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(f"{METRIC_TITLES.get(metric, metric)} {'↓' if metric in LOWER_IS_BETTER else '↑'}")
    for split in splits:
        table.add_column(split, justify="right")
    table.add_column("chosen on ID validation")
    choose = min if metric in LOWER_IS_BETTER else max
    best = {split: choose(figure(scores[split], metric) for scores in results.values()) for split in splits}
    for method, scores in results.items():
        cells = [figure(scores[split], metric) for split in splits]
        marked = [
            f"[bold green]{cell}*[/]" if cell == best[split] else f"{cell} "
            for cell, split in zip(cells, splits, strict=True)
        ]
        table.add_row(METHOD_TITLES.get(method, method), *marked, notes.get(method, ""))
    return table


def figure(value: Any, metric: str) -> str:
    """A figure as it is printed: shares in percent, anything else with three decimals."""
    if value is None:
        return "-"
    if metric in ("accuracy", "macro_f1", "micro_f1", "subset_accuracy"):
        return f"{100 * value:5.1f} %"
    return f"{value:.3f}"


@dataclass(frozen=True)
class SweepRow:
    """One configuration: its name, its figure by split (None where there is none), and what training chose."""

    name: str
    figures: Mapping[str, float | None]
    chosen: str


def sweep_table(title: str, metric: str, rows: Sequence[SweepRow]) -> Table:
    """The configurations of a sweep, best first: a row each, a column per split.

    Args:
        title: above the table.
        metric: which metric the figures are.
        rows: in order of rank.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("#", justify="right")
    table.add_column("configuration")
    for split in rows[0].figures:
        arrow = "↓" if metric in LOWER_IS_BETTER else "↑"
        table.add_column(f"{split} {METRIC_TITLES.get(metric, metric)} {arrow}", justify="right")
    table.add_column("chosen on ID validation")
    for rank, row in enumerate(rows, start=1):
        table.add_row(str(rank), row.name, *(figure(value, metric) for value in row.figures.values()), row.chosen)
    return table
