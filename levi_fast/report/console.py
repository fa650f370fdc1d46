"""What a run says on the terminal: progress and notes on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from levi_fast.report.tables import METRIC_TITLES


class Console:
    """Notes and progress bars for people; a stream that is no terminal gets one line per stage instead of bars."""

    def __init__(self) -> None:
        # of several processes that torchrun started, the first one speaks
        silent = os.environ.get("RANK", "0") != "0"
        self.out = rich.console.Console(quiet=silent)
        self.err = rich.console.Console(stderr=True, highlight=False, quiet=silent)

    def note(self, text: str) -> None:
        """One line on stderr, as it is."""
        self.err.print(text, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """A result on stdout; where that is no terminal, as wide as it needs to be."""
        if self.out.is_terminal:
            self.out.print(table)
        else:
            wide = rich.console.Console(file=self.out.file, width=max(200, self.out.width), quiet=self.out.quiet)
            wide.print(table)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Something without a measure of progress is under way."""
        if self.err.is_terminal:
            with self.err.status(text):
                yield
        else:
            yield

    @contextlib.contextmanager
    def progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A bar; the yielded function takes (done, total)."""
        with self._bars() as bars:
            task = bars.add_task(title, total=None, note="")
            yield lambda done, total: bars.update(task, completed=done, total=total)

    @contextlib.contextmanager
    def split_progress(self, sizes: Mapping[str, int]) -> Iterator[Callable[[str, int, int], None]]:
        """One bar over the texts of all splits; the yielded function takes (split, done, total of the split)."""
        done_of: dict[str, int] = {}
        total_of = dict(sizes)
        with self._bars() as bars:
            task = bars.add_task("frozen backbone, once over all texts", total=sum(sizes.values()), note="")

            def report(name: str, done: int, total: int) -> None:
                done_of[name], total_of[name] = done, total  # texts that occur twice are run once
                bars.update(task, completed=sum(done_of.values()), total=sum(total_of.values()), note=name)
                if done == total and not self.err.is_terminal:
                    self.note(f"backbone: {name} done ({total:,} different texts)")

            yield report

    @contextlib.contextmanager
    def epochs(self, title: str, count: int) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
        """A bar over epochs with the latest ID validation figures; the yielded function is ``fit``'s ``on_epoch``."""
        with self._bars() as bars:
            task = bars.add_task(f"training {title}", total=count, note="")

            def report(epoch: int, epochs: int, scores: dict[str, float]) -> None:
                shown = [
                    f"{METRIC_TITLES[name]} {value:.3f}" for name, value in scores.items() if name in METRIC_TITLES
                ]
                note = "ID validation: " + ", ".join(shown[:2] if shown else ["not finite"])
                bars.update(task, completed=epoch, total=epochs, note=note)
                if not self.err.is_terminal and (epoch == epochs or epoch % max(1, epochs // 5) == 0):
                    self.note(f"{title}: epoch {epoch} of {epochs}, {note}")

            yield report

    @contextlib.contextmanager
    def _bars(self) -> Iterator[Progress]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.err, transient=True, disable=not self.err.is_terminal) as bars:
            yield bars
