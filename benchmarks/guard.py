"""Guards against regressions by figures that do not depend on a machine's speed or load.

    python benchmarks/guard.py             # every figure beside the stored one; exit status 1 on a regression
    python benchmarks/guard.py --refresh   # store what is measured now (also: make guard-refresh)

The figures: Python calls, ops dispatched and bytes allocated by a call of each op and by a training step; layers run
below the last tap; modules imported; a saved model's size; and our time as a part of eager PyTorch's, interleaved in
one process. benchmarks/results/guard.json holds them with the versions, instruction set and CPU they were taken with.
A figure is compared only where all that it depends on is the same, and is otherwise listed as skipped, with the
reason. Refresh where a change is meant, and say why in the commit.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guard_figures import KINDS, Figure, environment, measure

BASELINE = Path(__file__).parent / "results" / "guard.json"
FAILED = ("regressed", "missing", "no baseline")


@dataclass(frozen=True)
class Verdict:
    """One figure beside its baseline.

    Attributes:
        status: "ok", "better" (a hint to refresh), "skipped" (``reason`` says why), or one of :data:`FAILED`.
        tolerance: relative, what was allowed above the baseline.
    """

    name: str
    status: str
    value: float | None
    baseline: float | None
    tolerance: float
    reason: str = ""

    def __str__(self) -> str:
        value, baseline = ("-" if each is None else f"{each:,.10g}" for each in (self.value, self.baseline))
        line = (
            f"{self.status:<11} {self.name:<58} {value:>9}  baseline {baseline:>9}  tolerance +{self.tolerance:.0%}"
        )
        return f"{line}  {self.reason}".rstrip()


def compare(measured: Mapping[str, Figure], here: Mapping[str, str], baseline: Mapping[str, Any]) -> list[Verdict]:
    """Every figure measured or stored, worst first.

    Args:
        measured: figures by name.
        here: :func:`guard_figures.environment`.
        baseline: the content of guard.json.
    """
    there, stored = baseline["environment"], baseline["figures"]
    verdicts = []
    for name in dict.fromkeys((*stored, *measured)):
        figure, old = measured.get(name), stored.get(name)
        kind = KINDS[figure.kind if figure is not None else old["kind"]]
        changed = [part for part in kind.depends if here[part] != there[part]]
        tolerance, reason = kind.tolerance, kind.unit
        if kind.elsewhere is not None and here["cpu"] != there["cpu"]:
            tolerance, reason = kind.elsewhere, f"{kind.unit}; another CPU than the baseline's"
        if figure is None:
            status = "missing"
        elif old is None:
            status = "no baseline"
        elif changed:
            status = "skipped"
            reason = "; ".join(f"{part} {here[part]} here, {there[part]} in the baseline" for part in changed)
        elif figure.value > old["value"] * (1 + tolerance):
            status = "regressed"
        elif figure.value < old["value"] / (1 + (tolerance if figure.kind == "ratio" else 0)):
            status = "better"
        else:
            status = "ok"
        value, before = (figure.value if figure else None), (old["value"] if old else None)
        verdicts.append(Verdict(name, status, value, before, tolerance, reason))
    return verdicts


def report(verdicts: list[Verdict]) -> str:
    """A line for each, and what they come to."""
    count = {status: sum(v.status == status for v in verdicts) for status in ("ok", "better", "skipped", *FAILED)}
    lines = [str(verdict) for verdict in verdicts]
    lines.append(", ".join(f"{number} {status}" for status, number in count.items() if number))
    if any(count[status] for status in FAILED):
        lines.append("Where the change is meant: python benchmarks/guard.py --refresh, and say why in the commit.")
    elif count["better"]:
        lines.append("Some figures are better: keep that with python benchmarks/guard.py --refresh.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure, then compare or store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--refresh", action="store_true", help="store what is measured now")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="the file (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.refresh and not options.baseline.is_file():
        parser.error(f"{options.baseline}: no baseline there; write one with --refresh")
    measured, here = measure(), environment()
    if options.refresh:
        document = {"environment": here, "figures": {name: asdict(figure) for name, figure in measured.items()}}
        options.baseline.write_text(json.dumps(document, indent=1) + "\n")
        print(f"wrote {len(measured)} figures to {options.baseline}")
        return 0
    verdicts = compare(measured, here, json.loads(options.baseline.read_text()))
    print(report(verdicts))
    return int(any(verdict.status in FAILED for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
