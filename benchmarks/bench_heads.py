"""Sixteen configurations in one pass beside sixteen runs by themselves, on cached taps.

    python benchmarks/bench_heads.py training movielens --data DIR    # training alone, in this process
    python benchmarks/bench_heads.py stacking                         # the ensembles' steps stacked, for comparison
    python benchmarks/bench_heads.py command movielens --data DIR --cache DIR [--by-itself]
                                                    # the command line: --sweep beside separate levi-fast train

Writes its part of benchmarks/results/many_heads_cpu.json. ``training`` takes random taps (their values make no
difference to the time), trains every configuration by itself with all threads, then all in one pass, and compares
weights and figures, once with all threads for the separate runs and once with one. ``command`` times whole commands,
from start to the written folder; of the separate ones a few, scaled to sixteen. ``--by-itself`` is LEVI without the
standalone task model and the cross-fitting that the command line adds.
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
from torch import Tensor, nn

from levi_fast import (
    DEFAULT_BACKBONE,
    LayerwiseEnsemble,
    LeviConfig,
    LeviModel,
    get_levi_model,
    load_backbone,
    load_tokenizer,
)
from levi_fast.bench.heads import COUNT, RATES, SEEDS, alone, make_heads
from levi_fast.bench.record import facts
from levi_fast.bench.synthetic_taps import mapped_taps
from levi_fast.bench.workload import load_task
from levi_fast.functional import layerwise_loss
from levi_fast.storage import write_atomic
from levi_fast.training.named_tasks import TASK_TRAINING
from levi_fast.training.runs import task_inputs
from levi_fast.training.sweep import Head, HeadResult, train_heads

RESULTS = Path(__file__).parent / "results" / "many_heads_cpu.json"
AT_MOST = 0.25


def heads_of(task_name: str, data: Path, epochs: int, folder: Path) -> list[Head]:
    """The sixteen configurations on a real data set's rows, with random taps of MiniLM's shape."""
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    task = load_task(task_name, data)
    splits = task.encode(tokenizer, max_length=None, backbone_config=backbone.config)
    assert task.processor.labels is not None
    config = LeviConfig(task_model=task.task_model("auto", len(tokenizer)), **task.processor.labels.config_fields())
    model = get_levi_model(backbone, config)
    for place, (_, dataset) in enumerate(splits.named()):
        taps = mapped_taps(folder, str(place), len(dataset), sum(model.config.tap_widths or []))
        dataset.set_taps(taps, keep_inputs="input_ids" in task_inputs(model))
    schedule = {**TASK_TRAINING.get(task_name, {}), "epochs": epochs}
    return make_heads(model.config, splits, schedule)


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
        heads = heads_of(task_name, data, epochs, Path(folder))
        threads = torch.get_num_threads()
        alone(heads[0])  # warm-up; the workers' server too, which the command line starts before it reads its data
        train_heads(heads[:2])
        runs = [alone(head) for head in heads]
        torch.set_num_threads(1)
        on_one_thread = [alone(head) for head in heads[:2]]
        torch.set_num_threads(threads)
        started = time.perf_counter()
        results = train_heads(heads)
        together = time.perf_counter() - started
    separate = sum(seconds for *_, seconds in runs)
    least = least_seconds(heads[0])
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
        "products_alone": {
            "gflop_per_second": least["gflop_per_second"],
            "seconds": round(COUNT * least["seconds_per_head"], 2),
            "ratio": round(COUNT * least["seconds_per_head"] / separate, 3),
        },
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


def stacked_step(taps: Tensor, views: Tensor, weights: dict[str, Tensor], target: Tensor) -> Tensor:
    """All heads' ensembles stacked, in PyTorch's own operators: the sum of their losses.

    Args:
        taps: [L, B, D], normalised, shared by the K heads.
        views: [K, B, V], normalised.
        weights: tap [L, D, K * H], view [K, V, L * H], bias [L, K * H], output [L, K, H, C],
            output_bias [L, K, 1, C].
        target: [B].
    """
    layers, batch, _ = taps.shape
    heads, outputs = views.shape[0], weights["output"].shape[-1]
    before = torch.baddbmm(weights["bias"][:, None], taps, weights["tap"]).view(layers, batch, heads, -1)
    of_views = torch.bmm(views, weights["view"]).view(heads, batch, layers, -1).permute(2, 1, 0, 3)
    hidden = nn.functional.gelu(before + of_views)
    logits = torch.matmul(hidden.transpose(1, 2), weights["output"]) + weights["output_bias"]
    everyone = target.expand(layers * heads, batch).reshape(-1)
    return heads * nn.functional.cross_entropy(logits.reshape(-1, outputs), everyone)


class Stack:
    """Sixteen heads' ensembles: as they are, and their weights stacked."""

    def __init__(self, batch: int) -> None:
        layers, width, view_width, hidden, outputs = 6, 384, 64, 256, 2
        self.shape = (layers, width, hidden)
        self.taps = nn.functional.layer_norm(torch.randn(layers, batch, width), (width,))
        self.views = nn.functional.layer_norm(torch.randn(COUNT, batch, view_width), (view_width,))
        self.target = torch.randint(0, outputs, (batch,))
        self.ensembles = [
            LayerwiseEnsemble([width] * layers, view_width, outputs, view_dropout=0.0) for _ in range(COUNT)
        ]
        states = [dict(ensemble.named_parameters()) for ensemble in self.ensembles]
        weights = {
            "tap": torch.cat([state["tap_weight"].view(layers, width, hidden) for state in states], dim=2),
            "view": torch.stack([state["view_weight"].reshape(view_width, -1) for state in states]),
            "bias": torch.cat([state["bias"] for state in states], dim=1),
            "output": torch.stack([state["output_weight"].permute(1, 2, 0) for state in states], dim=1),
            "output_bias": torch.stack([state["output_bias"][:, None] for state in states], dim=1),
        }
        self.weights = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}

    def separate(self) -> Tensor:
        total = torch.zeros(())
        for view, ensemble in zip(self.views, self.ensembles, strict=True):
            ensemble.zero_grad()
            logits = ensemble(self.taps, view).layer_logits
            loss = layerwise_loss(logits, self.target, "single_label_classification")
            loss.backward()
            total += loss.detach()
        return total

    def stacked(self) -> Tensor:
        for weight in self.weights.values():
            weight.grad = None
        loss = stacked_step(self.taps, self.views, self.weights, self.target)
        loss.backward()
        return loss.detach()

    def gradient_difference(self) -> float:
        """Largest relative difference of a head's gradient of the tap weights, between the two."""
        layers, width, hidden = self.shape
        whole = self.weights["tap"].grad
        assert whole is not None
        largest = 0.0
        for place, ensemble in enumerate(self.ensembles):
            own = ensemble.tap_weight.grad
            assert own is not None
            own = own.view(layers, width, hidden)
            theirs = whole[:, :, place * hidden : (place + 1) * hidden]
            largest = max(largest, float((own - theirs).norm() / own.norm()))
        return largest


