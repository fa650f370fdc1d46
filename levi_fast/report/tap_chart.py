"""Chart of the scores that chose taps: one panel per score, chosen layers filled."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from levi_fast.errors import DataError

FORMATS = ("svg", "png")


def require_matplotlib() -> None:
    """Raises:
    DataError: it is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DataError('--chart needs matplotlib: pip install "levi_fast[compare]", or leave out --chart') from error


def tap_chart(selections: Sequence[Any], format: str) -> bytes:
    """The chart of :class:`levi_fast.training.tap_selection.TapSelection` objects, as a file's content.

    Args:
        selections: all of the same candidates.
        format: "svg" or "png".
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(one, name, values) for one in selections for name, values in one.scores.items()]
    figure = Figure(figsize=(6.4, 1.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (selection, name, values) in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        shows_choice = selection.selector != "mix"
        chosen = [shows_choice and layer in selection.layers for layer in selection.candidates]
        axes.bar(
            range(len(chosen)),
            [float("nan") if value is None else value for value in values],
            color=["#0072B2" if one else "#FFFFFF" for one in chosen],
            edgecolor="#0072B2",
        )
        axes.set_ylabel(name)
        axes.set_xlim(-0.6, len(chosen) - 0.4)  # a layer without a value keeps its place
        axes.set_xticks(range(len(chosen)), [str(layer) for layer in selection.candidates])
        meaning = "filled layers were chosen" if shows_choice else "a diagnostic, chooses nothing"
        axes.set_title(f"{selection.selector}: {meaning}", fontsize=9, loc="left")
    figure.axes[-1].set_xlabel("layer")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=150)
    return buffer.getvalue()
