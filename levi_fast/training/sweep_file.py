"""``sweep.yaml``: which configurations to train, as a grid or one by one; everything in it is checked on reading.

A grid has a list of values per setting, and every combination is trained::

    seed: [0, 1, 2, 3]
    learning_rate: [0.001, 0.0003]

A list names each configuration, and says what it has beside the command line's settings::

    configurations:
      - {name: plain}
      - {name: wide, hidden_width: 512, seed: 1}

A configuration's seed is that of its weights, dropout and order of rows. Which rows are held out for validation, and
how a named data set is split, follows the command line's ``--seed`` for all of them.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from levi_fast.errors import DataError

# Which settings may differ, and what their values are; the first go into TrainingOptions, the second into LeviConfig.
OPTION_TYPES: dict[str, type] = {
    "seed": int,
    "learning_rate": float,
    "weight_decay": float,
    "warmup_ratio": float,
    "max_grad_norm": float,
    "epochs": int,
    "batch_size": int,
    "blend": float,
    "cross_fit": int,
}
MODEL_TYPES: dict[str, type] = {
    "view_dropout": float,
    "view_loss": float,
    "standalone_view": bool,
    "dropout": float,
    "hidden_width": int,
    "activation": str,
    "objective": str,
    "mix": str,
    "normalize": bool,
}
LABEL_COLUMN = "label_column"
TYPES: dict[str, type] = {**OPTION_TYPES, **MODEL_TYPES, LABEL_COLUMN: str}
NAMES_OF_TYPES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
MAX_CONFIGURATIONS = 1000


@dataclass(frozen=True)
class Configuration:
    """One configuration: its name, and the settings in which it differs from the command line's."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """Those of its settings that belong to TrainingOptions."""
        return {key: value for key, value in self.settings.items() if key in OPTION_TYPES}

    def model(self) -> dict[str, Any]:
        """Those that belong to LeviConfig; a ``hidden_width`` of 0 makes the adapting layers linear."""
        found = {key: value for key, value in self.settings.items() if key in MODEL_TYPES}
        if "hidden_width" in found:
            found["hidden_width"] = found["hidden_width"] or None
        return found

    @property
    def label_column(self) -> str | None:
        return self.settings.get(LABEL_COLUMN)


def read_sweep(path: str | Path) -> list[Configuration]:
    """Read and check a sweep file.

    Raises:
        DataError: no such file, no YAML, or a key or value that has no place in it; the message names it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--sweep: {path} cannot be read: {error}") from error
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"--sweep: {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_sweep(document)
    except DataError as error:
        raise DataError(f"--sweep: {path}: {error}") from error


def parse_sweep(document: Any) -> list[Configuration]:
    """The configurations of a sweep file's content.

    Raises:
        DataError: see :func:`read_sweep`.
    """
    if not isinstance(document, Mapping) or not document:
        raise DataError(
            f"expected settings with lists of values, or 'configurations' with a list, got {_shown(document)}"
        )
    if "configurations" in document:
        others = [str(key) for key in document if key != "configurations"]
        if others:
            raise DataError(f"'configurations' stands alone, got {', '.join(others)} beside it")
        return _listed(document["configurations"])
    return _grid(document)


def _grid(document: Mapping[Any, Any]) -> list[Configuration]:
    axes: dict[str, list[Any]] = {}
    for key, given in document.items():
        values = given if isinstance(given, list) else [given]
        if not values:
            raise DataError(f"{key}: expected at least one value, got an empty list")
        axes[_known(key)] = [_value(key, value) for value in values]
        for value in axes[key]:
            if axes[key].count(value) > 1:
                raise DataError(f"{key}: {value!r} is listed twice")
    count = 1
    for values in axes.values():
        count *= len(values)
    _check_count(count)
    varied = [key for key, values in axes.items() if len(values) > 1] or list(axes)
    found = []
    for combination in itertools.product(*axes.values()):
        settings = dict(zip(axes, combination, strict=True))
        found.append(Configuration(", ".join(f"{key}={settings[key]}" for key in varied), settings))
    return found


def _listed(given: Any) -> list[Configuration]:
    if not isinstance(given, list) or not given:
        raise DataError(f"configurations: expected a list with at least one, got {_shown(given)}")
    _check_count(len(given))
    found: list[Configuration] = []
    names: dict[str, int] = {}
    for place, entry in enumerate(given, start=1):
        where = f"configuration {place}"
        if not isinstance(entry, Mapping):
            raise DataError(f"{where}: expected settings and a name, got {_shown(entry)}")
        settings = {}
        for key, value in entry.items():
            if key == "name":
                continue
            try:
                settings[_known(key)] = _value(key, value)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        default = ", ".join(f"{key}={value}" for key, value in settings.items()) or f"configuration {place}"
        name = entry.get("name", default)
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"{where}: name: expected a text, got {_shown(name)}")
        if name in names:
            raise DataError(f"{where}: the name {name!r} is configuration {names[name]}'s already")
        names[name] = place
        found.append(Configuration(name, settings))
    return found


def _known(key: Any) -> str:
    if key in TYPES:
        return str(key)
    close = difflib.get_close_matches(str(key), TYPES, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(TYPES)}"
    raise DataError(f"unknown setting {key!r}{hint}")


def _value(key: Any, value: Any) -> Any:
    kind = TYPES[_known(key)]
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3, without a point, as a text
        try:
            return float(value)
        except ValueError:
            pass
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise DataError(f"{key}: expected {NAMES_OF_TYPES[kind]}, got {_shown(value)}")
    return float(value) if kind is float else value


def _check_count(count: int) -> None:
    if count > MAX_CONFIGURATIONS:
        raise DataError(f"{count} configurations; expected at most {MAX_CONFIGURATIONS}")


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Sequence) and not isinstance(value, str) and not value:
        return "an empty list"
    return repr(value)
