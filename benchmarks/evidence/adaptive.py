"""How far the prediction should lean on the frozen taps: what was tried so that LEVI is no worse OOD than its parts.

    python benchmarks/evidence/adaptive.py --shared DIR --work DIR [--choose 3] [--confirm 3] [--only default,...]

Every way of training is combined with every rule that picks the blend on ID validation rows; ``a`` is the weight of
the prediction with the view zeroed. Chosen on ``CHOSEN_ON``, then confirmed on ``CONFIRMED_ON``, whose OOD figures
had no part in the choice. Writes ``benchmarks/results/evidence-adaptive.json``; what is there of trainings that the
work folder has no run of stays.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import three_ways
import torch
from gates import GATES, Layers
from three_ways import Ways
from variants import Group, Record, Variant, load, run

from levi_fast.modeling import LeviModel
from levi_fast.modules import LayerwiseEnsemble
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import versions, write_metrics
from levi_fast.training import lean
from levi_fast.training.metrics import (
    SELECTION_METRIC,
    best_blend,
    blend_logits,
    compute_metrics,
    row_losses,
    selection_key,
)
from levi_fast.training.prediction import predict
from levi_fast.training.runs import Splits

RESULTS = Path(__file__).parents[1] / "results"
CHOSEN_ON = ("synthetic", "imdb-reversed", "movielens-years", "movielens-years-500")
CONFIRMED_ON = ("imdb", "movielens-genres", "movielens-genres-500", "digits")
DATA_SETS = (*CHOSEN_ON, *CONFIRMED_ON)

TRAININGS = [
    Variant("default"),
    Variant("token dropout 0.8", task_model={"token_dropout": 0.8}, text=True),
    Variant("view dropout 0.8", model={"view_dropout": 0.8}),
    Variant("view of width 8", task_model={"view_width": 8}),
    Variant("view at a tenth of the learning rate"),
    Variant("loss with and without the view", model={"view_dropout": 0.0}),
    Variant("view frozen after a quarter of the steps"),
    Variant("tap dropout 0.1"),
    Variant("tap dropout 0.25"),
    Variant("loss of y(0, view), weight 0.25", model={"view_loss": 0.25}),
    Variant("loss of y(0, view), weight 1", model={"view_loss": 1.0}),
]
# Those whose y(0, view) is weighed as well, and LEVI by default with its parts trained by themselves.
THREE_WAYS = (
    "default",
    "tap dropout 0.1",
    "tap dropout 0.25",
    "loss of y(0, view), weight 0.25",
    "loss of y(0, view), weight 1",
)
# The training that was chosen, and the rule under which trainings are compared.
CHOSEN = ("task model trained apart", "largest a within 1 standard error, with y(0, view) where within 1")
APART = {"task model trained apart": ("task-model",), "both parts trained apart": ("taps-only", "task-model")}
PART_NAMES = ("taps-only", "task-model")
PARTS = [Variant(name, name) for name in PART_NAMES]
ORDER = [*(variant.name for variant in TRAININGS), *APART, *PART_NAMES]

Rule = Callable[[np.ndarray, np.ndarray, np.ndarray, str], float]


def by_validation(
    grid: tuple[float, ...], errors: float, with_view: np.ndarray, without: np.ndarray, labels: np.ndarray, kind: str
) -> float:
    """The largest blend within ``errors`` standard errors of the best one on validation rows."""
    blended = {a: blend_logits(with_view, without, a) for a in grid}
    chosen = best = max(grid, key=lambda a: selection_key(compute_metrics(blended[a], labels, kind), kind))
    for a in grid:
        worse = row_losses(blended[a], labels, kind) - row_losses(blended[best], labels, kind)
        if a > best and errors and worse.mean() <= errors * worse.std() / math.sqrt(len(worse)):
            chosen = a
    return chosen


RULE = "largest of 0, 1/2 and 1 within 1 standard error"  # what the library does
_HALF, _WHOLE = (0.0, 0.25, 0.5), (0.0, 0.25, 0.5, 0.75, 1.0)
RULES: dict[str, Rule] = {
    **{f"a = {a:g}": lambda *_, a=a: a for a in (0.0, 0.5, 1.0)},
    "best a up to 1/2": partial(by_validation, _HALF, 0),
    "largest a up to 1/2 within 1 standard error": partial(by_validation, _HALF, 1),
    RULE: lambda *validation: best_blend(*validation)[0],
    "best a up to 1": partial(by_validation, _WHOLE, 0),
    "largest a up to 1 within 1 standard error": partial(by_validation, _WHOLE, 1),
    "largest a up to 1 within 2 standard errors": partial(by_validation, _WHOLE, 2),
}


def _both_losses(self: LeviModel, output: Any, labels: torch.Tensor) -> torch.Tensor:
    """The mean of the loss with the view and of that with the view zeroed."""
    if not self.training:
        return plain_loss(self, output, labels)
    taps, view = self.ensemble.seen
    zeroed = plain_forward(self.ensemble, taps, torch.zeros_like(view))
    return (plain_loss(self, output, labels) + plain_loss(self, zeroed, labels)) / 2


def _remembering(self: LayerwiseEnsemble, taps: Any, view: Any, **options: Any) -> Any:
    self.seen = (taps, view)
    return plain_forward(self, taps, view, **options)


def _slow_view(model: LeviModel, *arguments: Any) -> torch.optim.Optimizer:
    """The usual optimizer, with a tenth of the learning rate for the task model."""
    optimizer = plain_optimizer(model, *arguments)
    slow = {id(p) for name, p in model.named_parameters() if name.startswith("task_model.")}
    groups = []
    for group in optimizer.param_groups:
        for of_view, factor in ((False, 1.0), (True, 0.1)):
            if own := [p for p in group["params"] if (id(p) in slow) is of_view]:
                groups.append({**group, "params": own, "lr": factor * group["lr"]})
    optimizer.param_groups.clear()
    for group in groups:
        optimizer.add_param_group(group)
    return optimizer


plain_loss, plain_forward, plain_optimizer = LeviModel.loss, LayerwiseEnsemble.forward, lean.make_optimizer


def _stopped_view(steps: int, model: LeviModel, *arguments: Any) -> torch.optim.Optimizer:
    """The usual optimizer; after ``steps`` the task model stays as it is."""
    optimizer, done = plain_optimizer(model, *arguments), 0

    def count(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == steps:
            for parameter in model.task_model.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    optimizer.register_step_post_hook(count)
    return optimizer


@contextmanager
def trained_as(variant: Variant, group: Group) -> Iterator[None]:
    """The ways of training that no setting of the library names."""
    with ExitStack() as stack:
        if variant.name.startswith("tap dropout"):
            stack.enter_context(three_ways.tap_dropout(float(variant.name.rpartition(" ")[2])))
        if variant.name.startswith("loss with and without"):
            stack.enter_context(patch.object(LeviModel, "loss", _both_losses))
            stack.enter_context(patch.object(LayerwiseEnsemble, "forward", _remembering))
        if variant.name.startswith("view at a tenth"):
            stack.enter_context(patch.object(lean, "make_optimizer", _slow_view))
        if variant.name.startswith("view frozen"):
            options = group.request.options
            steps = math.ceil(len(group.prepared.splits.train) / options.batch_size) * options.epochs // 4
            stack.enter_context(patch.object(lean, "make_optimizer", partial(_stopped_view, steps)))
        yield


def train(group: Group, variant: Variant, predictions: Path) -> dict[str, Any]:
    """One training, scored under every rule: ``{rule: {"blend": a, "ID": score, "OOD": mean of scores}}``.

    What :func:`weighed` needs of it is kept at ``predictions``.
    """
    with trained_as(variant, group):
        result, splits, seconds = run(group, variant)
    if variant.name in THREE_WAYS or variant in PARTS:
        if variant.name != "task-model":
            group.bank.attach(result.model, splits)
        three_ways.write(predictions, three_ways.predicted(result.model, splits))
        for _, data in splits.named():
            data.set_taps(None)
    kind = str(result.model.config.problem_type)
    metric = SELECTION_METRIC[kind]
    if variant.method != "levi":
        ood = statistics.fmean(scores[metric] for scores in result.ood.values())
        return {
            "seconds": round(seconds, 2),
            "metric": metric,
            "rules": {"": {"blend": 0.0, "ID": result.id[metric], "OOD": ood}},
        }
    result.model.config.blend = 0.0
    group.bank.attach(result.model, splits)
    found = {name: predict(result.model, data) for name, data in splits.named() if name != "train"}
    labels = {name: data.labels.numpy() for name, data in splits.named() if data.labels is not None}
    layers: dict[str, Layers] = {}
    if variant.name == "default":
        every = {a: _layers_of(result.model, splits, a) for a in (0.0, 1.0)}
        layers = {name: Layers(every[0.0][name], every[1.0][name]) for name in found}
    for _, data in splits.named():
        data.set_taps(None)

    def scored(logits: dict[str, np.ndarray], blend: float | None) -> dict[str, Any]:
        scores = {split: compute_metrics(own, labels[split], kind)[metric] for split, own in logits.items()}
        ood = statistics.fmean(score for split, score in scores.items() if split.startswith("ood "))
        return {"blend": blend, "ID": scores[splits.id_split], "OOD": ood}

    rules = {}
    for name, rule in RULES.items():
        held = found["validation"]
        a = rule(held.logits, held.logits_without_view, labels["validation"], kind)
        blended = {split: blend_logits(p.logits, p.logits_without_view, a) for split, p in found.items()}
        rules[name] = scored(blended, a)
    for name, gate in GATES.items() if layers else ():
        combine = gate(layers["validation"], labels["validation"], kind)
        if combine is not None:
            rules[name] = scored({split: combine(own) for split, own in layers.items()}, None)
    return {"seconds": round(seconds, 2), "metric": metric, "rules": rules}


def _layers_of(model: LeviModel, splits: Splits, blend: float) -> dict[str, np.ndarray]:
    """Every layer's predictions [L, N, C] of every split but the training rows, at a blend."""
    model.config.blend = blend
    named = [(name, data) for name, data in splits.named() if name != "train"]
    found = {name: predict(model, data, with_layers=True).layer_logits for name, data in named}
    model.config.blend = 0.0
    return {name: logits for name, logits in found.items() if logits is not None}


