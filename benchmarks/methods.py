"""LEVI beside its own parts on real data: methods × seeds in one process, from one pass of the backbone.

    python benchmarks/methods.py movielens --data DIR          # ratings.csv and movies.csv
    python benchmarks/methods.py imdb --data DIR               # orig/{train,dev,test}.tsv and new/test.tsv

Everything is what ``levi-fast train --seed N`` does by default (for MovieLens the seed also draws the split into
users); epoch and blend are chosen on ID validation data. Writes a JSON file with every figure after each seed, and
prints means and standard deviations.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from levi_fast import DEFAULT_BACKBONE, LeviConfig, __version__, load_backbone, load_tokenizer
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.tables import Columns
from levi_fast.storage import write_atomic
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.methods import METHODS
from levi_fast.training.named_tasks import TASK_TRAINING, MovieLensSplits
from levi_fast.training.runs import MethodResult, Splits, TapBank, run_method
from levi_fast.training.tasks import TableFiles, TableTask

PARTS = ("levi", "linear-probe", "taps-only", "task-model")


def load_task(name: str, data: Path, split: str, seed: int) -> MovieLensSplits | TableTask:
    """The named task, read from ``data``."""
    if name == "movielens":
        return MovieLensSplits.load(str(data), split, seed)
    files = TableFiles(
        str(data / "orig" / "train.tsv"),
        str(data / "orig" / "dev.tsv"),
        str(data / "orig" / "test.tsv"),
        {"new": str(data / "new" / "test.tsv")},
    )
    return TableTask.load(files, Columns(text=("Text",), label="Sentiment"))


def constants(splits: Splits, seed: int) -> list[dict[str, Any]]:
    """For regression: what predicting the training mean for everybody reaches, the bar below all bars."""
    labels = splits.train.labels
    if labels is None or not labels.is_floating_point():
        return []

    def rmse(dataset: EncodedDataset) -> dict[str, float]:
        assert dataset.labels is not None
        return {"rmse": float((dataset.labels - labels.mean()).square().mean().sqrt())}

    scored = splits.validation if splits.test is None else splits.test
    return [
        {
            "method": "constant",
            "seed": seed,
            "id": rmse(scored),
            "ood": {name: rmse(dataset) for name, dataset in splits.ood.items()},
        }
    ]


def row(result: MethodResult, seed: int) -> dict[str, Any]:
    """One run's figures."""
    trained, _ = result.model.num_parameters_by_part()
    return {
        "method": result.method,
        "seed": seed,
        "id": result.id,
        "ood": result.ood,
        "blend": result.fit.blend,
        "best_epoch": result.fit.best_epoch,
        "validation": result.fit.validation,
        "seconds": round(result.fit.seconds, 2),
        "trained_parameters": trained,
    }


def summary(rows: list[dict[str, Any]], metric: str) -> dict[str, dict[str, dict[str, float]]]:
    """``summary[method][split]`` = mean and standard deviation of a metric over seeds."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == method]
        splits = {"id": [r["id"][metric] for r in own]}
        splits.update({name: [r["ood"][name][metric] for r in own] for name in own[0]["ood"]})
        table[method] = {
            name: {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
            for name, values in splits.items()
        }
    return table


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "levi_fast": __version__,
        "commit": commit,
        "uncommitted_changes": any(not line.startswith("??") for line in dirty.splitlines()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("movielens", "imdb"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("genres", "years"), default="genres", help="movielens: what is held out")
    parser.add_argument("--seeds", type=int, choices=range(1, 101), metavar="N", default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(PARTS))
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE)
    parser.add_argument("--threads", type=int, help="while training the heads; default: as many as torch takes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/methods-TASK.json beside this file")
    arguments = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    console = Console()
    metric = "rmse" if arguments.task == "movielens" else "accuracy"
    name = f"methods-{arguments.task}" + (f"-{arguments.split}" if arguments.task == "movielens" else "")
    output = arguments.output or Path(__file__).parent / "results" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    schedule = TASK_TRAINING.get(arguments.task, {})
    backbone, tokenizer = load_backbone(arguments.backbone), load_tokenizer(arguments.backbone)
    rows: list[dict[str, Any]] = []
    means: dict[str, dict[str, dict[str, float]]] = {}
    splits: Splits | None = None
    bank: TapBank | None = None
    tap_seconds: list[float] = []
    threads = torch.get_num_threads()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    for seed in seeds:  # the seed outermost: a run that is cut short has compared the methods fairly
        if splits is None or arguments.task == "movielens":  # MovieLens is split by the seed, as on the command line
            task = load_task(arguments.task, arguments.data, arguments.split, seed)
            splits = task.encode(tokenizer, max_length=None, backbone_config=backbone.config)
            assert task.processor.labels is not None
            config = LeviConfig(
                backbone=arguments.backbone,
                task_model=task.task_model("auto", len(tokenizer)),
                **task.processor.labels.config_fields(),
            )
            started = time.perf_counter()
            torch.set_num_threads(threads)
            bank = TapBank.build(backbone, config, splits)
            torch.set_num_threads(arguments.threads or threads)
            tap_seconds.append(round(time.perf_counter() - started, 1))
            rows += constants(splits, seed)
        for method in arguments.methods:
            options = TrainingOptions(seed=seed, **schedule)
            result = run_method(method, config, splits, options, backbone=backbone, bank=bank)
            rows.append(row(result, seed))
            console.print(f"{method} seed {seed}: id {result.id} ood {result.ood} blend {result.fit.blend}")
        means = summary(rows, metric)
        document = {
            "task": arguments.task,
            "split": arguments.split if arguments.task == "movielens" else "orig -> new",
            "metric": metric,
            "backbone": arguments.backbone,
            "sizes": splits.sizes(),
            "tap_seconds": tap_seconds,
            "options": {k: v for k, v in vars(TrainingOptions(**schedule)).items() if k != "seed"},
            "head_threads": torch.get_num_threads(),
            "machine": machine(),
            "seeds": [s for s in seeds if s <= seed],
            "summary": means,
            "runs": rows,
        }
        write_atomic(output, json.dumps(document, indent=1) + "\n")

    table = Table(title=f"{arguments.task}: {metric}, mean ± sd over {arguments.seeds} seeds")
    columns = list(next(iter(means.values())))
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for method, cells in means.items():
        table.add_row(method, *(f"{cells[c]['mean']:.4f} ± {cells[c]['sd']:.4f}" for c in columns))
    console.print(table)
    console.print(f"wrote {output}")


if __name__ == "__main__":
    main()
