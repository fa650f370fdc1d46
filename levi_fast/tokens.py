"""Token-level LEVI: every token of every text is an example to the ensemble."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from levi_fast.modules import EnsembleOutput


def flat_tokens(
    inputs: dict[str, Any], taps: Tensor | None, view: Tensor | None, labels: Tensor | None
) -> tuple[tuple[int, int], Tensor | None, Tensor | None, Tensor | None]:
    """The shape (B, T) of a batch, and its taps [B, T, D], view [B, T, V] and labels [B, T] as B * T examples.

    Raises:
        ValueError: neither ``input_ids`` nor taps to tell the shape by, or taps, a view or labels of another shape;
            names which.
    """
    ids = inputs.get("input_ids")
    if taps is not None and (taps.dim() != 3 or (ids is not None and taps.shape[:2] != ids.shape)):
        batch = "B, T" if ids is None else ", ".join(map(str, ids.shape))
        raise ValueError(f"taps: expected a row per token, [{batch}, sum of the widths], got {list(taps.shape)}")
    if ids is None and taps is not None:
        ids = taps[..., 0]
    if ids is None or ids.dim() != 2:
        raise ValueError("input_ids: pooling='token' expects them, [B, T]")
    shape = (int(ids.shape[0]), int(ids.shape[1]))
    taps = None if taps is None else taps.flatten(0, 1)
    if view is not None:
        if view.dim() != 3 or tuple(view.shape[:2]) != shape:
            raise ValueError(
                f"task_model: expected a view per token, [{shape[0]}, {shape[1]}, V], got {list(view.shape)}"
            )
        view = view.flatten(0, 1)
    if labels is not None:
        if tuple(labels.shape) != shape or labels.is_floating_point():
            raise ValueError(f"labels: expected {list(shape)} int64 classes, got {list(labels.shape)} {labels.dtype}")
        labels = labels.flatten()
    return shape, taps, view, labels


def by_token(output: EnsembleOutput, shape: tuple[int, int]) -> EnsembleOutput:
    """An output over B * T examples as one over (B, T): [..., B * T, C] -> [..., B, T, C]."""
    parts = [None if part is None else part.unflatten(-2, shape) for part in output]
    return EnsembleOutput(*cast(Any, parts))
