"""``levi-fast bench package``: what the package costs to import, to keep and to build."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from levi_fast.bench.record import CHECKOUT, Record
from levi_fast.bench.timing import interval_of_median
from levi_fast.errors import DataError

PACKAGE = Path(__file__).resolve().parents[1]
IMPORTS = {
    "torch, transformers": "import torch, transformers",
    "torch, transformers, levi_fast": "import torch, transformers, levi_fast",
    "levi_fast": "import levi_fast",
    # What the first use of either's names loads: `import levi_fast` and `import transformers` load little.
    "torch, transformers' PreTrainedModel": "import torch; from transformers import PreTrainedModel",
    "torch, levi_fast's LeviModel": "import torch; from levi_fast import LeviModel",
}
RATIOS = {  # of one statement over another
    "levi_fast_beside_torch_and_transformers": ("torch, transformers, levi_fast", "torch, transformers"),
    "first_use_of_a_model": ("torch, levi_fast's LeviModel", "torch, transformers' PreTrainedModel"),
}
TARGET = {"levi_fast_beside_torch_and_transformers": 1.15}


@dataclass(frozen=True)
class PackageOptions:
    """What is measured.

    Args:
        rounds: fresh interpreters for every statement, in turn.
        build: also build the native library and a wheel, from a copy of a checkout's tracked files.
    """

    rounds: int = 9
    build: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise DataError(f"rounds: expected a whole number of at least 1; got {self.rounds}")


def bench_package(
    options: PackageOptions, output: Path | None, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure; the document as described in :mod:`levi_fast.bench.record`, with ``imports``, ``help``, ``sizes`` and
    ``build`` (an earlier run's stays where this one builds nothing).

    Raises:
        DataError: ``build`` outside a checkout, or a build that fails; the message ends with its output.
    """
    if options.build:
        tracked_files(CHECKOUT)  # fail before minutes of timing
    record = Record(output, asdict(options), keep=True)
    note("sizes")
    record.put("sizes", package_sizes(PACKAGE))
    note(f"imports, {options.rounds} rounds")
    calls: dict[str, Callable[[], float]] = {name: partial(import_seconds, code) for name, code in IMPORTS.items()}
    times = in_turn({**calls, "--help": help_seconds}, options.rounds)
    asked = times.pop("--help")
    record.put("imports", summary(times, RATIOS))
    record.put("help", spread(asked))
    if options.build:
        note("native library and wheel, from clean")
        record.put("build", build_figures(CHECKOUT))
    return record.document


def import_seconds(code: str) -> float:
    """Seconds that import statements take in a fresh interpreter, its own start left out.

    Raises:
        DataError: if they fail.
    """
    script = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    return float(_run([sys.executable, "-c", script]).splitlines()[-1])


def help_seconds() -> float:
    """Seconds of ``levi-fast --help``, the interpreter's start and end included."""
    start = time.perf_counter()
    _run([sys.executable, "-m", "levi_fast", "--help"])
    return time.perf_counter() - start


