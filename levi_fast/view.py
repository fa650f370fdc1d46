"""LEVI's second view as a LeviModel sees it: building the task model, its width, the inputs it reads."""

from __future__ import annotations

from typing import Any

from torch import nn

from levi_fast.config import LeviConfig


def task_model_of(config: LeviConfig) -> nn.Module | None:
    """The task model that a config specifies, newly initialised; None where it specifies none.

    Raises:
        ValueError: it was the user's own module, or the specification is wrong.
    """
    if config.task_model is None:
        return None
    if config.task_model.get("type") == "custom":
        raise ValueError("task_model: this model was built with the user's own module; pass task_model=")
    from levi_fast.task_models import build_task_model

    return build_task_model(config.task_model)


def token_spec(spec: dict[str, Any], pooling: str) -> dict[str, Any]:
    """A task model's specification as ``pooling`` needs it: the text model's view is per token with "token".

    Raises:
        ValueError: a task model that has no view per token.
    """
    if pooling != "token":
        return spec
    if spec.get("type") != "text":
        raise ValueError(f"task_model: pooling='token' needs a view per token, which {spec.get('type')!r} has not")
    return {**spec, "per_token": True}


def view_width_for(task_model: nn.Module, configured: int) -> int:
    """V: the module's own ``view_width``, else the configured one.

    Raises:
        ValueError: neither says.
    """
    width = getattr(task_model, "view_width", None) or configured
    if not width:
        raise ValueError(
            f"task_model: {type(task_model).__name__} has no view_width; set it, or LeviConfig(view_width=...)"
        )
    return int(width)