def stacking(rounds: int) -> list[dict[str, Any]]:
    """One step of sixteen heads' ensembles, forward and backward: by the op one after another, and stacked."""
    rows = []
    for batch in (32, 128):
        torch.manual_seed(0)
        stack = Stack(batch)
        torch.testing.assert_close(stack.separate(), stack.stacked(), rtol=1e-4, atol=1e-4)
        difference = stack.gradient_difference()
        assert difference < 1e-4, difference
        taken: dict[str, list[float]] = {"separate": [], "stacked": []}
        for _ in range(rounds):
            for name, call in (("separate", stack.separate), ("stacked", stack.stacked)):
                started = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - started)
        ms = {name: round(1e3 * statistics.median(values), 2) for name, values in taken.items()}
        rows.append(
            {
                "heads": COUNT, "batch": batch, "threads": torch.get_num_threads(),
                "by_the_op_one_after_another_ms": ms["separate"], "stacked_ms": ms["stacked"],
                "stacked_over_separate": round(ms["stacked"] / ms["separate"], 3),
                "largest_relative_difference_of_tap_weight_gradients": difference,
            }
        )  # fmt: skip
    return rows


def least_seconds(head: Head) -> dict[str, float]:
    """How long the ensemble's own products take at the rate of a large product: no way to train is faster."""
    size = 2048
    one, other = torch.randn(size, size), torch.randn(size, size)
    rate = 0.0
    for _ in range(5):
        started = time.perf_counter()
        one @ other
        rate = max(rate, 2 * size**3 / (time.perf_counter() - started))
    config = head.config
    hidden, widths = int(config.hidden_width or config.num_labels), config.tap_widths or []
    # forward and weight gradient of the taps' product; forward and both gradients of the view's
    per_row = 4 * sum(widths) * hidden + 6 * config.view_width * len(widths) * hidden
    rows = len(head.splits.train) * head.options.epochs
    return {"gflop_per_second": round(rate / 1e9, 1), "seconds_per_head": per_row * rows / rate}


