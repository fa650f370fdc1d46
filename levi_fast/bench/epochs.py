"""``levi-fast bench epoch``: an epoch in all its forms, sixteen heads, and the time to a target."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from levi_fast.bench import targets
from levi_fast.bench.heads import COUNT, alone, make_heads
from levi_fast.bench.methods import FLOOR, METHODS, OURS, PEERS, WITH_ADAPTERS, build_methods, check
from levi_fast.bench.options import check_choices, check_seconds
from levi_fast.bench.record import Record
from levi_fast.bench.timing import compared, interleaved, quartiles, timed
from levi_fast.bench.uncached import HOW, sample_batches
from levi_fast.bench.workload import TASKS, Workload
from levi_fast.errors import DataError
from levi_fast.training.fit import fit
from levi_fast.training.sweep import train_heads

DEFAULT_PARTS = ("uncached", "cold", "cached", "heads", "target")
PARTS = (*DEFAULT_PARTS, "target-lora")  # the last fine-tunes in full: minutes to hours
UNCACHED = {
    FLOOR: "epoch: bare forward",
    OURS: "epoch: backbone in every step",
    "levi-eager": "epoch: the same without kernels",
    "hidden-states": "epoch: LEVI written straight out",
    "linear-probe": "epoch: linear probe",
    "side-network": "epoch: side network",
    "lora": "epoch: LoRA",
    "lora-trainer": "epoch: LoRA, Trainer",
    "full": "epoch: full fine-tuning",
    "full-trainer": "epoch: full fine-tuning, Trainer",
}
NAMES = {
    **UNCACHED,
    "cold": "epoch: cache built first",
    "lean": "epoch: from the cache",
    "trainer": "epoch: from the cache, Trainer",
    "separate": "heads: one by one",
    "together": "heads: one sweep",
    "target-cold": "to target: cache built first",
    "target": "to target: from the cache",
    "target-lora": "to target: LoRA",
}
EPOCHS_PER_RUN = 2  # of cached epochs: setting a run up is not what an epoch costs
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class EpochOptions:
    """What is measured, on what.

    Args:
        task: of :data:`levi_fast.bench.workload.TASKS`.
        data: its folder or file; None for synthetic.
        backbone: hub id or folder; None is the packaged MiniLM.
        parts: of :data:`PARTS`.
        peers: of :data:`levi_fast.bench.methods.PEERS`, of the part ``uncached``.
        target: validation score to reach (accuracy, or RMSE where the label is a number); None takes what a linear
            probe reaches.
        seconds: of interleaved rounds of cached epochs, of cold epochs and of runs to the target, each; at least
            three rounds (cold epochs: one).
        sampled: batches that are timed with the backbone in the step.
        heads: of the sweep, up to sixteen.
        max_train_rows, max_eval_rows: of data sets that have more than are drawn.
    """

    task: str = "synthetic"
    data: str | None = None
    backbone: str | None = None
    parts: tuple[str, ...] = DEFAULT_PARTS
    peers: tuple[str, ...] = PEERS
    target: float | None = None
    seconds: float = 5.0
    sampled: int = 4
    heads: int = COUNT
    max_train_rows: int | None = None
    max_eval_rows: int | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DataError(f"--task-name: expected {', '.join(TASKS)}, got {self.task!r}")
        check_choices("--parts", self.parts, PARTS)
        check_choices("--peers", self.peers, METHODS)
        if not self.parts:
            raise DataError(f"--parts: expected some of {', '.join(PARTS)}; got none")
        if self.target is not None and not {"target", "target-lora"} & set(self.parts):
            raise DataError("--target: nothing is trained to it; add target or target-lora to --parts")
        check_seconds("--seconds", self.seconds)
        if self.sampled < 1:
            raise DataError(f"--batches: expected at least 1; got {self.sampled}")
        if not 2 <= self.heads <= COUNT:
            raise DataError(f"--heads: expected 2 to {COUNT}; got {self.heads}")


def bench_epoch(
    options: EpochOptions, output: Path | None, note: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure on CPU; the document as described in :mod:`levi_fast.bench.record`, its one part ``epoch``.

    Every row has ``rounds``, ``median_seconds`` and ``quartiles_seconds``; those of epochs with the backbone in every
    step are extrapolated and have ``extrapolated_from``: see :mod:`levi_fast.bench.uncached`. Reading, tokenising
    and loading the backbone are part of no row.

    Args:
        options: what.
        output: a JSON file, written after every row; rows of other data in it stay.
        note: told of every row as it begins.

    Raises:
        DataError: data, a backbone or an option that cannot be used.
    """
    if importlib.util.find_spec("peft") is None:
        if "target-lora" in options.parts:
            raise DataError("--parts target-lora needs peft: pip install 'levi_fast[lora]', or choose other parts")
        if "uncached" in options.parts and set(WITH_ADAPTERS) & set(options.peers):
            raise DataError("--peers lora needs peft: pip install 'levi_fast[lora]', or choose other peers")
    note(f"reading and encoding {options.task}")
    workload = Workload.load(
        options.task, None if options.data is None else Path(options.data), options.backbone,
        max_train_rows=options.max_train_rows, max_eval_rows=options.max_eval_rows,
    )  # fmt: skip
    folder = None if options.data is None else Path(options.data).name  # a result is shown to others: no path
    record = Record(output, {**asdict(options), "data": folder}, keep=True)
    with tempfile.TemporaryDirectory(prefix="levi-fast-bench-") as name:
        measuring = _Epochs(workload, options, record, Path(name), note)
        for part, measure in (
            ("uncached", measuring.uncached), ("cold", measuring.cold), ("cached", measuring.cached),
            ("heads", measuring.heads), ("target", measuring.target),
        ):  # fmt: skip
            if any(chosen in options.parts for chosen in _SERVED_BY[part]):
                measure()
    return record.document


