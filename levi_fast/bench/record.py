"""The JSON file of a benchmark: what it was measured on, its settings, and rows, kept as soon as they exist."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from levi_fast.environment import environment_report
from levi_fast.storage import write_atomic

CHECKOUT = Path(__file__).resolve().parents[2]


def facts() -> dict[str, Any]:
    """What a reader needs to judge a figure by: date, commit, machine, versions, compiler, load.

    ``commit`` is null outside a checkout; ``uncommitted_changes`` tells of tracked files only.
    """
    report = environment_report()
    dirty = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if dirty is None else bool(dirty),
        "platform": report["system"]["platform"],
        "cpu": report["cpu"],
        "devices": report["devices"],
        "threads": torch.get_num_threads(),
        "versions": report["versions"],
        "compiler": report["native"]["compiler"],
        "serves": {op: {d: r["serves"] for d, r in by_device.items()} for op, by_device in report["ops"].items()},
        "load_average_at_start": [round(value, 2) for value in os.getloadavg()],
    }


def _git(*arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


class Record:
    """A document that grows row by row; a run that is cut short keeps what it has.

    Args:
        path: where it is written after every row; None keeps it in memory.
        settings: what the user chose; stands in the file.
        keep: start from the rows that the file has; a new row replaces the one with the same ``case``, ``dtype`` and
            ``pass``. Every row carries the date, commit and load of its own run.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], *, keep: bool = False) -> None:
        self.path = path
        measured = facts()
        self._own = {name: measured[name] for name in ("date", "commit", "uncommitted_changes")}
        self._own["load_average"] = measured["load_average_at_start"]
        old = json.loads(path.read_text()) if keep and path is not None and path.exists() else {}
        self.document: dict[str, Any] = {**old, "measured_on": measured, "settings": dict(settings)}

    def add(self, part: str, row: Mapping[str, Any]) -> None:
        """Put a row into a part of the document, and write it."""
        self._own["load_average"] = [round(value, 2) for value in os.getloadavg()]
        row = {**row, "measured": dict(self._own)}
        rows = self.document.setdefault(part, [])
        for place, other in enumerate(rows):
            if _key(other) == _key(row):
                rows[place] = row
                break
        else:
            rows.append(row)
        self.save()

    def put(self, name: str, value: Any) -> None:
        """Set a part that is no list of rows, and write it."""
        self.document[name] = value
        self.save()

    def save(self) -> None:
        """Write the document to a temporary name, fsync, rename."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path, json.dumps(self.document, indent=1) + "\n")


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(json.dumps(row.get(name)) for name in ("case", "dtype", "pass"))
