"""Tables in Markdown pages, written from results: none of their figures is typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- (?P<kind>[a-z-]+) ?(?P<words>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> dict[str, Any]:
    """One results file, by its name without ``.json``."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def filled(text: str, makers: Mapping[str, Callable[..., str]]) -> str:
    """The page with every table written anew: ``<!-- KIND FILE WORD... -->``, the table, ``<!-- end -->``.

    Args:
        text: of the page.
        makers: by kind; each is given the document of FILE (none where there is no FILE) and the words.
    """

    def table(found: re.Match[str]) -> str:
        name, *more = found["words"].split() or [""]
        documents = [read(name)] if name else []
        return f"{found[1]}{makers[found['kind']](*documents, *more)}\n{found[4]}"

    return TABLE.sub(table, text)


def row(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"