def weighed(run: dict[str, Any], predictions: Callable[[str], Path]) -> Iterator[dict[str, Any]]:
    """A run with the rules of :mod:`three_ways` added; the default again, for each entry of :data:`APART`."""
    if run["variant"] not in THREE_WAYS or not predictions(run["variant"]).is_file():
        yield run
        return
    kind = next(kind for kind, metric in SELECTION_METRIC.items() if metric == run["metric"])
    own = three_ways.read(predictions(run["variant"]))
    yield {**run, "rules": {**run["rules"], **_three(own, kind)}}
    for name, parts in APART.items() if run["variant"] == "default" else ():
        other = {part: three_ways.read(predictions(part)) for part in parts}
        ways = {
            split: three_ways.with_parts(found, *(other[p][split] if p in other else None for p in PART_NAMES))
            for split, found in own.items()
        }
        yield {**run, "variant": name, "rules": _three(ways, kind)}


def _three(found: dict[str, Ways], kind: str) -> dict[str, Any]:
    rules = {}
    for name, rule in three_ways.RULES.items():
        weights = rule(found["validation"], kind)
        scores = {
            split: compute_metrics(ways.weighed(weights), ways.labels, kind)[SELECTION_METRIC[kind]]
            for split, ways in found.items()
        }
        ood = statistics.fmean(score for split, score in scores.items() if split.startswith("ood "))
        rules[name] = {"blend": weights, "ID": scores["test"], "OOD": ood}
    return rules


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, by data set, training and rule."""
    summary: dict[str, Any] = {}
    for entry in sorted(runs, key=lambda run: ORDER.index(run["variant"])):
        of_data = summary.setdefault(entry["data"], {}).setdefault(entry["variant"], {})
        for rule, found in entry["rules"].items():
            seeds = of_data.setdefault(rule, {"blend": [], "ID": [], "OOD": []})
            for name, value in found.items():
                seeds[name].append(value)
    for of_data in summary.values():
        for rules in of_data.values():
            for seeds in rules.values():
                seeds["mean"] = {name: statistics.fmean(seeds[name]) for name in ("ID", "OOD")}
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for finished runs and taps")
    parser.add_argument("--choose", type=int, default=3, help="seeds on the data sets that choose")
    parser.add_argument("--confirm", type=int, default=3, help="seeds on those that confirm")
    parser.add_argument("--only", help="trainings, comma-separated; default: all")
    asked = parser.parse_args()
    console = Console()
    record = Record(asked.work / "adaptive.jsonl")

    def kept(data: str, seed: int, variant: str) -> Path:
        return asked.work / "predictions" / f"{data} {seed} {variant}.npz"

    only = None if asked.only is None else asked.only.split(",")
    if unknown := set(only or ()) - {variant.name for variant in TRAININGS}:
        parser.error(f"--only: no trainings {', '.join(sorted(unknown))}")
    wanted = [*(variant for variant in TRAININGS if only is None or variant.name in only), *PARTS]
    plan = [(data, seed) for data in CHOSEN_ON for seed in range(asked.choose)]
    plan += [(data, seed) for data in CONFIRMED_ON for seed in range(asked.confirm)]
    for data, seed in plan:
        missing = list(record.missing(data, seed, wanted))
        group = load(data, asked.shared, seed, asked.work, console) if missing else None
        for variant in missing:
            if group is None or not group.has(variant):
                continue
            found = train(group, variant, kept(data, seed, variant.name))
            record.add({"data": data, "seed": seed, "variant": variant.name, **found})
            console.note(f"{data}, seed {seed}, {variant.name}: {found['seconds']} s")
    fresh = summarise(
        [found for run in record.runs for found in weighed(run, partial(kept, run["data"], run["seed"]))]
    )
    file = RESULTS / "evidence-adaptive.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"data": {}, "metrics": {}}
    document = {
        "chosen_on": CHOSEN_ON,
        "confirmed_on": CONFIRMED_ON,
        "rule": RULE,
        "three_ways": {
            "training": CHOSEN[0],
            "rule": CHOSEN[1],
            "trainings": [*THREE_WAYS, *APART],
            "rules": list(three_ways.RULES),
        },
        "metrics": {**before["metrics"], **{entry["data"]: entry["metric"] for entry in record.runs}},
        "data": {name: _in_order({**before["data"].get(name, {}), **fresh.get(name, {})}) for name in DATA_SETS},
        "versions": versions(),
    }
    write_metrics(file, document)


def _in_order(trainings: dict[str, Any]) -> dict[str, Any]:
    """By training, as the tables have them."""
    return {name: trainings[name] for name in ORDER if name in trainings}


if __name__ == "__main__":
    main()
