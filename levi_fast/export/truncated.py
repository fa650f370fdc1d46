"""A backbone that ends at its last tap, as one traceable function of its inputs.

:class:`levi_fast.TapExtractor` ends the forward by an exception, which a tracer cannot follow. Here the layers above
the last tap, and what stands behind the stack, are replaced in a copy of the structure by modules that compute
nothing; weights are shared with the original, and those above the last tap are in no artefact.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from levi_fast.layers import stack_path
from levi_fast.taps import TapExtractor, pool


class TruncatedBackbone(nn.Module):
    """Keyword inputs of the backbone -> list of L taps [B, D_l].

    Args:
        extractor: of the model to serve; it and its backbone stay as they are.
    """

    def __init__(self, extractor: TapExtractor) -> None:
        super().__init__()
        self.pooling = extractor.pooling
        self.names = extractor.input_names
        self.layers = extractor.layers
        path = stack_path(extractor.runner, extractor.blocks)
        positions = [_child_name(extractor.runner.get_submodule(path), block) for block in extractor.blocks]
        self.runner = _structure_copy(extractor.runner)
        self._held: list[Any] = [None]  # what the last tapped layer put out; those above repeat it
        stack = self.runner.get_submodule(path)
        self._taps: dict[int, Tensor] = {}
        self._mask: Tensor | None = None
        for layer, name in enumerate(positions):
            if layer > self.layers[-1]:
                stack.register_module(name, _Repeat(self._held, extractor.blocks[layer]))
            elif layer in self.layers:
                stack.get_submodule(name).register_forward_hook(self._hook(layer))
        _replace_after(self.runner, path)

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        accepted: dict[str, Any] = {name: value for name, value in inputs.items() if name in self.names}
        for name in ("use_cache", "output_hidden_states", "output_attentions"):
            if name in self.names:
                accepted[name] = False
        self._mask = inputs.get("attention_mask")
        try:
            self.runner(**accepted)
            return [self._taps[layer] for layer in self.layers]
        finally:
            self._taps.clear()
            self._held[0] = self._mask = None

    def _hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            self._taps[layer] = pool(hidden, self._mask, self.pooling)
            if layer == self.layers[-1]:
                self._held[0] = output

        return hook


class _Repeat(nn.Module):
    """In place of a layer above the last tap: repeats the last tapped layer's output.

    What the backbone's forward asks a layer for beside calling it (Swin: its downsampling; Llama's kin: its kind of
    attention) is answered by the layer replaced, which is not registered, so that its weights are not exported.
    """

    def __init__(self, held: list[Any], replaced: nn.Module) -> None:
        super().__init__()
        self.held = held
        self._replaced = (replaced,)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_replaced":
                raise
            return getattr(self._replaced[0], name)

    def forward(self, *_arguments: Any, **_keywords: Any) -> Any:
        return self.held[0]


class _Nothing(nn.Module):
    """In place of what runs behind the stack (final norm, pooler, head): hands on its first argument."""

    def forward(self, hidden: Any, *_arguments: Any, **_keywords: Any) -> Any:
        return hidden


def _structure_copy(module: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    with torch.no_grad():
        return copy.deepcopy(module, memo)


def _child_name(parent: nn.Module, child: nn.Module) -> str:
    return next(name for name, module in parent.named_children() if module is child)


def _replace_after(runner: nn.Module, path: str) -> None:
    """Replace what is registered after the stack, along the path to it: the taps do not see it."""
    parent = runner
    for part in filter(None, path.split(".")):
        names = [name for name, _ in parent.named_children()]
        for name in names[names.index(part) + 1 :]:
            if any(True for _ in parent.get_submodule(name).parameters()):
                parent.register_module(name, _Nothing())
        parent = parent.get_submodule(part)
