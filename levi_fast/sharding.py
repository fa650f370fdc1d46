"""A frozen backbone spread over processes: each holds a part of every layer and gathers a layer as it runs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from levi_fast.modeling import LeviModel
from levi_fast.offloading import is_placed, leave_backbone_alone


def shard_backbone(model: LeviModel, mesh: Any = None) -> None:
    """Shard a model's frozen backbone by FSDP2 (``torch.distributed.fsdp.fully_shard``), in place.

    Call it in every process, after ``torch.distributed`` is initialised and before the model goes to Trainer,
    accelerate or ``DistributedDataParallel``, which then train the replicated rest. Each process keeps 1 / world size
    of the backbone's bytes and one gathered layer; the layers above the last tap are never gathered. (accelerate's
    own FSDP would shard what is trained as well, and runs on no CPU.)

    Args:
        model: from ``get_levi_model``, the backbone on the device that it is to run on.
        mesh: a ``DeviceMesh``; None takes all processes, on the backbone's device.

    Raises:
        RuntimeError: ``torch.distributed`` is not initialised.
        ValueError: the model has no backbone, or one that is trained (let accelerate shard that) or offloaded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if model.backbone is None or model.extractor is None:
        raise ValueError("model: expected one with a backbone to shard")
    if model.config.backbone_training != "frozen":
        raise ValueError(
            f"model: expected a frozen backbone, and backbone_training is {model.config.backbone_training!r}"
        )
    if is_placed(model.backbone):
        raise ValueError("model: expected a backbone to shard, and accelerate has placed or offloaded this one")
    if not torch.distributed.is_initialized():
        raise RuntimeError("shard_backbone: torch.distributed is not initialised; start the processes with torchrun")
    runner = model.extractor.runner
    if mesh is None:
        device = next(runner.parameters()).device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in model.extractor.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(runner, mesh=mesh)
    leave_backbone_alone(model)


def bytes_here(module: nn.Module) -> int:
    """Bytes of a module's parameters that this process holds."""
    held = (getattr(p, "to_local", lambda p=p: p)() for p in module.parameters())
    return sum(p.numel() * p.element_size() for p in held)
