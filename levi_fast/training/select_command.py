"""What ``levi-fast select-taps`` does, apart from reading the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from levi_fast.errors import DataError
from levi_fast.report.console import Console
from levi_fast.report.tap_chart import FORMATS, require_matplotlib, tap_chart
from levi_fast.selection import data_dependent
from levi_fast.storage import write_atomic
from levi_fast.training.commands import build_bank, prepare, select
from levi_fast.training.request import TrainRequest
from levi_fast.training.tap_selection import TapSelection

DEFAULT_SELECTORS = ("gradnorm", "probe", "mix")


def select_taps(
    request: TrainRequest,
    console: Console,
    *,
    selectors: Sequence[str] = (),
    chart: str | None = None,
    scores: str | None = None,
) -> list[TapSelection]:
    """Score every layer, print the table, and write chart and JSON where asked to.

    Args:
        request: data, backbone, and the layers to choose among (all, or what its cache has).
        console: for notes and the table.
        selectors: see :func:`levi_fast.training.tap_selection.select_taps`; by default cka of half the layers,
            and :data:`DEFAULT_SELECTORS`.
        chart: file to write, .svg or .png.
        scores: JSON file to write.

    Raises:
        DataError: for anything in the request, the data or the files that cannot be used.
    """
    _check(selectors, chart, scores)
    prepared = prepare(request, console)
    if not prepared.splits.train.feeds_backbone:
        raise DataError("--text-column: expected the text that the backbone is to read")
    try:
        bank = build_bank(request, prepared, console)
    except ValueError as error:  # a tap out of range, a backbone without layers
        raise error if isinstance(error, DataError) else DataError(str(error)) from error
    assert bank is not None
    wanted = selectors or (f"cka:{(len(bank.layers) + 1) // 2}", *DEFAULT_SELECTORS)
    found = [select(selector, request, prepared, bank, console) for selector in wanted]
    console.table(_table(found))
    for selection in found:
        if selection.selector != "mix":
            layers = ",".join(map(str, selection.layers))
            console.out.print(f"{selection.selector}: --taps {layers}", markup=False, highlight=False)
    if scores is not None:
        document = {"backbone": Path(prepared.name).name, "selections": [one.as_dict() for one in found]}
        write_atomic(scores, json.dumps(document, indent=2) + "\n")
        console.note(f"wrote {scores}")
    if chart is not None:
        write_atomic(chart, tap_chart(found, Path(chart).suffix[1:].lower()))
        console.note(f"wrote {chart}")
    return found


def _check(selectors: Sequence[str], chart: str | None, scores: str | None) -> None:
    for selector in selectors:
        try:
            known = selector == "mix" or data_dependent(selector)
        except ValueError as error:
            raise DataError(f"--selector: {error}") from error
        if not known:
            raise DataError(f"--selector: expected cka:k, gradnorm, probe or mix, got {selector!r}")
    for option, file in (("--chart", chart), ("--scores", scores)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise DataError(f"{option}: the folder of {file} does not exist")
    if chart is not None:
        if Path(chart).suffix[1:].lower() not in FORMATS:
            raise DataError(f"--chart: expected a name ending in .svg or .png, got {chart!r}")
        require_matplotlib()


def _table(found: Sequence[TapSelection]) -> Table:
    table = Table(title="scores of the layers; * was chosen", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right")
    columns = [(one, name) for one in found for name in one.scores]
    for one, name in columns:
        table.add_column(name if one.selector in ("probe", "mix") else f"{one.selector}: {name}", justify="right")
    for place, layer in enumerate(found[0].candidates):
        cells = []
        for one, name in columns:
            value = one.scores[name][place]
            mark = "*" if layer in one.layers and one.selector != "mix" else " "
            cells.append(f"{'-' if value is None else f'{value:.4f}'} {mark}")
        table.add_row(str(layer), *cells)
    return table