_SERVED_BY = {"uncached": ("uncached",), "cold": ("cold",), "cached": ("cached",), "heads": ("heads",),
              "target": ("target", "target-lora")}  # fmt: skip


class _Epochs:
    """The parts, each adding its rows."""

    def __init__(
        self, workload: Workload, options: EpochOptions, record: Record, folder: Path, note: Callable[[str], None]
    ) -> None:
        self.workload, self.options, self.record = workload, options, record
        self.folder, self.note = folder, note

    def add(self, what: str, seconds: Sequence[float], **more: Any) -> None:
        """A row of the seconds of every round."""
        splits = self.workload.splits
        row = {
            "case": {"data": self.workload.name, "what": NAMES[what]},
            "dtype": "float32",
            "pass": "training+validation",
            "backbone": self.options.backbone or self.workload.config.backbone,
            "sizes": {"train": len(splits.train), "validation": len(splits.validation)},
            "batch_size": self.workload.options.batch_size,
            "rounds": len(seconds),
            "median_seconds": round(statistics.median(seconds), 4),
            "quartiles_seconds": [round(value, 4) for value in quartiles(seconds)],
            **more,
        }
        self.record.add("epoch", row)

    def uncached(self) -> None:
        options, workload = self.options, self.workload
        names = tuple(name for name in METHODS if name in (FLOOR, OURS, *options.peers))
        self.note(f"{options.sampled} batches with the backbone in the step: {', '.join(names)}")
        methods = build_methods(names, workload.backbone, workload.config)
        errors = check(methods, workload.splits.train.__getitems__(range(8)), torch.float32, final_norm=False)
        found = sample_batches(methods, workload.splits, workload.options.batch_size, options.sampled)
        for name in names:
            more = {"relative_loss_error": errors} if name == OURS else {}
            how = {**found.estimated_from(), "how": HOW}
            self.add(name, found.epochs(name), extrapolated_from=how, **more)

    def cold(self) -> None:
        self.note("building the cache, and one epoch on it")
        workload = self.workload
        seconds: list[float] = []
        builds: list[float] = []
        end = time.perf_counter() + self.options.seconds
        while not seconds or time.perf_counter() < end:
            started = time.perf_counter()
            bank = workload.build(self.folder / f"cache-{len(seconds)}")
            builds.append(time.perf_counter() - started)
            model = workload.model()
            bank.attach(model, workload.splits)
            fit(model, workload.splits.train, workload.splits.validation, workload.options_of(1), loop="lean")
            seconds.append(time.perf_counter() - started)
            workload.without_taps()
        self.add("cold", seconds, build_seconds=[round(value, 4) for value in builds])

    def attach(self) -> None:
        """Give the rows their taps, from the cache, which is built where it is not there yet."""
        if self.workload.build_seconds is None:
            self.note("building the cache")
        bank = self.workload.bank(self.folder / "cache")
        bank.attach(self.workload.model(), self.workload.splits)

    def cached(self) -> None:
        self.attach()
        self.note("epochs from the cache")
        workload, options = self.workload, self.workload.options_of(EPOCHS_PER_RUN)

        def run(loop: str, _: int) -> float:
            splits = workload.splits
            return fit(workload.model(), splits.train, splits.validation, options, loop=loop).seconds / EPOCHS_PER_RUN

        times = interleaved({loop: lambda i, own=loop: run(own, i) for loop in ("lean", "trainer")},  # type: ignore[misc]
                            self.options.seconds, LEAST_ROUNDS)  # fmt: skip
        ratio = compared(times, "lean")["peer_over_ours"]["trainer"]
        for loop, values in times.items():
            more = {"trainer_over_lean": ratio} if loop == "lean" else {}
            self.add(loop, values, epochs_per_run=EPOCHS_PER_RUN, **more)
        workload.without_taps()

    def heads(self) -> None:
        self.attach()
        workload, count = self.workload, self.options.heads
        self.note(f"{count} heads, one by one and in one sweep")
        schedule = {"epochs": EPOCHS_PER_RUN, "batch_size": workload.options.batch_size, "device": "cpu"}
        heads = make_heads(workload.config, workload.splits, schedule, count)
        alone(heads[0])  # warm-up; of the workers' server too, which the command line starts before it reads its data
        train_heads(heads[:2])
        each = [alone(head)[2] for head in heads]
        together = timed(lambda: train_heads(heads))
        more = {"heads": count, "epochs_per_head": EPOCHS_PER_RUN}
        self.add("separate", [sum(each)], each_head={
            "median_seconds": round(statistics.median(each), 4),
            "quartiles_seconds": [round(value, 4) for value in quartiles(each)],
        }, **more)  # fmt: skip
        self.add("together", [together], over_separate=round(together / sum(each), 3), **more)
        workload.without_taps()

    def target(self) -> None:
        workload = self.workload
        if workload.build_seconds is None:
            self.note("building the cache")
        bank = workload.bank(self.folder / "cache")
        built = workload.build_seconds
        assert built is not None
        if self.options.target is None:
            self.note("a linear probe, for the target")
            target = targets.probe_target(workload, bank)
        else:
            target = targets.Target(targets.selection_metric(workload), self.options.target, "given")
        if "target" in self.options.parts:
            self.note(f"LEVI from the cache to a validation {target.metric} of {target.value:.4f}")
            runs = self._repeated(lambda seed: targets.from_the_cache(workload, bank, target, seed), LEAST_ROUNDS)
            self._add_runs("target", target, runs)
            cold = [replace(run, seconds=run.seconds + built) for run in runs]
            self._add_runs("target-cold", target, cold, build_seconds=round(built, 4))
        if "target-lora" in self.options.parts:
            self.note(f"LoRA to a validation {target.metric} of {target.value:.4f}")
            self._add_runs("target-lora", target, [targets.by_lora(workload, target, workload.options.seed)])

    def _repeated(self, run: Callable[[int], targets.Run], least: int) -> list[targets.Run]:
        found: list[targets.Run] = []
        end = time.perf_counter() + self.options.seconds
        while len(found) < least or time.perf_counter() < end:
            found.append(run(len(found)))
        return found

    def _add_runs(self, what: str, target: targets.Target, runs: Sequence[targets.Run], **more: Any) -> None:
        """Seconds to the target, one seed a round; a run that never reached it counts with all its epochs."""
        self.add(
            what, [run.seconds for run in runs], target=asdict(target), reached=[run.reached for run in runs],
            epochs=[run.epochs for run in runs], scores=[run.score for run in runs], **more,
        )  # fmt: skip


