"""Backbones in fewer bits: bfloat16, or int8 by torch's dynamic quantisation. A frozen backbone allows both.

int8 keeps every linear layer's weight as int8 with one scale per output row, and quantises its input as it comes,
with one scale for the whole batch: an example's taps then depend a little on the batch it is in. Nothing is
calibrated.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from levi_fast.errors import DataError

BACKBONE_DTYPES = ("float32", "bfloat16", "int8")


def check_backbone_dtype(name: str | None, argument: str = "backbone_dtype") -> None:
    """Raise ValueError, naming the argument, unless it is None or one of :data:`BACKBONE_DTYPES`."""
    if name is not None and name not in BACKBONE_DTYPES:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKBONE_DTYPES)}, got {name!r}")


def quantize_int8(backbone: nn.Module) -> nn.Module:
    """A copy of a float32 backbone with its linear layers in int8, in eval mode; it runs on the CPU alone.

    Raises:
        DataError: if this torch has no dynamic quantisation, or the backbone has no linear layer to quantise.
    """
    quantization: Any = getattr(torch.ao, "quantization", None)
    if quantization is None or not hasattr(quantization, "quantize_dynamic"):
        raise DataError(f"backbone_dtype: torch {torch.__version__} has no dynamic int8 quantisation; use bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, whose int8 is no faster than fp32 on a CPU
        quantized: nn.Module = quantization.quantize_dynamic(
            copy.deepcopy(backbone), {nn.Linear: quantization.per_channel_dynamic_qconfig}, inplace=True
        )
    if not _is_int8(quantized):
        raise DataError("backbone_dtype: int8 quantises linear layers (nn.Linear), and this backbone has none")
    return quantized.eval()


def backbone_dtype(backbone: nn.Module) -> str | None:
    """The name in :data:`BACKBONE_DTYPES` that says how a backbone's weights are kept; None for a mixture or another.

    That is what ``load_backbone`` needs in order to load the same weights again.
    """
    if _is_int8(backbone):
        return "int8"
    found = {parameter.dtype for parameter in backbone.parameters() if parameter.is_floating_point()}
    name = str(found.pop()).removeprefix("torch.") if len(found) == 1 else None
    return name if name in BACKBONE_DTYPES else None


def _is_int8(backbone: nn.Module) -> bool:
    return any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in backbone.modules())
