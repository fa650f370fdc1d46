"""An epoch on cached taps beside one with the backbone in it, and beside LoRA; cost per example as the data grows.

    python benchmarks/bench_cached_training.py movielens --data DIR      # ratings.csv and movies.csv
    python benchmarks/bench_cached_training.py imdb --data DIR           # orig/{train,dev,test}.tsv and new/test.tsv
    python benchmarks/bench_cached_training.py growth

Each writes its part of benchmarks/results/cached_training_cpu.json.

The cached epoch is the whole of it: gathering batches from a memory-mapped file, the task model, the ensemble, the
optimizer, validation and the choice of the blend, with the settings of ``levi-fast train``. The taps are random
numbers, as their values make no difference to the time. The epochs with the backbone are estimated: a few of the
epoch's own batches, spread over it, are timed as whole training steps (and as forward passes, for validation), and
the time is scaled by padded tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tasks import load_task, machine
from torch import Tensor, nn
from transformers import set_seed

from levi_fast import DEFAULT_BACKBONE, LeviConfig, LeviModel, get_levi_model, load_backbone, load_tokenizer
from levi_fast.data.encoded import EncodedDataset
from levi_fast.storage import write_atomic
from levi_fast.training import prefetch
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.lean import clip_gradients, epoch_rows
from levi_fast.training.named_tasks import TASK_TRAINING
from levi_fast.training.prediction import EVALUATION_BATCH_SIZE
from levi_fast.training.runs import Splits, task_inputs

RESULTS = Path(__file__).parent / "results" / "cached_training_cpu.json"
GROWTH_WIDTH, GROWTH_BATCH = 384, 128
AT_LEAST = {"movielens": (50, 100), "imdb": (15, 30)}


def mapped_taps(folder: Path, name: str, rows: int, width: int) -> Tensor:
    """Random taps [rows, width] in a file that is memory-mapped."""
    path = folder / f"{name}.bin"
    generator = torch.Generator().manual_seed(rows)
    with open(path, "wb") as file:
        for start in range(0, rows, 10_000):
            part = torch.randn(min(10_000, rows - start), width, generator=generator)
            file.write(part.numpy().tobytes())
    taps = torch.from_file(str(path), shared=True, size=rows * width).view(rows, width)
    assert taps.untyped_storage().filename is not None  # how the lean loop knows that they are on disk
    return taps


def chunks_of(dataset: EncodedDataset, batch_size: int) -> list[Tensor]:
    return list(epoch_rows(len(dataset), 0, 0).split(batch_size))


def padded(dataset: EncodedDataset, rows: Tensor) -> int:
    """Tokens of a batch with its padding."""
    return len(rows) * int(dataset.lengths[rows].max())


def spread(chunks: list[Tensor], count: int) -> list[Tensor]:
    """A few batches, evenly over the epoch."""
    return [chunks[round(place * (len(chunks) - 1) / max(count - 1, 1))] for place in range(count)]


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def make_step(trained: list[nn.Parameter], loss_of: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Any], None]:
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)

    def step(batch: dict[str, Tensor]) -> None:
        loss_of(batch).backward()
        clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def epochs_with_the_backbone(
    levi: LeviModel, splits: Splits, batch_size: int, sampled: int
) -> dict[str, dict[str, float]]:
    """Estimated seconds of an epoch of LEVI without a cache, and of LoRA (r=8, query and value)."""
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(load_backbone(DEFAULT_BACKBONE), LoraConfig(r=8, target_modules=["query", "value"]))
    head = nn.Linear(384, int(levi.config.num_labels))
    both = nn.ModuleList([lora, head])
    regression = levi.config.problem_type == "regression"

    def lora_loss(batch: dict[str, Tensor]) -> Tensor:
        hidden = lora(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        kept = batch["attention_mask"][..., None].to(hidden.dtype)
        logits = head((hidden * kept).sum(1) / kept.sum(1))
        if regression:
            return nn.functional.mse_loss(logits[:, 0], batch["labels"])
        return nn.functional.cross_entropy(logits, batch["labels"])

    def forward(batch: dict[str, Tensor]) -> None:
        with torch.no_grad():
            levi.extract_taps(**batch)

    train, validation = splits.train, splits.validation
    chunks = chunks_of(train, batch_size)
    steps = {
        "levi": make_step([p for p in levi.parameters() if p.requires_grad], lambda b: levi(**b).loss),
        "lora": make_step([p for p in both.parameters() if p.requires_grad], lora_loss),
    }
    levi.train()
    both.train()
    taken: dict[str, float] = {"levi": 0.0, "lora": 0.0, "forward": 0.0}
    first = train.__getitems__(chunks[0][:8])
    for step in (*steps.values(), forward):
        step(first)
    tokens = 0
    for rows in spread(chunks, sampled):
        batch = train.__getitems__(rows)
        tokens += padded(train, rows)
        for name, step in {**steps, "forward": forward}.items():  # interleaved
            taken[name] += seconds_of(lambda s=step, b=batch: s(b))  # type: ignore[misc]
    all_tokens = sum(padded(train, rows) for rows in chunks)
    scored = list(torch.arange(len(validation)).split(EVALUATION_BATCH_SIZE))
    validation_tokens = sum(padded(validation, rows) for rows in scored)
    scoring = taken["forward"] * validation_tokens / tokens
    result: dict[str, dict[str, float]] = {}
    for name in steps:
        training = taken[name] * all_tokens / tokens
        result[name] = {
            "epoch_seconds": round(training + scoring, 2),
            "training_seconds": round(training, 2),
            "validation_seconds": round(scoring, 2),
            "timed_seconds": round(taken[name], 2),
        }
    result["estimated_from"] = {"timed_batches": sampled, "timed_tokens": tokens, "tokens": all_tokens,
                                "validation_tokens": validation_tokens}  # fmt: skip
    return result


def epoch(task_name: str, data: Path, sampled: int, epochs: int) -> dict[str, Any]:
    """The epoch's time in all its forms on a real data set."""
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    task = load_task(task_name, data, "genres", 0)
    splits = task.encode(tokenizer, max_length=None, backbone_config=backbone.config)
    assert task.processor.labels is not None
    config = LeviConfig(
        backbone=DEFAULT_BACKBONE,
        task_model=task.task_model("auto", len(tokenizer)),
        **task.processor.labels.config_fields(),
    )
    options = TrainingOptions(**{**TASK_TRAINING.get(task_name, {}), "epochs": epochs})
    set_seed(0)
    levi = get_levi_model(backbone, config)
    uncached = epochs_with_the_backbone(levi, splits, options.batch_size, sampled)
    print(uncached, flush=True)
    seconds: dict[str, list[float]] = {"lean": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        for name, dataset in (("train", splits.train), ("validation", splits.validation)):
            taps = mapped_taps(Path(folder), name, len(dataset), sum(levi.config.tap_widths or []))
            dataset.set_taps(taps, keep_inputs="input_ids" in task_inputs(levi))
        for loop in ("lean", "trainer", "lean", "trainer", "lean", "trainer"):
            set_seed(0)
            result = fit(LeviModel(levi.config), splits.train, splits.validation, options, loop=loop)
            seconds[loop].append(result.seconds / epochs)
    own = {loop: statistics.median(values) for loop, values in seconds.items()}
    over_levi, over_lora = (uncached[name]["epoch_seconds"] / own["lean"] for name in ("levi", "lora"))
    at_least = AT_LEAST[task_name]
    return {
        "sizes": {"train": len(splits.train), "validation": len(splits.validation)},
        "batch_size": options.batch_size,
        "cached_epoch_seconds": {loop: round(value, 4) for loop, value in own.items()},
        "cached_epochs_per_run": epochs,
        "lean_over_trainer": round(own["trainer"] / own["lean"], 2),
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
    generator = torch.Generator().manual_seed(0)

    def dataset(name: str, count: int) -> EncodedDataset:
        data = EncodedDataset(
            name,
            features={"numeric": torch.randn(count, 2, generator=generator)},
            labels=torch.randint(0, 2, (count,), generator=generator),
        )
        data.set_taps(mapped_taps(folder, name, count, GROWTH_WIDTH), keep_inputs=False)
        return data

    train, validation = dataset("train", rows), dataset("validation", 1000)
    config = LeviConfig(
        num_labels=2, problem_type="single_label_classification", tap_layers=[0], tap_widths=[GROWTH_WIDTH],
        view_width=64, task_model={"type": "tabular", "num_numeric": 2},
    )  # fmt: skip
    fit(LeviModel(config), validation, validation, TrainingOptions(epochs=1, batch_size=GROWTH_BATCH))  # warm-up
    model = LeviModel(config)
    with MemoryWatch() as watch:
        result = fit(model, train, validation, TrainingOptions(epochs=1, batch_size=GROWTH_BATCH))
    return {
        "examples": rows,
        "taps_mib": round(rows * GROWTH_WIDTH * 4 / 2**20, 1),
        "taps": "streamed" if streamed else "read into memory",
        "epoch_seconds": round(result.seconds, 3),
        "microseconds_per_example": round(1e6 * result.seconds / rows, 2),
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
    parser.add_argument("--epochs", type=int, default=3, help="cached epochs per run, of which there are six")
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
    document[arguments.part] = {"machine": machine(), "measured": measured}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
