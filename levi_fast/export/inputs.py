"""Which tensors an exported model takes, in which order, with which dynamic dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from levi_fast.errors import DataError
from levi_fast.layers import keyword_names
from levi_fast.modeling import LeviModel

BATCH, SEQUENCE, HISTORY = "batch", "sequence", "history"
_DTYPES = {"int64": torch.int64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_EXAMPLE = {BATCH: 3, SEQUENCE: 8, HISTORY: 5}  # none of them 0 or 1, which a tracer would take for constants


@dataclass(frozen=True)
class InputSpec:
    """One argument of an exported model.

    Attributes:
        name: keyword of the LEVI model.
        dtype: "int64", "float32", ...
        shape: of each dimension its size, or the name of a dynamic one: "batch", "sequence", "history".
        upper: exclusive bound of the integers in it, or None.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    upper: int | None = None

    def example(self, sizes: dict[str, int], seed: int = 0) -> Tensor:
        """Random values for these sizes of the dynamic dimensions; masks keep a different number of tokens a row."""
        shape = [size if isinstance(size, int) else sizes[size] for size in self.shape]
        generator = torch.Generator().manual_seed(seed + len(self.name))
        if self.name.endswith("mask"):
            kept = torch.randint(1, max(shape[1], 1) + 1, (shape[0], 1), generator=generator)
            return (torch.arange(shape[1])[None] < kept).to(_DTYPES[self.dtype])
        if self.dtype == "int64":
            return torch.randint(0, self.upper or 2, shape, generator=generator)
        return torch.randn(shape, generator=generator).to(_DTYPES[self.dtype])


def example_sizes() -> dict[str, int]:
    """Sizes of the dynamic dimensions to trace with."""
    return dict(_EXAMPLE)


def task_inputs(model: LeviModel) -> list[InputSpec]:
    """What the task model reads.

    Raises:
        DataError: a task model of the user's own, whose inputs no specification tells.
    """
    if model.task_model is None:
        return []
    spec = dict(model.config.task_model or {})
    kind = spec.get("type")
    if kind == "custom":
        names, takes_all = keyword_names(model.task_model)
        if takes_all or not names <= {"input_ids", "attention_mask", "pixel_values"}:
            raise DataError(
                f"task_model: {type(model.task_model).__name__} takes {sorted(names)}; of a module of your own only "
                "input_ids, attention_mask and pixel_values can be exported"
            )
        return [one for one in [*_text(model), _pixels(model)] if one.name in names]
    if kind == "text":
        return _text(model)
    if kind == "tabular":
        return _tabular(spec)
    if kind == "table":
        return (_text(model) if spec.get("text") else []) + (_tabular(spec["tabular"]) if spec.get("tabular") else [])
    if kind == "recommendation":
        features = int(spec["num_features"])
        return [
            InputSpec("history_features", "float32", (BATCH, HISTORY, features)),
            InputSpec("history_ratings", "float32", (BATCH, HISTORY)),
            InputSpec("history_mask", "int64", (BATCH, HISTORY)),
            InputSpec("target_features", "float32", (BATCH, features)),
        ]
    return [_pixels(model)]


def model_inputs(model: LeviModel) -> list[InputSpec]:
    """What the backbone reads (a text's ids and mask, or an image), then what the task model reads beside it."""
    backbone: list[InputSpec] = []
    if model.extractor is not None:
        backbone = _text(model) if model.extractor.accepts("input_ids") else [_pixels(model)]
    known = {one.name for one in backbone}
    return backbone + [one for one in task_inputs(model) if one.name not in known]


def head_inputs(model: LeviModel) -> list[InputSpec]:
    """Pooled taps (of a model of tokens, those of every token), then what the task model reads.

    Raises:
        DataError: a model without taps.
    """
    widths = list(model.ensemble.tap_widths)
    if not any(widths):
        raise DataError("--head-only: this model has no backbone (taps='none'), so that the whole is its head")
    dtype = str(model.ensemble.bias.dtype).removeprefix("torch.")
    equal = len(set(widths)) == 1
    rows = (BATCH, SEQUENCE) if model.config.pooling == "token" else (BATCH,)
    shape: tuple[int | str, ...] = (len(widths), *rows, widths[0]) if equal else (*rows, sum(widths))
    return [InputSpec("taps", dtype, shape), *task_inputs(model)]


def longest_sequence(model: LeviModel, processor_limit: int | None = None) -> int:
    """The most tokens that an artefact takes: the least of what backbone, task model and tokenizer allow."""
    backbone: Any = getattr(model.backbone, "config", None)
    spec = dict(model.config.task_model or {})
    spec = dict(spec.get("text") or {}) if spec.get("type") == "table" else spec
    text: Any = getattr(model.task_model, "text", model.task_model)
    limits = [
        getattr(backbone, "max_position_embeddings", None),
        getattr(text, "max_positions", None),
        processor_limit,
    ]
    found = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(found, default=4096)


def _text(model: LeviModel) -> list[InputSpec]:
    spec = dict(model.config.task_model or {})
    inner = dict(spec.get("text") or {}) if spec.get("type") == "table" else spec
    sizes = [getattr(getattr(model.backbone, "config", None), "vocab_size", None), inner.get("vocab_size")]
    upper = min((size for size in sizes if isinstance(size, int)), default=2)
    return [
        InputSpec("input_ids", "int64", (BATCH, SEQUENCE), upper),
        InputSpec("attention_mask", "int64", (BATCH, SEQUENCE)),
    ]


def _tabular(spec: dict[str, Any]) -> list[InputSpec]:
    cardinalities = list(spec.get("cardinalities") or [])
    numeric = int(spec.get("num_numeric") or 0)
    found = [InputSpec("numeric", "float32", (BATCH, numeric))] if numeric else []
    if cardinalities:
        found.append(InputSpec("categorical", "int64", (BATCH, len(cardinalities)), min(cardinalities)))
    return found


def _pixels(model: LeviModel) -> InputSpec:
    config: Any = getattr(model.backbone, "config", None)
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return InputSpec("pixel_values", "float32", (BATCH, int(getattr(config, "num_channels", 3)), height, width))
