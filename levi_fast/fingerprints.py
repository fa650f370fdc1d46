"""Fingerprints of backbones: whether a model meets the weights that it was trained on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from levi_fast.layers import stack_path
from levi_fast.offloading import stored_weight, tied_names
from levi_fast.quantization import SOURCE, tensor_digest


def fingerprint(backbone: nn.Module, layers: Sequence[nn.Module], last_tap: int) -> str:
    """Digest of the weights that the taps depend on: "type:dtype:sha256".

    It covers every parameter and persistent buffer of the backbone except the layers above ``last_tap`` and what
    is registered after the stack of layers (pooler, final norm, head): the taps do not see those, and a head
    that a checkpoint lacks is filled at random on each load. Names do not enter it, so that a renamed module in
    a later transformers release changes nothing; the weights' dtype does. Of a quantised backbone it covers the
    integers, their scales and the biases: what training saw, not the checkpoint they were made from.
    (``load_backbone``'s int4 is packed differently on different CPUs: the weights that it was made from stand for the
    integers there.)

    Weights that accelerate has offloaded are read one by one, at most as many at a time as there are threads; the
    fingerprint is that of the same backbone in memory.

    Args:
        backbone: the module that holds ``layers``.
        layers: its stack of layers, as :func:`levi_fast.layers.find_layers` gives it.
        last_tap: index of the last tapped layer.

    Raises:
        ValueError: if a weight has no data: it is on the meta device, and accelerate does not know it.
    """
    skipped = _prefixes_after(backbone, layers, last_tap)
    state, tied = backbone.state_dict(keep_vars=True), tied_names(backbone)
    parts: dict[int, tuple[str, Any]] = {}  # by identity: tied weights count once
    for name, value in state.items():
        if name.startswith(skipped):
            continue
        first = tied.get(name) if isinstance(value, Tensor) and value.is_meta else None
        one = state.get(first, value) if first is not None else value
        if name.endswith("weight") and name.removesuffix("weight") + SOURCE in state:
            tensors = [one.scale_and_zero]  # int4: its source stands for the bits, packed in this CPU's way
        else:
            tensors = [one] if isinstance(one, Tensor) and one.is_meta else _tensors_of(one)
        for part in tensors:
            parts.setdefault(id(part), (name, part))
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib releases the GIL
        found = list(pool.map(lambda part: _digests(backbone, *part), parts.values()))
    digests = sorted(digest for part in found for digest, _ in part)
    total = hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
    kind = getattr(getattr(backbone, "config", None), "model_type", type(backbone).__name__)
    dtypes = {
        str(dtype).removeprefix("torch.")
        for part in found
        for _, dtype in part
        if dtype.is_floating_point or dtype == torch.int8
    }
    dtypes |= {"int4" for name in state if name.endswith(SOURCE)}
    return f"{kind}:{'+'.join(sorted(dtypes))}:{total}"


def _prefixes_after(backbone: nn.Module, layers: Sequence[nn.Module], last_tap: int) -> tuple[str, ...]:
    """State-dict prefixes of what runs after the last tap, by order of registration along the path to the layers."""
    path = stack_path(backbone, [layers[last_tap]])  # an encoder-decoder has two stacks
    prefixes = []
    parent, prefix = backbone, ""
    for part in filter(None, path.split(".")):
        names = [name for name, _ in parent.named_children()]
        prefixes += [f"{prefix}{name}." for name in names[names.index(part) + 1 :]]
        parent, prefix = parent.get_submodule(part), f"{prefix}{part}."
    above = {id(layer) for layer in layers[last_tap + 1 :]}
    prefixes += [f"{prefix}{name}." for name, child in parent.named_children() if id(child) in above]
    return tuple(prefixes) or ("\0",)  # str.startswith(()) is False, but an explicit never-match is clearer


def _tensors_of(value: Any) -> list[Tensor]:
    """The plain tensors in a state dict's value: itself, or a quantised layer's integers, scales and bias."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in _tensors_of(part)]
    if not isinstance(value, Tensor):  # a quantised layer's dtype, which its integers tell as well
        return []
    if hasattr(value, "__tensor_flatten__"):  # a tensor made of others: torchao's quantised weights
        names, _ = value.__tensor_flatten__()
        return [tensor for name in names for tensor in _tensors_of(getattr(value, name))]
    if not value.is_quantized:
        return [value]
    per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
    scale = value.q_per_channel_scales() if per_channel else torch.tensor(value.q_scale())
    zero = value.q_per_channel_zero_points() if per_channel else torch.tensor(value.q_zero_point())
    return [value.int_repr(), scale.float(), zero]


def _digests(backbone: nn.Module, name: str, tensor: Tensor) -> list[tuple[str, torch.dtype]]:
    """Digest and dtype of a weight, of each of its tensors where it is made of several."""
    return [(tensor_digest(part), part.dtype) for part in _tensors_of(stored_weight(backbone, name, tensor))]
