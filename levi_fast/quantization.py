"""Backbones in fewer bits: bfloat16, int8 or int4. A frozen backbone allows all three.

int8 (torch's dynamic quantisation) keeps every linear layer's weight as int8 with one scale per output row, and
quantises its input as it comes, with one scale for the whole batch: an example's taps then depend a little on the
batch it is in. int4 (torchao's weight-only quantisation) keeps four bits a weight, with a scale and an offset for
every :data:`GROUP` weights of a row, and computes in bfloat16. Nothing is calibrated. Both run on the CPU alone.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from levi_fast.errors import DataError

BACKBONE_DTYPES = ("float32", "bfloat16", "int8", "int4")
QUANTIZED = ("int8", "int4")  # run on the CPU alone, cannot be trained, traced or saved as a transformers model
LOADED_AS: dict[str, Any] = {"int8": torch.float32, "int4": torch.bfloat16}  # before they are quantised

GROUP = 32  # weights that share a scale and an offset in int4; the fewest that the kernel takes
_ROWS = 16  # output rows that the kernel packs together at least

# Buffer of an int4 layer: a digest of the weight before it was quantised. How the kernel packs its four bits differs
# from CPU to CPU, and a fingerprint must not.
SOURCE = "weight_source"


def check_backbone_dtype(name: str | None, argument: str = "backbone_dtype") -> None:
    """Raise ValueError, naming the argument, unless it is None or one of :data:`BACKBONE_DTYPES`."""
    if name is not None and name not in BACKBONE_DTYPES:
        raise ValueError(f"{argument}: expected one of {', '.join(BACKBONE_DTYPES)}, got {name!r}")


def quantize(backbone: nn.Module, dtype: Any) -> nn.Module:
    """A freshly loaded backbone as ``load_backbone``'s ``dtype`` asks for it: itself unless that is int8 or int4."""
    if dtype == "int8":
        return quantize_int8(backbone, inplace=True)
    return quantize_int4(backbone) if dtype == "int4" else backbone


def quantize_int8(backbone: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of a float32 backbone with its linear layers in int8, in eval mode; it runs on the CPU alone.

    Args:
        backbone: a module with linear layers.
        inplace: quantise the backbone itself, which takes the memory of no copy.

    Raises:
        DataError: if this torch has no dynamic quantisation, or the backbone has no linear layer to quantise.
    """
    quantization: Any = getattr(torch.ao, "quantization", None)
    if quantization is None or not hasattr(quantization, "quantize_dynamic"):
        raise DataError(f"backbone_dtype: torch {torch.__version__} has no dynamic int8 quantisation; use bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, whose int8 is no faster than fp32 on a CPU
        quantized: nn.Module = quantization.quantize_dynamic(
            backbone, {nn.Linear: quantization.per_channel_dynamic_qconfig}, inplace=inplace
        )
    if not _is_int8(quantized):
        raise DataError("backbone_dtype: int8 quantises linear layers (nn.Linear), and this backbone has none")
    return quantized.eval()


def quantize_int4(backbone: nn.Module) -> nn.Module:
    """Put a bfloat16 backbone's linear layers into int4, in place; it runs on the CPU alone.

    A layer whose width is no multiple of :data:`GROUP`, or its outputs none of 16, stays in bfloat16.

    Raises:
        DataError: torchao, or its int4 for the CPU, is not there; or the backbone has no linear layer that fits.
    """
    try:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import quantize_
    except ImportError as error:
        raise DataError(
            f"backbone_dtype: int4 needs torchao 0.18 or a later one with its int4 for the CPU ({error}): "
            "pip install levi_fast[int4]"
        ) from error
    layers = [
        layer
        for layer in backbone.modules()
        if type(layer) is nn.Linear and layer.in_features % GROUP == 0 and layer.out_features % _ROWS == 0
    ]
    if not layers:
        raise DataError(
            f"backbone_dtype: int4 quantises linear layers (nn.Linear) whose width is a multiple of {GROUP}, and "
            "this backbone has none"
        )
    for layer in layers:
        digest = bytearray.fromhex(tensor_digest(layer.weight))
        layer.register_buffer(SOURCE, torch.frombuffer(digest, dtype=torch.uint8))
    settings = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    quantize_(backbone, settings, filter_fn=lambda module, _name: hasattr(module, SOURCE))
    return backbone.eval()


def backbone_dtype(backbone: nn.Module) -> str | None:
    """The name in :data:`BACKBONE_DTYPES` that says how a backbone's weights are kept; None for a mixture or another.

    That is what ``load_backbone`` needs in order to load the same weights again.
    """
    if _is_int8(backbone):
        return "int8"
    if any(hasattr(module, SOURCE) for module in backbone.modules()):
        return "int4"
    found = {parameter.dtype for parameter in backbone.parameters() if parameter.is_floating_point()}
    name = str(found.pop()).removeprefix("torch.") if len(found) == 1 else None
    return name if name in BACKBONE_DTYPES else None


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and numbers, in hexadecimal."""
    data = tensor.detach().cpu().contiguous()
    header = f"{data.dtype}{list(data.shape)}".encode()
    digest = hashlib.sha256(header)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_int8(backbone: nn.Module) -> bool:
    return any(type(module).__module__.startswith("torch.ao.nn.quantized") for module in backbone.modules())
