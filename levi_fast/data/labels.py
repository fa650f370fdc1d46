"""What is predicted: the kind of problem, the label names, and labels as tensors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from levi_fast.data.tables import Table, is_missing_label, parse_number, short
from levi_fast.errors import DataError

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)

# Whole numbers with at most this many different values are taken for classes.
MAX_INTEGER_CLASSES = 100

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_TRUTH = ("true", "false")


@dataclass(frozen=True)
class LabelSpace:
    """The labels of the training table, and how any table's labels become tensors.

    Args:
        column: the label column.
        problem_type: transformers' name of the kind of problem.
        kind: what the cells are: ``"string"``, ``"integer"``, ``"boolean"``, ``"number"``.
        names: label names in id order (numbers by value, anything else by code point); empty for regression.
        separator: between the labels of a text cell (multi-label).
        target_mean, target_std: of the training labels (regression).
    """

    column: str
    problem_type: str
    kind: str
    names: tuple[str, ...] = ()
    separator: str = "|"
    target_mean: float = 0.0
    target_std: float = 1.0

    @property
    def num_labels(self) -> int:
        return len(self.names) if self.names else 1

    @classmethod
    def fit(cls, table: Table, column: str, problem_type: str | None = None, separator: str = "|") -> LabelSpace:
        """Learn the label space of a training table.

        Raises:
            DataError: a missing label, a label that does not fit the kind of problem, fewer than two classes, a
                constant regression label, or a column whose kind cannot be told.
        """
        if problem_type is not None and problem_type not in PROBLEM_TYPES:
            raise DataError(f"--problem-type: expected one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")
        if not separator:
            raise DataError("--label-separator: expected at least one character, got ''")
        cells = table.cells[column]
        # a text cell without labels is a legitimate row of a multi-label table
        _require_no_missing(table, column, allow_empty_text=problem_type == MULTI_LABEL)
        problem_type = problem_type or infer_problem_type(table, column)
        if problem_type == REGRESSION:
            values = _regression_targets(table, column)
            std = float(values.std())
            if not std > 0.0:
                raise DataError(f"{table.path}: every label in {column!r} is {values[0]:g}: nothing to learn")
            return cls(column, problem_type, "number", (), separator, float(values.mean()), std)
        if problem_type == MULTI_LABEL:
            items = [item for row in range(table.num_rows) for item in _items(table, column, row, separator)]
        else:
            _require_scalars(table, column)
            items = list(cells)
        kind = _kind(items)
        names = {label_name(item, kind) for item in items}
        if len(names) < (2 if problem_type == SINGLE_LABEL else 1):
            found = f"only {short(next(iter(names)))}" if names else "none"
            raise DataError(f"{table.path}: column {column!r}: expected at least two different labels, got {found}")
        ordered = sorted(names) if kind in ("string", "boolean") else sorted(names, key=float)
        return cls(column, problem_type, kind, tuple(ordered), separator)

    def encode(self, table: Table) -> np.ndarray:
        """Labels of a table: int64 ``[N]`` (single label), float32 ``[N, C]`` of 0/1 (multi-label), float32 ``[N]``.

        Raises:
            DataError: a missing label, one that training did not show, or one that is not a finite number
                (regression); the message names the row and, for classes, the known labels.
        """
        multi = self.problem_type == MULTI_LABEL
        _require_no_missing(table, self.column, allow_empty_text=multi)
        if self.problem_type == REGRESSION:
            return _regression_targets(table, self.column)
        index = {name: place for place, name in enumerate(self.names)}
        if not multi:
            _require_scalars(table, self.column)
            cells = table.cells[self.column]
            return np.array([self._index(index, table, row, cell) for row, cell in enumerate(cells)], dtype=np.int64)
        targets = np.zeros((table.num_rows, len(self.names)), dtype=np.float32)
        for row in range(table.num_rows):
            for item in _items(table, self.column, row, self.separator):
                targets[row, self._index(index, table, row, item)] = 1.0
        return targets

    def _index(self, index: dict[str, int], table: Table, row: int, cell: Any) -> int:
        name = label_name(cell, self.kind)
        if name not in index:
            known = ", ".join(self.names[:20]) + (", …" if len(self.names) > 20 else "")
            raise DataError(
                f"{table.where(row)}: column {self.column!r}: label {short(name)} does not occur in the training "
                f"file; known labels: {known}"
            )
        return index[name]

    def config_fields(self) -> dict[str, Any]:
        """What a LeviConfig takes from the labels: kind of problem, label names, scale of the targets."""
        if self.problem_type == REGRESSION:
            scale = {"target_mean": self.target_mean, "target_std": self.target_std}
            return {"problem_type": self.problem_type, "num_labels": 1, **scale}
        return {
            "problem_type": self.problem_type,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: place for place, name in enumerate(self.names)},
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "column": self.column,
            "problem_type": self.problem_type,
            "kind": self.kind,
            "names": list(self.names),
            "separator": self.separator,
            "target_mean": self.target_mean,
            "target_std": self.target_std,
        }

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> LabelSpace:
        return cls(**{**state, "names": tuple(state["names"])})


def infer_problem_type(table: Table, column: str) -> str:
    """Guess the kind of problem from a label column without missing cells.

    Lists are multi-label; text and booleans are classes; whole numbers are classes when there are at most 100
    different ones; other numbers are regression.

    Raises:
        DataError: numbers with a few cells that are none, or text that hardly ever repeats.
    """
    cells = table.cells[column]
    if any(isinstance(cell, (list, tuple)) for cell in cells):
        return MULTI_LABEL
    kind = _kind(cells)
    distinct = len({str(cell) for cell in cells})
    if kind == "integer":
        return SINGLE_LABEL if distinct <= MAX_INTEGER_CLASSES else REGRESSION
    if kind == "number":
        return REGRESSION
    if kind == "string":
        odd = [row for row, cell in enumerate(cells) if parse_number(cell) is None]
        if odd and len(odd) <= len(cells) // 2:
            raise DataError(
                f"{table.where(odd[0])}: column {column!r} holds numbers, but here {short(cells[odd[0]])}; correct "
                f"it, or say what the labels are with --problem-type"
            )
        if distinct > 50 and distinct > len(cells) // 2:
            raise DataError(
                f"{table.path}: column {column!r} has {distinct} different labels in {len(cells)} rows; is it the "
                f"label column? If it is, say so with --problem-type"
            )
    return SINGLE_LABEL


def label_name(cell: Any, kind: str) -> str:
    """The name under which a label is known; 1, 1.0 and "1" are one whole-number label."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    text = str(cell).strip()
    if kind == "boolean":
        return text.lower()
    if kind in ("integer", "number") and not _INTEGER.fullmatch(text):
        value = parse_number(cell)
        if value is not None and math.isfinite(value):
            return str(int(value)) if value.is_integer() else repr(value)
    return text


