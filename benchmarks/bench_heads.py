"""Sixteen configurations in one pass beside sixteen runs by themselves, on cached taps.

    python benchmarks/bench_heads.py training movielens --data DIR    # training alone, in this process
    python benchmarks/bench_heads.py command movielens --data DIR --cache DIR
                                                    # the command line: --sweep beside separate levi-fast train

Writes its part of benchmarks/results/many_heads_cpu.json. ``training`` takes random taps (their values make no
difference to the time), trains every configuration by itself with all threads, then all in one pass, and compares
weights and figures, once with all threads for the separate runs and once with one. ``command`` times whole commands,
from start to the written folder; of the separate ones a few, scaled to sixteen.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from bench_cached_training import mapped_taps
from methods import load_task, machine
from transformers import set_seed

from levi_fast import DEFAULT_BACKBONE, LeviConfig, LeviModel, get_levi_model, load_backbone, load_tokenizer
from levi_fast.storage import write_atomic
from levi_fast.training.fit import TrainingOptions, fit
from levi_fast.training.runs import Splits, score, task_inputs
from levi_fast.training.sweep import Head, HeadResult, train_heads
from levi_fast.training.tasks import TASK_TRAINING

RESULTS = Path(__file__).parent / "results" / "many_heads_cpu.json"
SEEDS, RATES = range(8), (1e-3, 3e-4)
COUNT = len(SEEDS) * len(RATES)
AT_MOST = 0.25


def make_heads(task_name: str, data: Path, epochs: int, folder: Path) -> list[Head]:
    """The sixteen configurations on a real data set's rows, with random taps of MiniLM's shape."""
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    task = load_task(task_name, data, "genres", 0)
    splits = task.encode(tokenizer, max_length=None, backbone_config=backbone.config)
    assert task.processor.labels is not None
    config = LeviConfig(task_model=task.task_model("auto", len(tokenizer)), **task.processor.labels.config_fields())
    model = get_levi_model(backbone, config)
    for place, (_, dataset) in enumerate(splits.named()):
        taps = mapped_taps(folder, str(place), len(dataset), sum(model.config.tap_widths or []))
        dataset.set_taps(taps, keep_tokens="input_ids" in task_inputs(model))
    schedule = {**TASK_TRAINING.get(task_name, {}), "epochs": epochs}
    return [
        Head(f"{seed} {rate}", model.config, TrainingOptions(seed=seed, learning_rate=rate, **schedule), splits)
        for seed in SEEDS
        for rate in RATES
    ]


def alone(head: Head) -> tuple[LeviModel, dict[str, Any], float]:
    """A head trained and scored by itself: model, figures, seconds."""
    started = time.perf_counter()
    set_seed(head.options.seed)
    model = LeviModel(head.config)
    splits: Splits = head.splits
    result = fit(model, splits.train, splits.validation, head.options, loop="lean")
    scored = splits.validation if splits.test is None else splits.test
    figures = {
        "history": result.history,
        "id": score(model, scored),
        "ood": {name: score(model, dataset) for name, dataset in splits.ood.items()},
    }
    return model, figures, time.perf_counter() - started


def difference(model: LeviModel, figures: dict[str, Any], head: HeadResult) -> dict[str, Any]:
    """How far a head of the pass is from its own run."""
    assert head.fit is not None
    own = model.state_dict()
    return {
        "same_weights": all(torch.equal(value, head.weights[name]) for name, value in own.items()),
        "same_figures": figures == {"history": head.fit.history, "id": head.id, "ood": head.ood},
        "largest_weight_difference": max(float((v - head.weights[n]).abs().max()) for n, v in own.items()),
    }


def training(task_name: str, data: Path, epochs: int) -> dict[str, Any]:
    """Training and scoring alone."""
    with tempfile.TemporaryDirectory() as folder:
        heads = make_heads(task_name, data, epochs, Path(folder))
        threads = torch.get_num_threads()
        alone(heads[0])  # warm-up
        runs = [alone(head) for head in heads]
        torch.set_num_threads(1)
        on_one_thread = [alone(head) for head in heads[:2]]
        torch.set_num_threads(threads)
        started = time.perf_counter()
        results = train_heads(heads)
        together = time.perf_counter() - started
    separate = sum(seconds for *_, seconds in runs)
    many = [difference(model, figures, head) for (model, figures, _), head in zip(runs, results, strict=True)]
    one = [
        difference(model, figures, head) for (model, figures, _), head in zip(on_one_thread, results[:2], strict=True)
    ]
    return {
        "configurations": COUNT,
        "epochs": epochs,
        "threads_of_separate_runs": threads,
        "workers": min(threads, COUNT),
        "separate_seconds": round(separate, 2),
        "separate_seconds_each": round(statistics.median(seconds for *_, seconds in runs), 3),
        "separate_seconds_each_on_one_thread": round(statistics.median(s for *_, s in on_one_thread), 3),
        "together_seconds": round(together, 2),
        "ratio": round(together / separate, 3),
        "asked_at_most": AT_MOST,
        "holds": together <= AT_MOST * separate,
        "equal_to_runs_on_one_thread": {
            "compared": len(one),
            "weights": all(d["same_weights"] for d in one),
            "figures": all(d["same_figures"] for d in one),
        },
        "beside_runs_on_all_threads": {
            "equal_weights": sum(d["same_weights"] for d in many),
            "largest_weight_difference": max(d["largest_weight_difference"] for d in many),
        },
    }


def command(task_name: str, data: Path, cache: Path, separate_runs: int) -> dict[str, Any]:
    """Whole commands."""
    program = [sys.executable, "-m", "levi_fast", "train", "--cache", str(cache)]
    if task_name == "movielens":
        program += ["--task-name", "movielens", "--data", str(data)]
    else:
        program += [
            "--train", str(data / "orig" / "train.tsv"), "--validation", str(data / "orig" / "dev.tsv"),
            "--test", str(data / "orig" / "test.tsv"), "--ood", f"new={data / 'new' / 'test.tsv'}",
            "--text-column", "Text", "--label-column", "Sentiment",
        ]  # fmt: skip

    def seconds_of(*extra: str) -> float:
        started = time.perf_counter()
        subprocess.run([*program, *extra], check=True, capture_output=True, env=os.environ)
        return time.perf_counter() - started

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "sweep.yaml").write_text(f"seed: {list(SEEDS)}\nlearning_rate: {list(RATES)}\n")
        seconds_of("--epochs", "1", "--output", str(folder / "warm-up"))  # files into the system's cache
        # of movielens the seed draws the split as well, and another split is not in the cache: one seed, all the same
        separate = [
            seconds_of("--learning-rate", str(RATES[place % 2]), "--output", str(folder / str(place)))
            for place in range(separate_runs)
        ]
        together = seconds_of("--sweep", str(folder / "sweep.yaml"), "--output", str(folder / "sweep"))
        best = json.loads((folder / "sweep" / "sweep.json").read_text())["columns"][0]["heads"][0]
    each = statistics.median(separate)
    return {
        "configurations": COUNT,
        "separate_seconds_each": round(each, 2),
        "separate_runs_timed": separate_runs,
        "separate_seconds_scaled": round(COUNT * each, 1),
        "together_seconds": round(together, 2),
        "ratio": round(together / (COUNT * each), 3),
        "asked_at_most": AT_MOST,
        "holds": together <= AT_MOST * COUNT * each,
        "best": best,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("training", "command"))
    parser.add_argument("task", choices=("movielens", "imdb"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="command: the activation cache of the data")
    parser.add_argument("--epochs", type=int, default=2, help="training: of every configuration")
    parser.add_argument("--separate-runs", type=int, default=3, help="command: how many of the sixteen are timed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.part == "command" and arguments.cache is None:
        parser.error("command needs --cache, which levi-fast cache build writes")
    if arguments.part == "training":
        measured = training(arguments.task, arguments.data, arguments.epochs)
    else:
        measured = command(arguments.task, arguments.data, arguments.cache, arguments.separate_runs)
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    document[f"{arguments.part} {arguments.task}"] = {"machine": machine(), "measured": measured}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
