"""What the small from-scratch task models share: the spec, argument checks, masked averages."""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class TaskModel(nn.Module):
    """A small model trained from scratch: LEVI's second *view* (Roh et al. 2024, arXiv 2402.04644).

    ``forward`` takes keyword tensors and returns ``[B, view_width]``. Any ``nn.Module`` with that forward and
    an integer ``view_width`` serves as a task model; this base class adds the JSON-able ``spec`` with which
    :func:`levi_fast.task_models.build_task_model` rebuilds the same architecture (weights not included).
    """

    type_name: ClassVar[str]
    view_width: int

    def __init__(self, view_width: int, **settings: Any) -> None:
        super().__init__()
        self.view_width = require_int("view_width", view_width)
        self._spec = {"type": self.type_name, "view_width": view_width, **settings}

    @property
    def spec(self) -> dict[str, Any]:
        """``{"type": name, **constructor arguments}``, JSON-able, every argument written out."""
        return copy.deepcopy(self._spec)


def require_int(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer >= ``minimum``; otherwise raise ``ValueError`` naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}: expected an integer >= {minimum}, got {value!r}")
    return value


def require_fraction(name: str, value: Any) -> float:
    """Return ``value`` as a float if it lies in [0, 1); otherwise raise ``ValueError`` naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return float(value)


def require_finite(name: str, value: Any, *, positive: bool = False) -> float:
    """Return ``value`` as a float if it is finite (and positive, if asked), else raise ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if positive and value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return float(value)


def require_shape(name: str, tensor: Tensor | None, *sizes: int | None) -> Tensor:
    """Return ``tensor`` if its shape matches ``sizes`` (``None``: any size), else raise ``ValueError``."""
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"
    if tensor is None:
        raise ValueError(f"{name}: expected a tensor of shape {wanted}, got None")
    matches = tensor.dim() == len(sizes) and all(
        size is None or size == actual for size, actual in zip(sizes, tensor.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name}: expected shape {wanted}, got {list(tensor.shape)}")
    return tensor


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average ``hidden [B, T, D]`` where ``mask [B, T]`` is true; a row without any gives zeros.

    What stands at masked positions has no influence, not even NaN.
    """
    kept = mask.unsqueeze(-1)
    total = torch.where(kept, hidden, hidden.new_zeros(())).sum(dim=1)
    return total / mask.sum(dim=1, keepdim=True).clamp(min=1).to(total.dtype)


def perceptron(in_width: int, hidden_width: int, out_width: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, dropout, Linear."""
    return nn.Sequential(
        nn.Linear(in_width, hidden_width), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden_width, out_width)
    )