def _kind(cells: list[Any]) -> str:
    if cells and all(isinstance(cell, bool) or _is_text(cell, lambda text: text.lower() in _TRUTH) for cell in cells):
        return "boolean"
    if all(_is_int(cell) or _is_text(cell, lambda text: _INTEGER.fullmatch(text) is not None) for cell in cells):
        return "integer"
    # "01" and "1" must stay two labels, so digits with leading zeros are text
    if all(
        not isinstance(cell, bool)
        and parse_number(cell) is not None
        and not _is_text(cell, lambda text: _LEADING_ZERO.fullmatch(text) is not None)
        for cell in cells
    ):
        return "number"
    return "string"


def _is_int(cell: Any) -> bool:
    return isinstance(cell, int) and not isinstance(cell, bool)


def _is_text(cell: Any, test: Callable[[str], bool]) -> bool:
    return isinstance(cell, str) and test(cell.strip())


def _require_no_missing(table: Table, column: str, *, allow_empty_text: bool) -> None:
    for row, cell in enumerate(table.cells[column]):
        if is_missing_label(cell) and not (allow_empty_text and isinstance(cell, str) and not cell.strip()):
            raise DataError(f"{table.where(row)}: column {column!r}: the label is missing (got {short(cell)})")


def _require_scalars(table: Table, column: str) -> None:
    for row, cell in enumerate(table.cells[column]):
        if isinstance(cell, (list, tuple, dict)):
            raise DataError(f"{table.where(row)}: column {column!r}: expected one label, got {short(cell)}")


def _items(table: Table, column: str, row: int, separator: str) -> list[Any]:
    cell = table.cells[column][row]
    if isinstance(cell, (list, tuple)):
        items = list(cell)
    elif isinstance(cell, str):
        items = [part for part in (piece.strip() for piece in cell.split(separator)) if part]
    else:
        raise DataError(
            f"{table.where(row)}: column {column!r}: expected a list of labels or text with {separator!r} between "
            f"them, got {short(cell)}"
        )
    for item in items:
        if is_missing_label(item) or isinstance(item, (list, dict)):
            raise DataError(f"{table.where(row)}: column {column!r}: expected label names, got {short(cell)}")
    repeated = [item for item, count in Counter(map(str, items)).items() if count > 1]
    if repeated:
        raise DataError(f"{table.where(row)}: column {column!r}: label {repeated[0]!r} stands there more than once")
    return items


def _regression_targets(table: Table, column: str) -> np.ndarray:
    values = np.empty(table.num_rows, dtype=np.float64)
    for row, cell in enumerate(table.cells[column]):
        value = None if isinstance(cell, (list, tuple, dict)) else parse_number(cell)
        # a label such as "none" reads as a missing number
        if value is None or not math.isfinite(value):
            raise DataError(f"{table.where(row)}: column {column!r}: expected a finite number, got {short(cell)}")
        values[row] = value
    return values.astype(np.float32)
