"""Backbones that accelerate has placed: spread over devices, or kept in RAM or on disk until a layer runs.

``from_pretrained(device_map=...)``, ``dispatch_model``, ``cpu_offload`` and ``disk_offload`` attach hooks to modules.
A hook brings a module's weights before it runs and takes them away afterwards: between two forwards such a weight is
a tensor without data, on torch's meta device, and nothing but accelerate may move it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from levi_fast.backbone_training import PREFIX

SHARD_SIZE = "2GB"  # what is in memory at once while an offloaded backbone is written


def is_placed(module: nn.Module) -> bool:
    """Whether accelerate decides where the weights of a module, or of one inside it, are."""
    return any(hasattr(inside, "_hf_hook") for inside in module.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether some weights of a module are kept elsewhere until they are needed."""
    return is_placed(module) and any(parameter.is_meta for parameter in module.parameters())


def input_device(module: nn.Module) -> torch.device:
    """Where a module expects its inputs: where its first part runs, or else where its first weight is."""
    for inside in module.modules():
        for hook in _hooks(inside):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next(module.parameters(), torch.empty(0)).device


def stored_weight(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A weight as a forward would see it: itself, or read from where accelerate keeps it.

    Args:
        module: holds the weight.
        name: its dotted name in ``module``.
        tensor: what the module holds under that name now; on the meta device where the weight is elsewhere.

    Returns:
        The weight in ``tensor``'s dtype. Of one on disk it is a copy that nothing else holds.

    Raises:
        ValueError: the weight is nowhere: it was never loaded, or cannot be read where accelerate keeps it.
    """
    if not tensor.is_meta:
        return tensor
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # the innermost hook first; a class that is preloaded has one above
        for hook in _hooks(module.get_submodule(".".join(parts[:depth]))):
            weights = getattr(hook, "weights_map", None)
            if weights is None:
                continue
            try:
                return weights[".".join(parts[depth:])].to(tensor.dtype)
            except (KeyError, OSError) as error:
                raise ValueError(
                    f"backbone: its weight {name} cannot be read where accelerate keeps it: {error!r}"
                ) from error
    raise ValueError(
        f"backbone: its weight {name} is on the meta device, without data; load the weights, or let accelerate "
        "offload them, before building a LEVI model"
    )


def tied_names(module: nn.Module) -> dict[str, str]:
    """Of a transformers model: names of weights that are another's, and that other's name.

    In memory tied weights are one tensor; offloaded ones are told from others by their names alone.
    """
    return dict(getattr(module, "all_tied_weights_keys", None) or {})


def save_offloaded(backbone: Any, folder: Path) -> None:
    """``save_pretrained`` of a transformers model with offloaded weights, by shards of :data:`SHARD_SIZE`."""
    mapped = hasattr(backbone, "hf_device_map")
    if not mapped:  # cpu_offload and disk_offload set none, and transformers tells offloaded models by it
        backbone.hf_device_map = {"": "disk"}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")  # of 50 GB shards
            backbone.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    finally:
        if not mapped:
            del backbone.hf_device_map


def leave_backbone_alone(model: nn.Module) -> None:
    """Tell DistributedDataParallel not to touch a model's backbone: it would broadcast it to every process."""
    inside = [name for name, _ in [*model.named_parameters(), *model.named_buffers()] if name.startswith(PREFIX)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, inside)


def modules_above(module: nn.Module, inside: nn.Module) -> list[nn.Module]:
    """The modules that hold ``inside``, from its parent out to ``module`` itself."""
    path = next(name for name, found in module.named_modules() if found is inside).split(".")
    return [module.get_submodule(".".join(path[:depth])) for depth in range(len(path) - 1, -1, -1)]


def after_interrupted_forward(modules: Iterable[nn.Module]) -> None:
    """Let accelerate take away again what it brought for modules whose forward was left by an exception."""
    for module in modules:
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is not None:
            hook.post_forward(module, None)


def _hooks(module: nn.Module) -> Iterator[Any]:
    """A module's hooks one by one: several of them stand in a SequentialHook."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
