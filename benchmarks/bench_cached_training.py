"""An epoch on cached taps beside one with the backbone in it, and beside LoRA; cost per example as the data grows.

    python benchmarks/bench_cached_training.py movielens --data DIR      # ratings.csv and movies.csv
    python benchmarks/bench_cached_training.py imdb --data DIR           # orig/{train,dev,test}.tsv and new/test.tsv
    python benchmarks/bench_cached_training.py growth

Each writes its part of benchmarks/results/cached_training_cpu.json.

The cached epoch is the whole of it: gathering batches from a memory-mapped file, the task model, the ensemble, the
optimizer, validation and the choice of the blend, with the settings of ``levi-fast train``: of LEVI by itself
("lean", "trainer") and with a standalone task model beside it ("standalone", by the lean loop). The taps are random
numbers, as their values make no difference to the time. The epochs with the backbone are estimated: a few of the
epoch's own batches, spread over it, are timed as whole training steps (and as forward passes, for validation), and
the time is scaled by padded tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import set_seed

from levi_fast import DEFAULT_BACKBONE, LeviConfig, LeviModel, get_levi_model, load_backbone, load_tokenizer
from levi_fast.bench.methods import FLOOR, OURS, build_methods
from levi_fast.bench.record import facts
from levi_fast.bench.synthetic_taps import WIDTH, SyntheticEpoch, mapped_taps
from levi_fast.bench.uncached import sample_batches
from levi_fast.bench.workload import load_task
from levi_fast.storage import write_atomic
from levi_fast.training import prefetch
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.named_tasks import TASK_TRAINING
from levi_fast.training.runs import Splits, task_inputs

RESULTS = Path(__file__).parent / "results" / "cached_training_cpu.json"
ROUNDS = 3
AT_LEAST = {"movielens": (50, 100), "imdb": (15, 30)}


def epochs_with_the_backbone(
    backbone: nn.Module, config: LeviConfig, splits: Splits, batch_size: int, sampled: int
) -> dict[str, dict[str, float]]:
    """Estimated seconds of an epoch of LEVI without a cache, and of LoRA (r=8, query and value)."""
    methods = build_methods((FLOOR, OURS, "lora"), backbone, config)
    found = sample_batches(methods, splits, batch_size, sampled)
    taken = {name: sum(values) for name, values in found.seconds.items()}
    share = 1 / sum(found.tokens)
    scoring = taken[FLOOR] * found.validation_tokens * share
    result: dict[str, dict[str, float]] = {}
    for name in (OURS, "lora"):
        training = taken[name] * found.all_tokens * share
        result[name] = {
            "epoch_seconds": round(training + scoring, 2),
            "training_seconds": round(training, 2),
            "validation_seconds": round(scoring, 2),
            "timed_seconds": round(taken[name], 2),
        }
    result["estimated_from"] = dict(found.estimated_from())
    return result


def epoch(task_name: str, data: Path, sampled: int, epochs: int) -> dict[str, Any]:
    """The epoch's time in all its forms on a real data set."""
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    task = load_task(task_name, data)
    splits = task.encode(tokenizer, max_length=None, backbone_config=backbone.config)
    assert task.processor.labels is not None
    config = LeviConfig(
        backbone=DEFAULT_BACKBONE,
        task_model=task.task_model("auto", len(tokenizer)),
        **task.processor.labels.config_fields(),
    )
    options = TrainingOptions(**{**TASK_TRAINING.get(task_name, {}), "epochs": epochs, "cross_fit": 0})
    set_seed(0)
    levi = get_levi_model(backbone, config)
    uncached = epochs_with_the_backbone(backbone, levi.config, splits, options.batch_size, sampled)
    print(uncached, flush=True)
    seconds: dict[str, list[float]] = {"lean": [], "trainer": [], "standalone": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset in (("train", splits.train), ("validation", splits.validation)):
            taps = mapped_taps(Path(folder), name, len(dataset), sum(levi.config.tap_widths or []))
            dataset.set_taps(taps, keep_inputs="input_ids" in task_inputs(levi))
        for form in tuple(seconds) * ROUNDS:
            set_seed(0)
            own = copy.copy(levi.config)
            own.standalone_view = form == "standalone"
            loop = "trainer" if form == "trainer" else "lean"
            result = fit(LeviModel(own), splits.train, splits.validation, options, loop=loop)
            seconds[form].append(result.seconds / epochs)
    median = {form: statistics.median(values) for form, values in seconds.items()}
    over_levi, over_lora = (uncached[name]["epoch_seconds"] / median["lean"] for name in ("levi", "lora"))
    at_least = AT_LEAST[task_name]
    return {
        "sizes": {"train": len(splits.train), "validation": len(splits.validation)},
        "batch_size": options.batch_size,
        "cached_epoch_seconds": {form: round(value, 4) for form, value in median.items()},
        "cached_epochs_per_run": epochs,
        "lean_over_trainer": round(median["trainer"] / median["lean"], 2),
        "with_the_backbone": uncached,
        "times_faster_than_uncached": round(over_levi, 1),
        "times_faster_than_lora": round(over_lora, 1),
        "asked": {"uncached": at_least[0], "lora": at_least[1]},
        "holds": over_levi >= at_least[0] and over_lora >= at_least[1],
    }


class MemoryWatch:
    """The highest anonymous and file-backed resident memory of this process, looked at every 10 ms."""

    def __init__(self) -> None:
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self.stopped.wait(0.01):
            self.look()

    def look(self) -> dict[str, int]:
        status = Path("/proc/self/status").read_text()
        found = {name: int(status.split(f"{name}:")[1].split()[0]) for name in self.peaks}
        self.peaks = {name: max(self.peaks[name], found[name]) for name in found}
        return found

    def __enter__(self) -> MemoryWatch:
        self.before = self.look()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


def growth_row(rows: int, streamed: bool, folder: Path) -> dict[str, Any]:
    """One epoch on synthetic taps in this process: time per example, memory."""
    if streamed:
        prefetch.MEMORY_SHARE = 0.0
    epoch = SyntheticEpoch(rows, folder)
    with MemoryWatch() as watch:
        seconds = epoch.run()
    return {
        "examples": rows,
        "taps_mib": round(rows * WIDTH * 4 / 2**20, 1),
        "taps": "streamed" if streamed else "read into memory",
        "epoch_seconds": round(seconds, 3),
        "microseconds_per_example": round(1e6 * seconds / rows, 2),
        "anonymous_memory_grew_mib": round((watch.peaks["RssAnon"] - watch.before["RssAnon"]) / 1024, 1),
        "mapped_file_pages_peak_mib": round(watch.peaks["RssFile"] / 1024, 1),
    }


def growth() -> list[dict[str, Any]]:
    """Every size in a process of its own, streamed and read into memory."""
    rows = []
    for streamed in (True, False):
        for count in (10_000, 100_000, 1_000_000):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "growth", "--row", str(count), str(int(streamed)), folder]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            rows.append(json.loads(out.splitlines()[-1]))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("movielens", "imdb", "growth"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--sampled", type=int, default=4, help="batches that are timed with the backbone")
    parser.add_argument("--epochs", type=int, default=3, help="cached epochs per run, of which there are nine")
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.row:
        count, streamed, folder = arguments.row
        print(json.dumps(growth_row(int(count), streamed == "1", Path(folder))))
        return
    if arguments.part != "growth" and arguments.data is None:
        parser.error(f"{arguments.part} needs --data")
    if arguments.part == "growth":
        measured: Any = growth()
    else:
        measured = epoch(arguments.part, arguments.data, arguments.sampled, arguments.epochs)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    document[arguments.part] = {"machine": facts(), "measured": measured}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