def in_turn(calls: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What every call returned in every round; the first round, which finds no file in memory, is not kept."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for place in range(rounds + 1):
        names = list(calls)
        for name in names if place % 2 else reversed(names):
            seconds = calls[name]()
            if place:
                times[name].append(seconds)
    return times


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, fastest and slowest, in seconds."""
    found = {"median": statistics.median(values), "fastest": min(values), "slowest": max(values)}
    return {"rounds": len(values), "seconds": {name: round(value, 4) for name, value in found.items()}}


def summary(times: Mapping[str, Sequence[float]], ratios: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """Per statement :func:`spread`; per ratio its median over rounds, that median's 95 % interval, and the target."""
    found: dict[str, Any] = {"statements": {name: spread(values) for name, values in times.items()}, "ratios": {}}
    for name, (over, under) in ratios.items():
        each = [a / b for a, b in zip(times[over], times[under], strict=True)]
        row: dict[str, Any] = {
            "of": over,
            "over": under,
            "median": round(statistics.median(each), 3),
            "interval": [round(bound, 3) for bound in interval_of_median(each)],
        }
        if name in TARGET:
            row |= {"target": TARGET[name], "reached": row["median"] <= TARGET[name]}
        found["ratios"][name] = row
    return found


def package_sizes(package: Path) -> dict[str, Any]:
    """Bytes of an installed package's files, compiled Python left out: all, and the native libraries by name."""
    files = [
        Path(folder) / name
        for folder, _, names in os.walk(package, followlinks=True)  # in a checkout kernels/ is a link
        for name in names
        if "__pycache__" not in Path(folder).parts
    ]
    native = {path.name: path.stat().st_size for path in files if path.suffix == ".so"}
    return {"package_bytes": sum(path.stat().st_size for path in files), "files": len(files), "native_bytes": native}


def tracked_files(checkout: Path) -> list[str]:
    """Paths of a checkout's tracked files.

    Raises:
        DataError: if it is no checkout.
    """
    if (checkout / "setup.py").is_file():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            command = ["git", "ls-files", "-z"]
            listed = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout
            return [name for name in listed.split("\0") if name]
    raise DataError(f"--build: expected levi_fast to run from a git checkout; got {checkout}")


def build_figures(checkout: Path) -> dict[str, Any]:
    """Build from a copy of the tracked files, as they are in the work tree: seconds and bytes.

    The wheel is made from what the native build left, so that compiling is paid for once.
    """
    with tempfile.TemporaryDirectory(prefix="levi-fast-build-") as folder:
        copy, wheels = Path(folder) / "checkout", Path(folder) / "wheels"
        for name in tracked_files(checkout):
            if os.path.lexists(checkout / name):  # a tracked file may be deleted in the work tree
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(checkout / name, copy / name, follow_symlinks=False)
        start = time.perf_counter()
        _run([sys.executable, "setup.py", "--quiet", "build_ext"], copy)
        seconds = time.perf_counter() - start
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "wheel"]
        _run([*pip, "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), "."], copy)
        (wheel,) = wheels.glob("*.whl")
        return {
            "native_build_seconds": round(seconds, 1),
            "jobs": os.cpu_count(),
            "wheel": wheel.name,
            "wheel_bytes": wheel.stat().st_size,
        }


def _run(command: list[str], folder: Path | None = None) -> str:
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise DataError(f"{' '.join(command)} failed:\n{(ran.stdout + ran.stderr)[-2000:]}")
    return ran.stdout


def package_tables(document: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal."""
    table = Table(title="imports in fresh interpreters", title_justify="left")
    table.add_column("import")
    for title in ("median ms", "fastest", "slowest"):
        table.add_column(title, justify="right")
    rows = {**document["imports"]["statements"], "levi-fast --help (the whole process)": document["help"]}
    for name, row in rows.items():
        table.add_row(name, *(f"{row['seconds'][key] * 1e3:,.0f}" for key in ("median", "fastest", "slowest")))
    other = Table(title="ratios, sizes and the build", title_justify="left")
    other.add_column("figure")
    other.add_column("value", justify="right")
    for row in document["imports"]["ratios"].values():
        low, high = row["interval"]
        target = f" (target {row['target']:.2f}{'' if row['reached'] else ': missed'})" if "target" in row else ""
        other.add_row(f"{row['of']} over {row['over']}", f"{row['median']:.3f} [{low:.3f}, {high:.3f}]{target}")
    sizes = document["sizes"]
    other.add_row(f"package, {sizes['files']} files", f"{sizes['package_bytes'] / 2**20:.2f} MiB")
    for name, size in sizes["native_bytes"].items():
        other.add_row(name, f"{size / 2**20:.2f} MiB")
    if "build" in document:
        built = document["build"]
        other.add_row("native build from clean", f"{built['native_build_seconds']:.1f} s")
        other.add_row("wheel", f"{built['wheel_bytes'] / 2**20:.2f} MiB")
    return [table, other]
