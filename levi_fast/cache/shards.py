"""What a shard holds: taps as float32, bfloat16, or int8 with one scale per tap of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from levi_fast.errors import DataError

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def encode(taps: Tensor, dtype: str, widths: Sequence[int]) -> dict[str, Tensor]:
    """Taps as they are stored.

    Args:
        taps: float32 ``[n, sum of widths]``, contiguous, on the CPU.
        dtype: "float32", "bfloat16" or "int8".
        widths: of every tap.

    Returns:
        ``taps`` ``[n, sum of widths]`` of that dtype, and for int8 ``scales`` float32 ``[n, L]``: a tap is
        ``scale * int8``, with the scale that brings its largest absolute value to 127.

    Raises:
        DataError: int8 of numbers that are not finite.
    """
    if dtype != "int8":
        return {"taps": taps.to(TORCH_DTYPES[dtype])}
    scales = torch.stack([tap.abs().amax(1) for tap in taps.split(list(widths), dim=1)], dim=1) / 127
    if not torch.isfinite(scales).all():
        raise DataError("the backbone gave taps that are not finite: they cannot be stored as int8")
    steps = taps / torch.where(scales > 0, scales, 1.0)[:, tap_of_column(widths)]
    return {"taps": steps.round_().clamp_(-127, 127).to(torch.int8), "scales": scales}


def decode(stored: Mapping[str, Tensor], columns: Tensor) -> Tensor:
    """The inverse of :func:`encode`: float32 ``[n, sum of widths]``.

    Args:
        stored: rows of a shard's tensors.
        columns: :func:`tap_of_column` of the widths.
    """
    taps = stored["taps"].to(torch.float32)
    return taps * stored["scales"][:, columns] if "scales" in stored else taps


def tap_of_column(widths: Sequence[int]) -> Tensor:
    """Which tap each column belongs to, int64 ``[sum of widths]``."""
    return torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(list(widths)))


def check_tensors(tensors: Mapping[str, Tensor], count: int, dtype: str, widths: Sequence[int], where: str) -> None:
    """Check names, shapes and dtypes of a shard's tensors.

    Raises:
        DataError: if they are not those of :func:`encode`.
    """
    expected = {"taps": (TORCH_DTYPES[dtype], [count, sum(widths)])}
    if dtype == "int8":
        expected["scales"] = (torch.float32, [count, len(widths)])
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise DataError(f"{where}: expected the tensors {expected}, got {found}")