def epoch_tables(document: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal: a table for each data set."""
    rows: list[dict[str, Any]] = document.get("epoch", [])
    tables = []
    for data in dict.fromkeys(row["case"]["data"] for row in rows):
        own = [row for row in rows if row["case"]["data"] == data]
        cached = next((row["median_seconds"] for row in own if row["case"]["what"] == NAMES["lean"]), None)
        sizes = own[-1]["sizes"]
        title = f"{data}: {sizes['train']:,} training and {sizes['validation']:,} validation rows"
        table = Table(title=title, title_justify="left")
        table.add_column("what", min_width=max(map(len, NAMES.values())))
        for name in ("seconds", "quartiles", "rounds", "over cached"):
            table.add_column(name, justify="right")
        for row in own:
            what, seconds, (low, _, high) = row["case"]["what"], row["median_seconds"], row["quartiles_seconds"]
            said = remark(row)
            table.add_row(
                f"{what}\n  {said}" if said else what,
                _short(seconds),
                f"{_short(low)} {_short(high)}" if row["rounds"] > 1 else "",
                str(row["rounds"]),
                _short(seconds / cached) if cached and what.startswith("epoch") else "",
            )
        tables.append(table)
    return tables


def _short(value: float) -> str:
    return f"{value:,.3g}" if value < 100 else f"{value:,.0f}"


def remark(row: dict[str, Any]) -> str:
    """What a reader must know of a row's seconds."""
    if "extrapolated_from" in row:
        found = row["extrapolated_from"]
        return f"extrapolated by tokens from {found['timed_batches']} batches"
    if "heads" in row:
        return f"{row['heads']} heads of {row['epochs_per_head']} epochs, from the cache"
    if "target" in row:
        target, missed = row["target"], row["reached"].count(False)
        text = f"{target['metric']} {target['value']:.4f} ({target['source']}), epochs {min(row['epochs'])}"
        text += f" to {max(row['epochs'])}" if max(row["epochs"]) > min(row["epochs"]) else ""
        return text + (f"; not reached in {missed} of {row['rounds']}" if missed else "")
    if "build_seconds" in row:
        return f"of which {statistics.median(row['build_seconds']):,.2f} s the cache"
    return ""
