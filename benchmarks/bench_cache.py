"""The activation cache: building beside the bare forward, size and accuracy per dtype, memory while it is read.

    python benchmarks/bench_cache.py build --data DIR       # DIR: orig/{train,dev,test}.tsv and new/test.tsv (IMDb)
    python benchmarks/bench_cache.py dtypes --data DIR
    python benchmarks/bench_cache.py memory

Each writes its part of benchmarks/results/cache_cpu.json.

build: the same texts, in one process, in turn: the backbone's own forward over the very batches of the build, without
taps, and a whole `ActivationCache.build` into a new folder (reading the rows, the plan, pooling, checksums, flushed
files, the manifest). A ratio is of one round's two times.

dtypes: one float32 cache of all texts is built; the bfloat16 and int8 caches are built from its taps by the same
code, which stores what it would store with the backbone there, as float32 keeps the taps as they are. LEVI is
trained on each with the settings of `levi-fast train`, for several seeds.

memory: synthetic caches of growing size are read, shuffled batches first and then every shard, each in a process of
its own that may keep 64 MiB of them mapped; the highest rise of resident memory is noted.
"""

from __future__ import annotations

import argparse
import json
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from levi_fast import DEFAULT_BACKBONE, ActivationCache, LeviConfig, TapExtractor, load_backbone, load_tokenizer
from levi_fast.bench.record import facts
from levi_fast.bench.workload import load_task
from levi_fast.cache.estimate import Estimate
from levi_fast.data.batching import length_batches
from levi_fast.storage import write_atomic
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.runs import Splits, TapBank, run_method

RESULTS = Path(__file__).parent / "results" / "cache_cpu.json"
DTYPES = ("float32", "bfloat16", "int8")


def load(data: Path) -> tuple[nn.Module, Any, Any, Splits]:
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    task = load_task("imdb", data)
    return backbone, tokenizer, task, task.encode(tokenizer, max_length=None, backbone_config=backbone.config)


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def build(data: Path, texts: int, rounds: int) -> dict[str, Any]:
    """Throughput of a build beside the bare forward over the same batches."""
    backbone, tokenizer, _, splits = load(data)
    dataset = splits.train.subset(range(texts), "subset")
    first, _ = dataset.unique_inputs()
    batches = length_batches(dataset.lengths[first].tolist(), 32)

    def bare() -> None:
        with torch.no_grad():
            for places in batches:
                backbone(**dataset.tokens(torch.tensor([first[place] for place in places])))

    def cached() -> None:
        with tempfile.TemporaryDirectory(dir=".") as folder:  # on a disk, not in memory
            ActivationCache.build(Path(folder) / "c", backbone, dataset, preprocessor=tokenizer, max_length=256)

    said: list[Estimate] = []
    with tempfile.TemporaryDirectory(dir=".") as folder:  # also the warm-up
        started = time.perf_counter()
        ActivationCache.build(
            Path(folder) / "c", backbone, dataset, preprocessor=tokenizer, max_length=256, on_estimate=said.append
        )
        whole = time.perf_counter() - started
    times: dict[str, list[float]] = {"bare forward": [], "build": []}
    for number in range(rounds):
        calls = [("bare forward", bare), ("build", cached)]
        for name, call in calls if number % 2 == 0 else reversed(calls):
            times[name].append(seconds_of(call))
        print({name: round(values[-1], 3) for name, values in times.items()}, flush=True)
    ratios = sorted(b / c for b, c in zip(times["bare forward"], times["build"], strict=True))
    return {
        "texts": len(first),
        "tokens_with_padding": sum(len(b) * max(int(dataset.lengths[first[p]]) for p in b) for b in batches),
        "batches": len(batches),
        "seconds": {name: [round(value, 3) for value in values] for name, values in times.items()},
        "texts_per_second": {name: round(len(first) / statistics.median(v), 2) for name, v in times.items()},
        "build_over_bare_throughput": [round(ratio, 3) for ratio in ratios],
        "median": round(statistics.median(ratios), 3),
        "asked": 0.95,
        "holds": statistics.median(ratios) >= 0.95,
        "estimated_seconds_before_the_first_batch": round(said[0].seconds, 2),
        "that_build_took_seconds": round(whole, 2),
        "note": f"the first {texts} of the 1,707 training texts: the whole takes minutes a round",
    }


class Replay(TapExtractor):
    """Answers with the taps of a float32 cache in place of running the backbone."""

    def __init__(self, backbone: nn.Module, cache: ActivationCache, splits: Splits) -> None:
        super().__init__(backbone)
        self.taps: dict[bytes, Tensor] = {}
        for name, dataset in splits.named():
            taps, rows = cache.find(dataset, name)
            self.taps.update(zip(dataset.input_bytes(), taps[rows], strict=True))

    def __call__(self, **inputs: Any) -> list[Tensor]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
        keys = [row[kept].to(torch.int32).numpy().tobytes() for row, kept in zip(ids, mask, strict=True)]
        return [torch.stack([self.taps[key] for key in keys])]


