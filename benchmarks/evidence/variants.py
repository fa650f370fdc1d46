"""Variants of LEVI, trained on the same taps: what ``ablations.py`` and ``adaptive.py`` share.

A run is one variant, data set and seed; each finished one is a line of the output file, so that a killed script goes
on where it was. Everything not named is what ``levi-fast train`` does by default.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from levi_fast.backbones import load_backbone
from levi_fast.data import synthetic
from levi_fast.data.tables import Columns
from levi_fast.report.console import Console
from levi_fast.selection import data_dependent, resolve_taps
from levi_fast.training.commands import Prepared, build_bank, prepare, select
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.named_tasks import TASK_TRAINING
from levi_fast.training.request import TrainRequest
from levi_fast.training.runs import MethodResult, Splits, TapBank, run_method
from levi_fast.training.tasks import TableFiles

MOVIELENS = ("movielens-genres", "movielens-years", "movielens-genres-500", "movielens-years-500")
DATA = ("imdb", "imdb-reversed", *MOVIELENS, "synthetic", "digits")


@dataclass(frozen=True)
class Variant:
    """A change to the defaults.

    Args:
        name: in the results.
        method: as in ``--method``.
        model: fields of LeviConfig; a selector as "taps" is resolved on the training data.
        task_model: entries of the task model's specification.
        text: whether it is about a task model that reads text.
        rows: of the training rows, that many, drawn by the seed; None takes all.
    """

    name: str
    method: str = "levi"
    model: Mapping[str, Any] = field(default_factory=dict)
    task_model: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    text: bool = False


@dataclass
class Group:
    """A data set as a seed sees it, with the taps of all layers."""

    request: TrainRequest
    prepared: Prepared
    bank: TapBank
    console: Console

    def has(self, variant: Variant) -> bool:
        """Whether a variant is one of this data set: it has the rows and the task model for it."""
        rows, spec = len(self.prepared.splits.train), self.prepared.config.task_model or {}
        return (variant.rows or 0) <= rows and (not variant.text or spec.get("type") == "text")


def load(
    name: str, shared: Path, seed: int, caches: Path, console: Console, max_train_rows: int | None = None
) -> Group:
    """Read one of :data:`DATA` and its taps, from ``caches`` where they are.

    Args:
        shared: folder with ``imdb-counterfactual`` and ``movielens-small``.
        seed: of training; of MovieLens and the synthetic reviews, also of the data.
        max_train_rows: of MovieLens, where not its own number.
    """
    source, fixed = _source(name, shared, seed, caches)
    # validation alone chooses the blend: the folds of cross-fitting would cost more than all the variants
    options = TrainingOptions(**TASK_TRAINING.get(source.get("task_name", ""), {}), seed=seed, cross_fit=0)
    named = name if fixed else f"{name}-seed-{seed}"
    if max_train_rows is not None:
        source, named = {**source, "max_train_rows": max_train_rows}, f"{named}-{max_train_rows}"
    request = TrainRequest(output="", method="taps-only", cache=str(caches / named), options=options, **source)
    prepared = prepare(request, console)
    bank = build_bank(request, prepared, console)
    assert bank is not None
    return Group(request, prepared, bank, console)


def _source(name: str, shared: Path, seed: int, caches: Path) -> tuple[dict[str, Any], bool]:
    """Fields of a request, and whether all seeds see the same rows."""
    if name.startswith("imdb"):
        trained, shifted = ("new", "orig") if name == "imdb-reversed" else ("orig", "new")
        folder = shared / "imdb-counterfactual"
        own = [str(folder / trained / f"{part}.tsv") for part in ("train", "dev", "test")]
        files = TableFiles(*own, {shifted: str(folder / shifted / "test.tsv")})
        return {"files": files, "columns": Columns(text=("Text",), label="Sentiment")}, True
    if name.startswith("movielens-"):
        _, split, *rows = name.split("-")
        source = {"task_name": "movielens", "data": str(shared / "movielens-small"), "split": split}
        # as benchmarks/evidence/all-movielens.yaml
        few = {"max_train_rows": 500, "max_eval_rows": 500, "max_length": 128} if rows else {}
        return {**source, **few}, False
    if name == "digits":
        return {"task_name": "digits", "data": str(caches / "digits-stand-ins")}, False
    folder = caches / f"synthetic-reviews-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = {part: str(path) for part, path in synthetic.write_csv(folder, seed).items()}
    ood = {part: paths[part] for part in synthetic.OOD_NAMES}
    files = TableFiles(paths["train"], paths["validation"], paths["test"], ood)
    return {"files": files, "columns": Columns(text=("text",), label="label")}, False


def run(group: Group, variant: Variant) -> tuple[MethodResult, Splits, float]:
    """Train a variant; returns it, the splits that it saw, and the seconds of training and scoring."""
    prepared, options = group.prepared, group.request.options
    config = copy.deepcopy(prepared.config)
    config.standalone_view = False  # what is studied is LEVI itself
    selector = variant.model.get("taps")
    for name, value in variant.model.items():
        setattr(config, name, value)
    if data_dependent(selector):
        config.taps = "all"
        open_choice = replace(prepared, config=config)
        config.taps = select(str(selector), group.request, open_choice, group.bank, group.console).layers
    backbone = prepared.backbone
    if resolve_taps(config.taps, len(group.bank.layers))[-1] != group.bank.layers[-1]:
        backbone = load_backbone(prepared.name)  # a cache's record of it stands for all layers up to the last
    if config.task_model is not None:
        config.task_model = {**config.task_model, **variant.task_model}
    splits, bank = prepared.splits, group.bank
    if variant.rows is not None:
        splits, bank = _fewer(splits, bank, variant.rows, options.seed)
    started = time.perf_counter()
    result = run_method(variant.method, config, splits, options, backbone=backbone, bank=bank, keep_layers=True)
    return result, splits, time.perf_counter() - started


def _fewer(splits: Splits, bank: TapBank, rows: int, seed: int) -> tuple[Splits, TapBank]:
    """The splits with ``rows`` training rows, and their taps."""
    kept = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    fewer = replace(splits, train=splits.train.subset(kept.tolist(), splits.train.name))
    return fewer, bank.for_splits(splits, fewer)


def figures(result: MethodResult, splits: Splits, seconds: float) -> dict[str, Any]:
    """A run as JSON values."""
    return {
        "id": result.id,
        "ood": result.ood,
        "validation": result.fit.validation,
        "best_epoch": result.fit.best_epoch,
        "blend": result.fit.blend,
        "tap_layers": result.model.config.tap_layers,
        "training_rows": len(splits.train),
        "trained_parameters": result.model.num_parameters_by_part()[0],
        "seconds": round(seconds, 2),
    }


class Record:
    """A file of JSON lines, one per finished run, written through at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def missing(self, data: str, seed: int, variants: Sequence[Variant]) -> Iterator[Variant]:
        done = {run["variant"] for run in self.runs if (run["data"], run["seed"]) == (data, seed)}
        return (variant for variant in variants if variant.name not in done)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
            file.flush()
            os.fsync(file.fileno())
