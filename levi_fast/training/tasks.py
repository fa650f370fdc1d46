"""From the user's files to encoded splits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from levi_fast.backbones import load_tokenizer
from levi_fast.data.encoded import EncodedDataset
from levi_fast.data.preprocessing import (
    VALIDATION_FRACTION,
    TableProcessor,
    length_limit,
    stratified_holdout,
    warn_truncated,
)
from levi_fast.data.split_column import divide
from levi_fast.data.tables import Columns, Table, read_table
from levi_fast.errors import DataError
from levi_fast.storage import write_atomic
from levi_fast.training.runs import Splits

TASK_FILE = "levi_task.json"  # which named data set a model folder was trained on
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
    ) -> Self:
        """Read all files and check every row that will be used, before anything expensive starts.

        Without a validation file, a seeded tenth of the training rows is held out, class by class. With
        ``columns.split``, the training file holds all sets: see :func:`levi_fast.data.split_column.divide`.

        Raises:
            DataError: naming file, column and row of what cannot be used; a split column together with other files.
        """
        tables = _read(files, columns)
        columns = replace(columns, split=None)  # what the model reads of a row
        return cls.of_tables(tables, columns, problem_type=problem_type, label_separator=label_separator, seed=seed)

    @classmethod
    def of_tables(
        cls,
        tables: Mapping[str, Table],
        columns: Columns,
        *,
        problem_type: str | None = None,
        label_separator: str = "|",
        seed: int = 0,
    ) -> Self:
        """As :meth:`load`, of tables that were read, by split."""
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
        return cls(processor, dict(tables), inferred=problem_type is None)

    def load_preprocessor(self, backbone: str) -> Any:
        """The backbone's tokenizer; None where no text is read."""
        return load_tokenizer(backbone) if self.processor.columns.text else None

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
        return splits_of(encoded)

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


def save_task(directory: Path, processor: TableProcessor, settings: Mapping[str, Any]) -> None:
    """Write what reading the rows of a named data set again needs.

    Args:
        directory: the model folder.
        processor: with the label space.
        settings: arguments of :func:`levi_fast.training.named_tasks.load_named_task`, its name as "task".
    """
    processor.save(directory)
    write_atomic(directory / TASK_FILE, json.dumps(settings, indent=2) + "\n")


def names_in(split: str | None) -> list[str]:
    """The names in ``--split``, which are separated by commas."""
    return [part.strip() for part in (split or "").split(",") if part.strip()]


def splits_of(encoded: Mapping[str, EncodedDataset]) -> Splits:
    """Data sets under "train", "validation", "test" and "ood NAME" as splits."""
    ood = {name.removeprefix("ood "): data for name, data in encoded.items() if name.startswith("ood ")}
    return Splits(encoded["train"], encoded["validation"], encoded.get("test"), ood)
