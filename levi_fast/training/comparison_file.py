"""What ``levi-fast compare`` was asked for: one YAML file, or the same from the command line; checked on reading.

::

    data:
      - name: reviews
        train: train.csv            # paths are relative to the YAML file
        validation: dev.csv         # optional, as are test and ood
        test: test.csv
        ood: {new: new.csv}
        text_column: text
        label_column: label
      - {name: comments, train: all.csv, split_column: split, text_column: comment_text, label_column: toxic}
      - {name: movies, task_name: movielens, data: ml-latest-small, split: genres}
      - {name: products, task_name: amazon, data: amazon, split: [Books, Movies_and_TV]}
    methods: [levi, linear-probe]   # the first is what the others are compared with
    seeds: 0-4                      # or a list
    max_train_rows: 2000            # optional: that many training rows, drawn once
    max_eval_rows: 1000             # likewise of every other split
    epochs: 20                      # optional, as are batch_size, learning_rates and the model's settings
    standalone_view: false          # optional: LEVI without a task model trained by itself beside it
    cross_fit: 0                    # optional: folds that choose the blend beside few validation rows; 4 by default
    learning_rates: [0.0003, 0.001] # each cell trains with all of them and keeps the best on ID validation
    backbone_epochs: 3              # of methods that train the backbone
    backbone_learning_rates: [0.00005]  # likewise tried; by default 5e-5, or 5e-4 for LoRA
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from levi_fast.data.tables import Columns
from levi_fast.errors import DataError
from levi_fast.training.methods import canonical, find_method
from levi_fast.training.tasks import TableFiles

_DATA_KEYS = {
    "name", "train", "validation", "test", "ood", "text_column", "numeric_column", "categorical_column",
    "label_column", "split_column", "problem_type", "label_separator", "task_name", "data", "split",
}  # fmt: skip
_WHOLE = ("epochs", "backbone_epochs", "batch_size", "max_train_rows", "max_eval_rows", "hidden_width", "max_length")
_RATES = ("learning_rates", "backbone_learning_rates")
_KEYS = {
    "data", "methods", "seeds", *_RATES, "backbone", "backbone_dtype", "taps", "pooling", "task_model",
    "standalone_view", "cross_fit", *_WHOLE,
}  # fmt: skip


@dataclass(frozen=True)
class ComparedData:
    """One data set: the fields of a ``TrainRequest`` that say which data is meant."""

    name: str
    fields: Mapping[str, Any]

    @property
    def task_name(self) -> str | None:
        found: str | None = self.fields.get("task_name")
        return found

    @property
    def has_own_validation(self) -> bool:
        files = self.fields.get("files")
        return files is not None and files.validation is not None


@dataclass(frozen=True)
class Comparison:
    """Methods × seeds × data, and the settings that all share; see the module's example.

    Raises:
        DataError: for what cannot be; the message names the key.
    """

    data: Sequence[ComparedData]
    methods: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("data", [d.name for d in self.data]), ("methods", self.methods), ("seeds", self.seeds)):
            if not values:
                raise DataError(f"{name}: expected at least one")
            doubles = sorted({str(value) for value in values if list(values).count(value) > 1})
            if doubles:
                raise DataError(f"{name}: {doubles[0]} is given twice")
        for method in self.methods:
            find_method(method)
        for name in [d.name for d in self.data]:
            if not name or name.startswith(".") or "/" in name:
                raise DataError(f"data: name: expected a name that a folder can have, got {name!r}")
        for key in _WHOLE:
            value = self.settings.get(key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise DataError(f"{key}: expected a whole number of at least 1, got {value!r}")
        folds = self.settings.get("cross_fit")
        if folds is not None and (isinstance(folds, bool) or not isinstance(folds, int) or folds < 0 or folds == 1):
            raise DataError(f"cross_fit: expected 0 or a whole number of at least 2, got {folds!r}")
        flag = self.settings.get("standalone_view")
        if flag is not None and not isinstance(flag, bool):
            raise DataError(f"standalone_view: expected true or false, got {flag!r}")
        for key in _RATES:
            rates = self.settings.get(key)
            if rates is not None and (
                not isinstance(rates, list)
                or not rates
                or not all(isinstance(rate, float) and 0 < rate < float("inf") for rate in rates)
            ):
                raise DataError(f"{key}: expected a list of positive numbers such as [0.001], got {rates!r}")


def read_comparison(path: str) -> Comparison:
    """Read a YAML file.

    Raises:
        DataError: naming the file and what is wrong.
    """
    file = Path(path)
    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    try:
        return _parse(document, file.parent)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def parse_seeds(value: Any) -> list[int]:
    """``0-4``, ``0,2,5``, a number or a list of numbers.

    Raises:
        DataError: anything else.
    """
    wrong = DataError(f"seeds: expected numbers such as 0-4 or 0,1,2, got {value!r}")
    if isinstance(value, str):
        try:
            parts = [[int(end) for end in part.split("-")] for part in value.split(",")]
        except ValueError:
            raise wrong from None
        if any(len(part) > 2 for part in parts):
            raise wrong
        value = [seed for part in parts for seed in range(part[0], part[-1] + 1)]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in values):
        raise wrong
    return values


def parse_methods(value: Any) -> list[str]:
    """``levi,linear-probe`` or a list, aliases resolved.

    Raises:
        DataError: an unknown method.
    """
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(names, list):
        raise DataError(f"methods: expected a list of methods, got {value!r}")
    for name in names:
        find_method(str(name))
    return [canonical(str(name)) for name in names]


def _parse(document: Any, folder: Path) -> Comparison:
    if not isinstance(document, dict):
        raise DataError("expected keys data, methods, seeds")
    _refuse_unknown(document, _KEYS)
    for key in ("data", "methods"):
        if key not in document:
            raise DataError(f"{key}: is missing")
    if not isinstance(document["data"], list):
        raise DataError("data: expected a list of data sets")
    settings = {k: v for k, v in document.items() if k not in ("data", "methods", "seeds") and v is not None}
    return Comparison(
        [_data(entry, folder) for entry in document["data"]],
        parse_methods(document["methods"]),
        parse_seeds(document.get("seeds", [0])),
        settings,
    )


def _data(entry: Any, folder: Path) -> ComparedData:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise DataError(f"data: expected entries with a name, got {entry!r}")
    name = entry["name"]
    _refuse_unknown(entry, _DATA_KEYS, f"data: {name}: ")

    def located(value: Any) -> str | None:
        return None if value is None else str(folder / str(value))

    if entry.get("task_name") is not None:
        fields = {"task_name": entry["task_name"], "data": located(entry.get("data"))}
        split = entry.get("split")
        fields["ood"] = _located_ood(entry, name, located)
        fields["split"] = ",".join(map(str, split)) if isinstance(split, list) else split
        return ComparedData(name, {**fields, "problem_type": entry.get("problem_type")})
    if entry.get("train") is None:
        raise DataError(f"data: {name}: expected train: FILE, or task_name with data: DIR")
    files = TableFiles(
        str(located(entry["train"])),
        located(entry.get("validation")),
        located(entry.get("test")),
        _located_ood(entry, name, located),
    )
    columns = Columns(
        _listed(entry.get("text_column")),
        _listed(entry.get("numeric_column")),
        _listed(entry.get("categorical_column")),
        entry.get("label_column"),
        entry.get("split_column"),
    )
    given = {key: entry[key] for key in ("problem_type", "label_separator") if entry.get(key) is not None}
    return ComparedData(name, {"files": files, "columns": columns, **given})


def _located_ood(entry: Mapping[str, Any], name: str, located: Callable[[Any], str | None]) -> dict[str, str]:
    ood = entry.get("ood") or {}
    if not isinstance(ood, dict):
        raise DataError(f"data: {name}: ood: expected names with files, got {ood!r}")
    return {str(split): str(located(file)) for split, file in ood.items()}


def _listed(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(str(item) for item in value) if isinstance(value, list) else (str(value),)


def _refuse_unknown(given: Mapping[str, Any], known: set[str], where: str = "") -> None:
    unknown = sorted(str(key) for key in given if key not in known)
    if unknown:
        raise DataError(f"{where}{unknown[0]}: unknown; expected some of {', '.join(sorted(known))}")
