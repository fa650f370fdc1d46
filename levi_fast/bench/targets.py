"""How long training takes to reach a validation score, by the clock: every run is run, none is extrapolated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from levi_fast.bench.workload import Workload
from levi_fast.training.best_epoch import EpochProgress
from levi_fast.training.fit import fit
from levi_fast.training.metrics import LOWER_IS_BETTER, SELECTION_METRIC
from levi_fast.training.runs import TapBank, run_method


@dataclass(frozen=True)
class Target:
    """A score of the validation rows and where it comes from.

    Args:
        metric: what epochs are selected by: accuracy, rmse.
        value: to reach; less is better of rmse.
        source: for the reader.
    """

    metric: str
    value: float
    source: str

    def reached(self, scores: dict[str, float]) -> bool:
        """Whether an epoch's scores are at least as good; never for one that diverged."""
        if self.metric not in scores:
            return False
        own = scores[self.metric]
        return own <= self.value if self.metric in LOWER_IS_BETTER else own >= self.value


@dataclass
class Run:
    """Seconds and epochs until the target was reached; where it was not, those of all epochs."""

    seconds: float
    epochs: int
    reached: bool
    score: float | None


def selection_metric(workload: Workload) -> str:
    """The metric that training selects epochs by on a workload."""
    return SELECTION_METRIC[str(workload.config.problem_type)]


def probe_target(workload: Workload, bank: TapBank) -> Target:
    """What a linear probe of the last layer reaches on validation rows, with the workload's own schedule."""
    found = run_method(
        "linear-probe", workload.config, workload.splits, workload.options, backbone=workload.backbone, bank=bank
    )
    metric = selection_metric(workload)
    return Target(metric, found.fit.validation[metric], "linear probe, best epoch")


def from_the_cache(workload: Workload, bank: TapBank, target: Target, seed: int) -> Run:
    """Train LEVI on a cache's taps until the target is reached."""

    def train(on_epoch: EpochProgress) -> None:
        model = workload.model(seed)
        bank.attach(model, workload.splits)
        options = workload.options_of(workload.options.epochs, seed)
        try:
            fit(model, workload.splits.train, workload.splits.validation, options, loop="lean", on_epoch=on_epoch)
        finally:
            workload.without_taps()

    return _until(target, train)


def by_lora(workload: Workload, target: Target, seed: int) -> Run:
    """Fine-tune by LoRA, a backbone and a linear head, until the target is reached: every epoch runs in full."""

    def train(on_epoch: EpochProgress) -> None:
        config, options = workload.config, workload.options_of(workload.options.epochs, seed)
        run_method("lora", config, workload.splits, options, backbone=workload.backbone, bank=None, on_epoch=on_epoch)

    return _until(target, train)


class _ReachedError(Exception):
    """Ends a training from inside its report of an epoch."""


def _until(target: Target, train: Callable[[EpochProgress], Any]) -> Run:
    started = time.perf_counter()
    done = Run(0.0, 0, False, None)

    def on_epoch(epoch: int, _: int, scores: dict[str, float]) -> None:
        done.seconds, done.epochs = time.perf_counter() - started, epoch
        done.score = scores.get(target.metric)
        if target.reached(scores):
            done.reached = True
            raise _ReachedError

    with contextlib.suppress(_ReachedError):
        train(on_epoch)
    return done
