"""What a config.json from elsewhere may say: types and bounds, looked at before anything is built from it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from levi_fast.errors import DataError

MAX_BYTES = 64 * 2**20  # of a JSON file: a label map with a million names fits
MAX_SIZE = 100_000_000  # of a width, a vocabulary, a number of labels or positions
MAX_LAYERS = 10_000
MAX_DEPTH = 16

_TEXTS = ("backbone", "backbone_fingerprint", "backbone_dtype", "backbone_layers", "problem_type")
_NAMES = ("pooling", "activation", "mix", "objective")
_NUMBERS = ("dropout", "view_dropout", "view_loss", "blend", "view_blend", "target_mean", "target_std")
_COUNTS = ("layers", "blocks", "depth", "depths", "heads", "layer", "head")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        DataError: it is too large, no JSON, nested too deep, or no object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: expected at most {MAX_BYTES} bytes of JSON, got {size}")
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error
    except (RecursionError, ValueError) as error:  # a number of more digits than Python converts is a ValueError
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot be read as JSON: nested too deep, or a number too long") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def check_levi_config(document: Mapping[str, Any], where: str = "config.json") -> None:
    """Refuse a LEVI config whose fields have wrong types or absurd sizes.

    Raises:
        DataError: naming ``where``, the field, what was expected and what came.
    """
    for name in _TEXTS:
        _require(where, name, document.get(name) is None or isinstance(document[name], str), "text", document)
    for name in _NAMES:
        _require(where, name, isinstance(document.get(name, ""), str), "text", document)
    for name in _NUMBERS:
        _require(where, name, _is_number(document.get(name, 0.5)), "a finite number", document)
    for name, least in (("hidden_width", 1), ("view_width", 0), ("num_labels", 1)):
        value = document.get(name)
        fits = value is None or _is_int(value, least, MAX_SIZE)
        _require(where, name, fits, f"an integer from {least} to {MAX_SIZE}", document)
    for name, most in (("tap_layers", MAX_LAYERS), ("tap_widths", MAX_SIZE)):
        value = document.get(name)
        fits = value is None or (
            isinstance(value, list) and 0 < len(value) <= MAX_LAYERS and all(_is_int(one, 0, most) for one in value)
        )
        _require(where, name, fits, f"a list of integers from 0 to {most}", document)
    layers, widths = document.get("tap_layers"), document.get("tap_widths")
    if layers is not None:
        _require(where, "tap_layers", all(a < b for a, b in itertools.pairwise(layers)), "ascending", document)
        _require(
            where, "tap_widths", widths is not None and len(widths) == len(layers), "one per tap layer", document
        )
    taps = document.get("taps", "all")
    fits = isinstance(taps, str) or (
        isinstance(taps, list) and len(taps) <= MAX_LAYERS and all(_is_int(t, -MAX_LAYERS, MAX_LAYERS) for t in taps)
    )
    _require(where, "taps", fits, "text or a list of layer indices", document)
    for name in ("normalize", "standalone_view"):
        _require(where, name, isinstance(document.get(name, True), bool), "true or false", document)
    selection = document.get("tap_selection")
    _require(where, "tap_selection", selection is None or isinstance(selection, dict), "an object or null", document)
    check_sizes(selection, f"{where}: tap_selection")
    spec = document.get("task_model")
    _require(where, "task_model", spec is None or isinstance(spec, dict), "an object or null", document)
    check_sizes(spec, f"{where}: task_model")
    _check_labels(document, where)


def check_sizes(value: Any, where: str, depth: int = 0, *, finite: bool = True) -> None:
    """Refuse absurd numbers anywhere in a description of a model.

    Args:
        value: what JSON gave.
        where: named in the message.
        depth: of the nesting so far.
        finite: also refuse NaN and infinities.

    Raises:
        DataError: an integer beyond :data:`MAX_SIZE` (:data:`MAX_LAYERS` for numbers of layers and heads), a number
            that is not finite, a list that is too long, nesting that is too deep.
    """
    if depth > MAX_DEPTH:
        raise DataError(f"{where[:200]}: expected at most {MAX_DEPTH} levels of nesting")
    if isinstance(value, dict):
        for name, item in value.items():
            check_sizes(item, f"{where}.{name}", depth + 1, finite=finite)
    elif isinstance(value, list):
        if len(value) > MAX_LAYERS:
            raise DataError(f"{where}: expected at most {MAX_LAYERS} entries, got {len(value)}")
        for item in value:
            check_sizes(item, where, depth + 1, finite=finite)
    elif finite and isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: expected a finite number, got {value}")
    elif isinstance(value, int):
        counts = where.rsplit(".", 1)[-1].rsplit("_", 1)[-1] in _COUNTS
        most = MAX_LAYERS if counts else MAX_SIZE
        if abs(value) > most:
            raise DataError(f"{where}: expected at most {most}, got {_brief(value)}")


def _check_labels(document: Mapping[str, Any], where: str) -> None:
    names = document.get("id2label")
    if names is None:
        return
    _require(where, "id2label", isinstance(names, dict) and bool(names), "an object with names", document)
    wanted = [str(place) for place in range(len(names))]
    if [str(key) for key in names] != wanted and sorted(map(str, names)) != sorted(wanted):
        raise DataError(f"{where}: id2label: expected the ids 0 to {len(names) - 1}, got {_brief(list(names))}")
    if not all(isinstance(name, str) for name in names.values()):
        raise DataError(f"{where}: id2label: expected names as text, got {_brief(list(names.values()))}")
    if len(set(names.values())) != len(names):
        raise DataError(f"{where}: id2label: expected different names, got {_brief(list(names.values()))}")
    count = document.get("num_labels")
    if count is not None and count != len(names):
        raise DataError(f"{where}: id2label: expected num_labels={count} names, got {len(names)}")
    inverse = document.get("label2id")
    if inverse is not None and inverse != {name: int(key) for key, name in names.items()}:
        raise DataError(f"{where}: label2id: expected the inverse of id2label, got {_brief(inverse)}")


def _require(where: str, name: str, fits: bool, expected: str, document: Mapping[str, Any]) -> None:
    if not fits:
        raise DataError(f"{where}: {name}: expected {expected}, got {_brief(document.get(name))}")


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    # The bound comes first: an integer beyond what a float holds cannot be tested for being finite.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def _brief(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
