"""From the user's files, or a named data set, to encoded splits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.labels import REGRESSION, LabelSpace
from levi_fast.data.preprocessing import (
    TableProcessor,
    length_limit,
    pad_token_id,
    stratified_holdout,
    tokenize,
    warn_truncated,
)
from levi_fast.data.split_column import divide
from levi_fast.data.tables import Columns, Table, read_table
from levi_fast.errors import DataError
from levi_fast.storage import write_atomic
from levi_fast.training.runs import Splits

TASK_FILE = "levi_task.json"
VALIDATION_FRACTION = 0.1
# What a named task trains with where the user does not say. MovieLens: validation cannot tell 12 epochs of 128 rows
# from TrainingOptions' own 20 of 32, and they take a fifth of the time.
TASK_TRAINING: dict[str, dict[str, int]] = {"movielens": {"epochs": 12, "batch_size": 128}}
TASK_MODELS = ("auto", "text", "tabular", "table", "none")


@dataclass(frozen=True)
class TableFiles:
    """The user's files: training, validation, test, and OOD files by name; with ``Columns.split``, training alone."""

    train: str
    validation: str | None = None
    test: str | None = None
    ood: Mapping[str, str] = field(default_factory=dict)


@dataclass
class TableTask:
    """Tables that were read and checked; :meth:`encode` turns them into splits.

    Args:
        processor: fitted on the training table.
        tables: by split: "train", "validation", "test", "ood NAME".
        inferred: whether the kind of problem was inferred from the labels.
    """

    processor: TableProcessor
    tables: dict[str, Table]
    inferred: bool

    @classmethod
    def load(
        cls,
        files: TableFiles,
        columns: Columns,
        *,
        problem_type: str | None = None,
        label_separator: str = "|",
        seed: int = 0,
    ) -> TableTask:
        """Read all files and check every row that will be used, before anything expensive starts.

        Without a validation file, a seeded tenth of the training rows is held out, class by class. With
        ``columns.split``, the training file holds all sets: see :func:`levi_fast.data.split_column.divide`.

        Raises:
            DataError: naming file, column and row of what cannot be used; a split column together with other files.
        """
        tables = _read(files, columns)
        columns = replace(columns, split=None)  # what the model reads of a row
        whole = tables["train"]
        processor = TableProcessor.fit(whole, columns, problem_type=problem_type, label_separator=label_separator)
        assert processor.labels is not None
        for table in tables.values():
            processor.check(table)
        if "validation" not in tables:
            kept, held = stratified_holdout(processor.labels.encode(whole), VALIDATION_FRACTION, seed)
            tables = {**tables, "train": whole.select(kept), "validation": whole.select(held)}
            fitted = TableProcessor.fit(
                tables["train"], columns, problem_type=processor.labels.problem_type, label_separator=label_separator
            )
            # numbers and categories are learned from the rows that are left; label names from all rows of the file
            assert fitted.labels is not None
            labels = replace(
                processor.labels, target_mean=fitted.labels.target_mean, target_std=fitted.labels.target_std
            )
            processor = replace(fitted, labels=labels)
        return cls(processor, tables, inferred=problem_type is None)

    def encode(self, tokenizer: Any, *, max_length: int | None, backbone_config: Any) -> Splits:
        """Tokenise; one warning says how many texts were cut.

        Args:
            tokenizer: of the backbone, or None for a model that reads no text.
            max_length: tokens per text; None takes 256, or what the backbone takes if that is less.
            backbone_config: tells how much the backbone takes.

        Raises:
            DataError: ``max_length`` out of range, or a text without any token.
        """
        if tokenizer is not None:
            self.processor = replace(self.processor, max_length=length_limit(max_length, tokenizer, backbone_config))
        encoded = {split: self.processor.encode(table, tokenizer) for split, table in self.tables.items()}
        if tokenizer is not None:
            warn_truncated(encoded.values(), self.processor.max_length)
        return _splits(encoded)

    def task_model(self, kind: str, vocab_size: int | None) -> dict[str, Any] | None:
        """Spec of the task model.

        Args:
            kind: "text", "tabular", "table" (both), "none", or "auto": whatever the columns allow.
            vocab_size: of the tokenizer.

        Raises:
            DataError: the kind needs columns that were not named.
        """
        columns = self.processor.columns
        has_tabular = bool(columns.numeric or columns.categorical)
        if kind == "auto":
            kind = ("table" if columns.text else "tabular") if has_tabular else "text"
        if kind == "none":
            return None
        if kind in ("tabular", "table") and not has_tabular:
            raise DataError(f"--task-model {kind} needs --numeric-column or --categorical-column")
        if kind in ("text", "table") and not columns.text:
            raise DataError(f"--task-model {kind} needs --text-column")
        text = {"type": "text", "vocab_size": vocab_size}
        tabular = {
            "type": "tabular",
            "num_numeric": self.processor.num_numeric,
            "cardinalities": self.processor.cardinalities,
        }
        specs: dict[str, dict[str, Any]] = {
            "text": text,
            "tabular": tabular,
            "table": {"type": "table", "text": text, "tabular": tabular},
        }
        if kind not in specs:
            raise DataError(f"--task-model: expected one of {', '.join(TASK_MODELS)}, got {kind!r}")
        return specs[kind]

    def save(self, directory: Path) -> None:
        """Write what :func:`load_saved_task` needs."""
        self.processor.save(directory)


