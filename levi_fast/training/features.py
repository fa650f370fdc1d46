"""Precomputed taps: the backbone is frozen, so each text crosses it once, however many epochs follow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from levi_fast.cache import CachedTaps
from levi_fast.data.batching import length_batches
from levi_fast.data.encoded import EncodedDataset
from levi_fast.modeling import LeviModel

Progress = Callable[[int, int], None]


def precompute_unique_taps(
    model: LeviModel, dataset: EncodedDataset, *, batch_size: int = 32, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Run every distinct text of a data set through the frozen backbone, in batches of like length.

    The batches depend on the data set alone, so the same file gives the same bits in another process.

    Args:
        model: with its backbone; its device is used.
        dataset: with token ids.
        batch_size: texts per forward pass.
        progress: called with (texts done, texts in all).

    Returns:
        taps float32 ``[U, sum of tap widths]`` on the CPU, and int64 ``[N]``: which of the U each row uses.
    """
    first, which = dataset.unique_inputs()
    device = next(model.parameters()).device
    taps: Tensor | None = None
    done = 0
    for places in length_batches(dataset.lengths[first].tolist(), batch_size):
        inputs = dataset.backbone_inputs(torch.tensor([first[place] for place in places]))
        with torch.no_grad():
            pooled = model.extract_taps(**{name: value.to(device) for name, value in inputs.items()}).float().cpu()
        if taps is None:
            taps = torch.empty(len(first), pooled.shape[1])
        taps[torch.tensor(places)] = pooled
        done += len(places)
        if progress is not None:
            progress(done, len(first))
    if taps is None:
        raise ValueError(f"{dataset.name}: expected at least one row")
    return taps, which


def precompute_taps(
    model: LeviModel, dataset: EncodedDataset, *, batch_size: int = 32, progress: Progress | None = None
) -> Tensor:
    """As :func:`precompute_unique_taps`, one row per row of the data set: float32 ``[N, sum of tap widths]``."""
    taps, which = precompute_unique_taps(model, dataset, batch_size=batch_size, progress=progress)
    return taps[which]


def slice_taps(
    taps: Tensor | CachedTaps, layers: list[int], widths: list[int], wanted: list[int]
) -> Tensor | CachedTaps:
    """From taps of many layers, ``[N, sum of widths]``, those of some: how methods share one pass of the backbone.

    Raises:
        ValueError: a wanted layer is not among ``layers``.
    """
    missing = sorted(set(wanted) - set(layers))
    if missing:
        raise ValueError(f"layers: expected some of {layers}, got {missing}")
    if list(wanted) == list(layers):
        return taps
    if isinstance(taps, CachedTaps):
        return taps.select(wanted)
    columns = dict(zip(layers, torch.split(taps, widths, dim=1), strict=True))
    return torch.cat([columns[layer] for layer in wanted], dim=1)
