"""The peers of a LEVI step: the method written straight out, and other ways to tune a backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from levi_fast import LeviConfig, reference, swap
from levi_fast.bench.side_network import SideNetwork
from levi_fast.errors import DataError
from levi_fast.kernels import use_backend
from levi_fast.layers import keyword_names
from levi_fast.modeling import LeviModel

BACKBONE_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
QUERY_VALUE = (("query", "value"), ("q_proj", "v_proj"), ("q", "v"))  # what architectures call them

Batch = Mapping[str, Tensor]
Loss = Callable[[Batch], Tensor]
Peer = tuple[nn.Module, Loss, nn.Module]
"""The module that is trained, the loss of a batch, and all that is held in memory."""


def forward(backbone: nn.Module) -> Loss:
    """The bare frozen forward: no loss, but the least that any method computes."""

    def run(batch: Batch) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, _run(backbone, batch).last_hidden_state)

    return run


def twin(levi: LeviModel, backbone: nn.Module) -> LeviModel:
    """A copy around the same backbone, its own weights equal, its ensemble the reference."""
    memo: dict[int, Any] = {id(module): module for module in backbone.modules()}
    own = copy.deepcopy(levi, memo)
    swap(own, undo=True)
    return own


def without_kernels(call: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
    """The same in eager PyTorch."""

    def run(batch: Batch) -> Any:
        with use_backend("eager"):
            return call(batch)

    return run


def mean_pool(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, D] to float32 [B, D], as most code does it."""
    if mask is None:
        return hidden.mean(1).float()
    weights = mask[..., None].to(hidden.dtype)
    return ((hidden * weights).sum(1) / weights.sum(1)).float()


def hidden_states(parts: LeviModel, backbone: nn.Module) -> tuple[nn.Module, Loss, Loss]:
    """LEVI as a user would write it: all hidden states, each pooled, the reference ensemble and loss.

    Returns:
        what is trained, the loss, and the layers' logits in the labels' units.
    """
    config, task_model, ensemble = parts.config, cast(nn.Module, parts.task_model), parts.ensemble
    kind = cast(reference.ProblemType, config.problem_type)
    mean, std = (config.target_mean, config.target_std) if kind == "regression" else (0.0, 1.0)
    names, takes_all = keyword_names(task_model)

    def logits(batch: Batch) -> Tensor:
        view = task_model(**{k: v for k, v in _inputs(batch).items() if takes_all or k in names})
        with torch.no_grad():
            states = _run(backbone, batch, output_hidden_states=True).hidden_states
            taps = [mean_pool(state, batch.get("attention_mask")) for state in states[1:]]
        return cast(Tensor, ensemble(taps, view).layer_logits)

    def loss(batch: Batch) -> Tensor:
        labels = batch["labels"] if kind != "regression" else (batch["labels"] - mean) / std
        return reference.layerwise_loss(logits(batch), labels, kind)

    return nn.ModuleList([task_model, ensemble]), loss, lambda batch: logits(batch) * std + mean


def linear_probe(backbone: nn.Module, config: LeviConfig) -> Peer:
    """A linear head on the mean of the last hidden state of the frozen backbone."""
    head = _head(backbone, config)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            pooled = mean_pool(_run(backbone, batch).last_hidden_state, batch.get("attention_mask"))
        return _loss(head(pooled), batch, config)

    return head, loss, nn.ModuleList([head, backbone])


def side_network(backbone: nn.Module, config: LeviConfig) -> Peer:
    """See :class:`levi_fast.bench.side_network.SideNetwork`."""
    sizes: Any = backbone.config
    side = SideNetwork(sizes.hidden_size, sizes.num_hidden_layers, _outputs(config))
    side.to(next(backbone.parameters()).device).train()

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            states = _run(backbone, batch, output_hidden_states=True).hidden_states
        return _loss(side(states, batch.get("attention_mask")), batch, config)

    return side, loss, nn.ModuleList([side, backbone])


def lora(backbone: nn.Module, config: LeviConfig) -> Peer:
    """peft's LoRA, r=8 on query and value, and a linear head on the mean of the last hidden state.

    Args:
        backbone: whose own modules there are replaced.
        config: of whose labels the head is.

    Raises:
        DataError: projections of unknown names.
    """
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=8, target_modules=lora_targets(backbone))
    return _tuned(cast(nn.Module, get_peft_model(cast(Any, backbone), adapters)), backbone, config)


def full(backbone: nn.Module, config: LeviConfig) -> Peer:
    """Full fine-tuning with the same head."""
    return _tuned(backbone.requires_grad_(), backbone, config)


def lora_targets(backbone: nn.Module) -> list[str]:
    """What this architecture calls its query and value projections.

    Raises:
        DataError: none of the names that are known.
    """
    names = {name.rsplit(".", 1)[-1] for name, _ in backbone.named_modules()}
    for pair in QUERY_VALUE:
        if names.issuperset(pair):
            return list(pair)
    known = ", ".join(" and ".join(pair) for pair in QUERY_VALUE)
    raise DataError(f"lora: expected modules named {known}; {type(backbone).__name__} has none of these pairs")


def _tuned(tuned: nn.Module, backbone: nn.Module, config: LeviConfig) -> Peer:
    both = nn.ModuleList([tuned, _head(backbone, config)]).train()

    def loss(batch: Batch) -> Tensor:
        hidden = _run(tuned, batch).last_hidden_state
        return _loss(both[1](mean_pool(hidden, batch.get("attention_mask"))), batch, config)

    return both, loss, both


def _head(backbone: nn.Module, config: LeviConfig) -> nn.Linear:
    sizes: Any = backbone.config
    return nn.Linear(sizes.hidden_size, _outputs(config), device=next(backbone.parameters()).device)


def _outputs(config: LeviConfig) -> int:
    return int(config.num_labels or 1)


def _loss(logits: Tensor, batch: Batch, config: LeviConfig) -> Tensor:
    kind = cast(reference.ProblemType, config.problem_type)
    return reference.layerwise_loss(logits[None], batch["labels"], kind)


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _run(backbone: nn.Module, batch: Batch, **arguments: Any) -> Any:
    dtype = next(backbone.parameters()).dtype
    inputs = {name: batch[name] for name in BACKBONE_INPUTS if name in batch}
    return backbone(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}, **arguments)