@dataclass
class MovieLensSplits:
    """The named task ``movielens``: see :func:`levi_fast.data.movielens.load_movielens`."""

    examples: Any
    split: str
    seed: int
    processor: TableProcessor

    @classmethod
    def load(cls, data: str, split: str, seed: int) -> MovieLensSplits:
        """Read and split a folder with ``ratings.csv`` and ``movies.csv``.

        Raises:
            DataError: the folder or a file cannot be used.
        """
        from levi_fast.data.movielens import load_movielens

        examples = load_movielens(data, split=split, seed=seed)
        ratings = examples.splits["train"].label
        labels = LabelSpace(
            "rating", REGRESSION, "number", target_mean=float(ratings.mean()), target_std=float(ratings.std()) or 1.0
        )
        processor = TableProcessor(Columns(text=("text",), label="rating"), labels, max_length=256)
        return cls(examples, split, seed, processor)

    def encode(self, tokenizer: Any, *, max_length: int | None, backbone_config: Any) -> Splits:
        """As :meth:`TableTask.encode`."""
        if tokenizer is not None:
            self.processor = replace(self.processor, max_length=length_limit(max_length, tokenizer, backbone_config))
        encoded = {}
        for name, rows in self.examples.splits.items():
            token_ids, cut = (None, 0)
            if tokenizer is not None:
                token_ids, cut = tokenize(rows.text, tokenizer, self.processor.max_length)
            encoded[f"ood {name}" if name in self.examples.ood_names else name] = EncodedDataset(
                f"movielens {name}",
                token_ids=token_ids,
                pad_token_id=0 if tokenizer is None else pad_token_id(tokenizer),
                features={key: torch.from_numpy(value) for key, value in rows.features.items()},
                labels=torch.from_numpy(rows.label),
                num_truncated=cut,
            )
        if tokenizer is not None:
            warn_truncated(encoded.values(), self.processor.max_length)
        return _splits(encoded)

    def task_model(self, kind: str, vocab_size: int | None) -> dict[str, Any] | None:
        """Spec of the recommendation model; None for ``"none"``."""
        if kind not in ("auto", "none"):
            raise DataError(f"--task-model: movielens has its own task model; expected auto or none, got {kind!r}")
        spec: dict[str, Any] = self.examples.task_model
        return None if kind == "none" else spec

    def save(self, directory: Path) -> None:
        """Write what :func:`load_saved_task` needs."""
        self.processor.save(directory)
        document = {"task": "movielens", "split": self.split, "seed": self.seed}
        write_atomic(directory / TASK_FILE, json.dumps(document, indent=2) + "\n")


def saved_task(directory: str | Path) -> dict[str, Any] | None:
    """Which named task a model folder was trained on; None for the user's own files."""
    file = Path(directory) / TASK_FILE
    if not file.is_file():
        return None
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return document


def _read(files: TableFiles, columns: Columns) -> dict[str, Table]:
    """Tables by split: "train", "validation", "test", "ood NAME"."""
    if columns.split is not None:
        if files.validation or files.test or files.ood:
            raise DataError(
                f"--split-column: column {columns.split!r} names all sets of {files.train}; leave out --validation, "
                "--test and --ood"
            )
        return divide(read_table(files.train, columns), columns.split)
    named = {"train": files.train, "validation": files.validation, "test": files.test}
    named.update({f"ood {name}": path for name, path in files.ood.items()})
    return {split: read_table(path, columns) for split, path in named.items() if path is not None}


def _splits(encoded: dict[str, EncodedDataset]) -> Splits:
    ood = {name.removeprefix("ood "): data for name, data in encoded.items() if name.startswith("ood ")}
    return Splits(encoded["train"], encoded["validation"], encoded.get("test"), ood)
