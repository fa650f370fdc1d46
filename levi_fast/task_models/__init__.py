"""Small models trained from scratch: LEVI's second view, one file per kind of input.

A task model is any ``nn.Module`` with an integer ``view_width`` whose forward takes keyword tensors and
returns ``[B, view_width]``. Those here also carry a JSON-able ``spec``, from which :func:`build_task_model`
rebuilds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from .base import TaskModel
from .image import ImageTaskModel
from .recommendation import RecommendationTaskModel
from .table import TableTaskModel
from .tabular import TabularTaskModel
from .text import TextTaskModel

TASK_MODELS: dict[str, type[TaskModel]] = {
    model.type_name: model
    for model in (TextTaskModel, TabularTaskModel, TableTaskModel, RecommendationTaskModel, ImageTaskModel)
}


def build_task_model(spec: Mapping[str, Any]) -> nn.Module:
    """Build a task model from its spec; weights come from torch's global random generator.

    Args:
        spec: ``{"type": name, **constructor arguments}``, as a module's ``.spec`` gives it.

    Returns:
        the module, with ``view_width`` and ``spec``.

    Raises:
        TypeError: ``spec`` is not a mapping.
        ValueError: the type is missing or unknown, an argument is unknown, missing or out of range; the
            message names it and lists what is known.
    """
    if not isinstance(spec, Mapping):
        raise TypeError(f"spec: expected a mapping such as {{'type': 'text', ...}}, got {spec!r}")
    known = ", ".join(TASK_MODELS)
    if "type" not in spec:
        raise ValueError(f"spec: expected a 'type' (one of {known}), got keys {sorted(map(str, spec))}")
    arguments = {str(name): value for name, value in spec.items() if name != "type"}
    kind = spec["type"]
    if kind == "custom":
        raise ValueError(
            "type: 'custom' stands for a module of your own, which no spec rebuilds; pass the module itself"
        )
    if not isinstance(kind, str) or kind not in TASK_MODELS:
        raise ValueError(f"type: expected one of {known}, got {kind!r}")
    _check_arguments(kind, TASK_MODELS[kind], arguments)
    for part in ("text", "tabular"):
        if kind == "table" and isinstance(arguments.get(part), Mapping):
            inner = {name: value for name, value in arguments[part].items() if name != "type"}
            _check_arguments(f"table's {part} part", TASK_MODELS[part], inner)
    return TASK_MODELS[kind](**arguments)


def view_width_of(module: nn.Module) -> int:
    """Return the module's ``view_width``, the width of the view it puts out.

    Raises:
        ValueError: the module has no positive integer ``view_width``.
    """
    width = getattr(module, "view_width", None)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(
            f"task_model: expected a module with an integer view_width >= 1 (its output's width), "
            f"got {type(module).__name__} with view_width={width!r}"
        )
    return width


def _check_arguments(kind: str, model: type[TaskModel], arguments: Mapping[str, Any]) -> None:
    parameters = inspect.signature(model).parameters
    unknown = [name for name in arguments if name not in parameters]
    if unknown:
        raise ValueError(f"task model {kind}: unknown argument {unknown[0]!r}; known are {', '.join(parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in arguments:
            raise ValueError(f"task model {kind}: argument {name!r} is missing; it has no default")


__all__ = [
    "TASK_MODELS",
    "ImageTaskModel",
    "RecommendationTaskModel",
    "TableTaskModel",
    "TabularTaskModel",
    "TaskModel",
    "TextTaskModel",
    "build_task_model",
    "view_width_of",
]
