"""Fill README.md and pages of docs/ from benchmarks/results/: tables, and plots beside them.

    python benchmarks/document.py

A table stands between ``<!-- KIND FILE ... -->`` and ``<!-- end -->``. Kinds and their words are in
benchmarks/evidence_tables.py and benchmarks/performance_tables.py.
"""

from __future__ import annotations

import evidence_plots
import evidence_tables
import pages
import performance_tables

PAGES = (
    pages.ROOT / "README.md",
    *(pages.ROOT / "docs" / f"{n}.md" for n in ("evidence", "performance", "large-models")),
)
MAKERS = {**evidence_tables.MAKERS, **performance_tables.MAKERS}


def main() -> None:
    """Write pages and plots."""
    for page in PAGES:
        page.write_text(pages.filled(page.read_text(encoding="utf-8"), MAKERS), encoding="utf-8")
    evidence_plots.draw(pages.ROOT / "docs" / "evidence")
    performance_tables.draw(pages.ROOT / "docs" / "performance")


if __name__ == "__main__":
    main()