def command(
    task_name: str, data: Path, cache: Path, backbone_dtype: str | None, separate_runs: int, by_itself: bool
) -> dict[str, Any]:
    """Whole commands."""
    program = [sys.executable, "-m", "levi_fast", "train", "--cache", str(cache)]
    if backbone_dtype is not None:
        program += ["--backbone-dtype", backbone_dtype]
    if by_itself:
        program += ["--no-standalone-view", "--cross-fit", "0"]
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
        separate = []
        for place in range(separate_runs):
            varied = ["--learning-rate", str(RATES[place % 2])]
            # of movielens the seed draws the split as well, and another split is not in the cache; elsewhere it
            # decides whether folds are trained, so all seeds count
            if task_name != "movielens":
                varied += ["--seed", str(SEEDS[place // 2 % len(SEEDS)])]
            separate.append(seconds_of(*varied, "--output", str(folder / str(place))))
        together = seconds_of("--sweep", str(folder / "sweep.yaml"), "--output", str(folder / "sweep"))
        best = json.loads((folder / "sweep" / "sweep.json").read_text())["columns"][0]["heads"][0]
    # by itself all runs take as long, and the median is of a busy moment least; else some train folds as well
    each = statistics.median(separate) if by_itself else statistics.fmean(separate)
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
    parser.add_argument("part", choices=("training", "command", "stacking"))
    parser.add_argument("task", nargs="?", choices=("movielens", "imdb"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path, help="command: the activation cache of the data")
    parser.add_argument("--backbone-dtype", help="command: that the cache was built with; it is not loaded again")
    parser.add_argument("--epochs", type=int, default=2, help="training: of every configuration")
    parser.add_argument("--by-itself", action="store_true", help="command: LEVI alone")
    parser.add_argument("--separate-runs", type=int, default=3, help="command: how many of the sixteen are timed")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    if arguments.part == "command" and arguments.cache is None:
        parser.error("command needs --cache, which levi-fast cache build writes")
    if arguments.part != "stacking" and (arguments.task is None or arguments.data is None):
        parser.error(f"{arguments.part} needs a task and --data")
    measured: Any
    if arguments.part == "stacking":
        measured = stacking(rounds=15)
    elif arguments.part == "training":
        measured = training(arguments.task, arguments.data, arguments.epochs)
    else:
        measured = command(
            arguments.task,
            arguments.data,
            arguments.cache,
            arguments.backbone_dtype,
            arguments.separate_runs,
            arguments.by_itself,
        )
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    words = (arguments.part, arguments.task, "by itself" if arguments.by_itself else None)
    document[" ".join(filter(None, words))] = {"machine": facts(), "measured": measured}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output, json.dumps(document, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
