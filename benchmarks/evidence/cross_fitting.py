"""Whether a few validation rows, or the training rows by cross-fitting, or both should choose LEVI's blend.

    python benchmarks/evidence/cross_fitting.py --shared DIR --work DIR [--data imdb,...] [--seeds 3]

On every data set of the studies that has fewer than 1,000 validation rows; a learning rate of 0.001, on IMDb the best
of three by its validation score, as in frozen.yaml. All predictions are kept in the work folder, and rules applied to
them. Writes ``benchmarks/results/evidence-cross-fitting.json``; data sets that are not named stay as they are there.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from three_ways import Ways, predicted, read, write
from transformers import set_seed
from variants import Group, load

from levi_fast.modeling import LeviModel, get_levi_model
from levi_fast.report.console import Console
from levi_fast.report.metrics_file import versions, write_metrics
from levi_fast.training import fit as fitting
from levi_fast.training.best_epoch import BestEpoch
from levi_fast.training.blending import Blend, Logits, choose_blend
from levi_fast.training.fit import fit
from levi_fast.training.methods import method_config
from levi_fast.training.metrics import SELECTION_METRIC, compute_metrics, selection_key

RESULTS = Path(__file__).parents[1] / "results" / "evidence-cross-fitting.json"
RATES = {"imdb": (3e-4, 1e-3, 3e-3)}
DATA = ("imdb", "imdb-reversed", "synthetic", "movielens-genres-500", "movielens-years-500", "digits")
HELD_OUT = "held out"

# What the validation rows choose, what they choose together with the held-out ones, and the rule's own choice.
Rule = Callable[[Blend, Blend], Blend]
CHECKED = "both, where validation leans on the task model"
RULES: dict[str, Rule] = {
    "validation rows": lambda validation, both: validation,
    "validation and held-out rows": lambda validation, both: both,
    CHECKED: lambda validation, both: both if validation.leans_on_view else validation,
    "y(tap, view)": lambda *_: Blend(),
    "y(tap, 0)": lambda *_: Blend(1.0),
    "standalone task model": lambda *_: Blend(0.0, 1.0),
}


@contextmanager
def whole() -> Iterator[list[Any]]:
    """Training ends with its best weights and unblended, whatever was chosen; what was held out is in the list."""
    kept: list[Any] = []

    def restore(self: BestEpoch, model: LeviModel, seconds: float, held_out: Any = None) -> Any:
        kept.append(held_out)
        model.load_state_dict(self.weights)
        model.config.blend = model.config.view_blend = 0.0
        model.eval()
        return self.best

    with patch.object(BestEpoch, "restore", restore), patch.object(fitting, "is_asked_for", lambda *_: True):
        yield kept


def run(group: Group, rate: float) -> dict[str, Ways]:
    """All predictions of a training, and those of the training rows by cross-fitting."""
    splits = group.prepared.splits
    config = copy.deepcopy(group.prepared.config)
    config.standalone_view = True
    options = replace(group.request.options, learning_rate=rate, cross_fit=4)
    set_seed(options.seed)
    model = get_levi_model(group.prepared.backbone, method_config("levi", config))
    group.bank.attach(model, splits)
    with whole() as kept:
        fit(model, splits.train, splits.validation, options)
    found = predicted(model, splits)
    for _, data in splits.named():
        data.set_taps(None)
    (held_out,) = kept
    found[HELD_OUT] = Ways(np.stack(list(held_out[0].parts().values())), held_out[1])
    return found


def chosen(found: dict[str, Ways], kind: str) -> tuple[Blend, Blend]:
    """By the validation rows, and by them and the held-out ones."""
    validation, held = found["validation"], found[HELD_OUT]
    own = Logits(*validation.logits)
    both, labels = own.followed_by(Logits(*held.logits)), np.concatenate([validation.labels, held.labels])
    return choose_blend(own, validation.labels, kind)[0], choose_blend(both, labels, kind)[0]


def validation_key(found: dict[str, Ways], kind: str, weights: Blend) -> tuple[float, float]:
    held = found["validation"]
    return selection_key(compute_metrics(Logits(*held.logits).blended(weights), held.labels, kind), kind)


def scored(found: dict[str, Ways], kind: str, weights: Blend) -> dict[str, Any]:
    metric = SELECTION_METRIC[kind]
    scores = {
        split: compute_metrics(Logits(*ways.logits).blended(weights), ways.labels, kind)[metric]
        for split, ways in found.items()
    }
    ood = statistics.fmean(score for split, score in scores.items() if split.startswith("ood "))
    return {**weights._asdict(), "ID": scores["test"], "OOD": ood}


def summarise(runs: dict[int, dict[float, dict[str, Ways]]], kind: str) -> dict[str, Any]:
    """Every rule's figures, seed by seed and on average; each rule takes the learning rate that is best by it."""
    rules: dict[str, Any] = {name: [] for name in RULES}
    for rates in runs.values():
        choices = {rate: chosen(found, kind) for rate, found in rates.items()}
        for name, rule in RULES.items():
            weights = {rate: rule(*choice) for rate, choice in choices.items()}
            rate = max(rates, key=lambda rate: validation_key(rates[rate], kind, weights[rate]))
            rules[name].append({"learning_rate": rate, **scored(rates[rate], kind, weights[rate])})
    some = next(iter(next(iter(runs.values())).values()))
    return {
        "metric": SELECTION_METRIC[kind],
        "validation_rows": len(some["validation"].labels),
        "held_out_rows": len(some[HELD_OUT].labels),
        "seeds": list(runs),
        "rules": {
            name: {
                "seeds": rows,
                "mean": {split: statistics.fmean(row[split] for row in rows) for split in ("ID", "OOD")},
                "sd": {split: statistics.stdev(row[split] for row in rows) for split in ("ID", "OOD")},
            }
            for name, rows in rules.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--work", type=Path, required=True, help="folder for finished runs and taps")
    parser.add_argument("--data", default=",".join(DATA), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    asked = parser.parse_args()
    names = asked.data.split(",")
    if unknown := set(names) - set(DATA):
        parser.error(f"--data: expected some of {', '.join(DATA)}, got {', '.join(sorted(unknown))}")
    if asked.seeds < 2:
        parser.error(f"--seeds: expected at least 2, got {asked.seeds}")
    console = Console()
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"data": {}}
    for name in names:
        runs: dict[int, dict[float, dict[str, Ways]]] = {}
        for seed in range(asked.seeds):
            files = {rate: asked.work / "held-out" / f"{name} {seed} {rate}.npz" for rate in RATES.get(name, (1e-3,))}
            group = None
            for rate, file in files.items():
                if not file.is_file():
                    group = group or load(name, asked.shared, seed, asked.work, console)
                    started = time.perf_counter()
                    write(file, run(group, rate))
                    console.note(f"{name}, seed {seed}, rate {rate}: {time.perf_counter() - started:.1f} s")
            runs[seed] = {rate: read(file) for rate, file in files.items()}
        kind = "regression" if name.startswith("movielens") else "single_label_classification"
        document["data"][name] = summarise(runs, kind)
    document["data"] = {name: document["data"][name] for name in DATA if name in document["data"]}
    document.update(default=CHECKED, versions=versions())
    write_metrics(RESULTS, document)


if __name__ == "__main__":
    main()