def dtypes(data: Path, folder: Path, seeds: int, epochs: int | None) -> dict[str, Any]:
    """Size and accuracy of every dtype."""
    backbone, tokenizer, task, splits = load(data)
    config = LeviConfig(
        backbone=DEFAULT_BACKBONE,
        task_model=task.task_model("auto", len(tokenizer)),
        **task.processor.labels.config_fields(),
    )
    arguments: dict[str, Any] = {"data": dict(splits.named()), "preprocessor": tokenizer, "max_length": 256}
    exact = ActivationCache.build(folder / "float32", backbone, **arguments, on_estimate=print)
    replay = Replay(backbone, exact, splits)
    rows = sum(len(dataset) for _, dataset in splits.named())
    result: dict[str, Any] = {"texts": rows, "sizes": splits.sizes(), "seeds": seeds, "epochs": epochs or 20}
    for dtype in DTYPES:
        cache = exact if dtype == "float32" else ActivationCache.build(
            folder / dtype, replay, **arguments, dtype=dtype, overwrite=True
        )  # fmt: skip
        size = sum(entry.bytes or 0 for entry in cache.manifest.files())
        entries = sum(len(part) for part in cache.values())
        runs = []
        for seed in range(seeds):
            options = TrainingOptions(seed=seed, cross_fit=0, **({} if epochs is None else {"epochs": epochs}))
            bank = TapBank.from_cache(cache, splits)
            found = run_method("levi", config, splits, options, backbone=backbone, bank=bank)
            runs.append(
                {
                    "seed": seed,
                    "id_accuracy": found.id["accuracy"],
                    "ood_accuracy": found.ood["new"]["accuracy"],
                    "validation_accuracy": found.fit.validation["accuracy"],
                }
            )
            print(dtype, runs[-1], flush=True)
        worst = max(float((cache[name].load() - exact[name].load()).abs().max()) for name in cache)
        result[dtype] = {
            "mib": round(size / 2**20, 2),
            "bytes_per_text": round(size / entries),
            "largest_error_of_a_tap": worst,
            "id_accuracy": round(statistics.mean(run["id_accuracy"] for run in runs), 4),
            "ood_accuracy": round(statistics.mean(run["ood_accuracy"] for run in runs), 4),
            "runs": runs,
        }
    for dtype in DTYPES[1:]:
        for split in ("id_accuracy", "ood_accuracy"):
            pairs = zip(result[dtype]["runs"], result["float32"]["runs"], strict=True)
            changes = [run[split] - whole[split] for run, whole in pairs]
            result[dtype][f"{split}_change"] = round(statistics.mean(changes), 4)
            result[dtype][f"{split}_change_of_seeds"] = [round(change, 4) for change in changes]
    return result


class Wide(nn.Module):
    """A stand-in for a backbone whose one tap is wide: large caches from few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 4096)])
        self.config = SimpleNamespace(hidden_size=4096, num_hidden_layers=1, to_dict=dict)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        out: Tensor = self.layers[0](inputs_embeds)
        return out


def memory_row(folder: str) -> dict[str, Any]:
    """Read a cache in this process."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE / 2**20

    cache = ActivationCache.open(folder, resident_bytes=64 * 2**20)
    taps = cache["data"]
    generator = torch.Generator().manual_seed(0)
    taps[torch.zeros(128, dtype=torch.int64)]  # what a batch takes beside the file
    taps.mapped.close()
    before = shuffled = sequential = resident()
    for _ in range(400):
        taps[torch.randint(len(taps), (128,), generator=generator)]
        shuffled = max(shuffled, resident())
    for chunk in taps.chunks():
        chunk.sum()
        sequential = max(sequential, resident())
    return {
        "cache_mib": round(sum(entry.bytes or 0 for entry in cache.manifest.files()) / 2**20, 1),
        "rows": len(taps),
        "shards": len(cache.manifest.parts["data"].shards),
        "rose_mib_shuffled": round(shuffled - before, 1),
        "rose_mib_in_order": round(sequential - before, 1),
    }


def memory() -> dict[str, Any]:
    """Resident memory over the size of the cache."""
    rows = []
    for count in (6_400, 25_600, 102_400):
        data = [{"inputs_embeds": torch.full((1, 1), float(row))} for row in range(count)]
        with tempfile.TemporaryDirectory(dir=".") as folder:
            ActivationCache.build(Path(folder) / "c", Wide(), data, batch_size=128, batches_per_shard=8)
            command = [sys.executable, __file__, "memory", "--folder", f"{folder}/c"]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        rows.append(json.loads(out.splitlines()[-1]))
        print(rows[-1], flush=True)
    return {"resident_mib_allowed": 64, "rows_per_batch": 128, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("build", "dtypes", "memory"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--texts", type=int, default=1024, help="build: how many")
    parser.add_argument("--rounds", type=int, default=3, help="build: of both contenders")
    parser.add_argument("--seeds", type=int, default=3, help="dtypes: runs per dtype")
    parser.add_argument("--epochs", type=int, help="dtypes: of every run; default: that of levi-fast train")
    parser.add_argument(
        "--caches", type=Path, help="dtypes: keep the caches here, and go on with those that are there"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.folder:
        print(json.dumps(memory_row(arguments.folder)))
        return
    if arguments.part != "memory" and arguments.data is None:
        parser.error(f"{arguments.part} needs --data")
    if arguments.part == "memory":
        measured = memory()
    elif arguments.part == "build":
        measured = build(arguments.data, arguments.texts, arguments.rounds)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = arguments.caches or Path(temporary)
            measured = dtypes(arguments.data, folder, arguments.seeds, arguments.epochs)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    part = f"build_{arguments.texts}_texts" if arguments.part == "build" else arguments.part
    document[part] = {"machine": facts(), "measured": measured}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
