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

from levi_fast.layers import keyword_names, with_decoder_inputs
from levi_fast.taps import TapExtractor, pool
from levi_fast.widths import dummy_inputs


class TruncatedBackbone(nn.Module):
    """Keyword inputs of the backbone -> list of L taps [B, D_l] ([B * T, D_l] with ``pooling="token"``).

    Args:
        extractor: of the model to serve; it and its backbone stay as they are.
    """

    def __init__(self, extractor: TapExtractor) -> None:
        super().__init__()
        self.pooling = extractor.pooling
        self.layers = extractor.layers
        first = extractor.first_decoder_block
        # A decoder that is not tapped is not run: the encoder is served alone.
        self.has_decoder = first is not None and self.layers[-1] >= first
        runner: Any = extractor.runner
        whole = runner if first is None or self.has_decoder else runner.get_encoder()
        self.names, _ = keyword_names(whole)
        self._first_decoder_block = first if self.has_decoder else None
        blocks = extractor.blocks if first is None or self.has_decoder else extractor.blocks[:first]
        names = {id(module): name for name, module in whole.named_modules()}
        paths = [names[id(block)] for block in blocks]
        last = paths[self.layers[-1]]
        unused = _never_entered(extractor, whole, last)
        self.runner = _structure_copy(whole)
        self._held: list[Any] = [None]  # what the last tapped layer put out; those above repeat it
        self._taps: dict[int, Tensor] = {}
        self._masks: tuple[Tensor | None, Tensor | None] = (None, None)  # the encoder's (or only) one, the decoder's
        for layer, path in enumerate(paths):
            if layer > self.layers[-1]:
                self.runner.set_submodule(path, _Repeat(self._held, blocks[layer]))
            elif layer in self.layers:
                self.runner.get_submodule(path).register_forward_hook(self._hook(layer))
        for path in unused:
            self.runner.set_submodule(path, _Nothing())

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        mask = inputs.get("attention_mask")
        arguments: dict[str, Any] = with_decoder_inputs(self.runner, inputs) if self.has_decoder else inputs
        accepted: dict[str, Any] = {name: value for name, value in arguments.items() if name in self.names}
        for name in ("use_cache", "output_hidden_states", "output_attentions"):
            if name in self.names:
                accepted[name] = False
        self._masks = mask, arguments.get("decoder_attention_mask")
        try:
            self.runner(**accepted)
            return [self._taps[layer] for layer in self.layers]
        finally:
            self._taps.clear()
            self._held[0], self._masks = None, (None, None)

    def _hook(self, layer: int) -> Any:
        decoders = self._first_decoder_block is not None and layer >= self._first_decoder_block

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            self._taps[layer] = pool(hidden, self._masks[decoders], self.pooling)
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


def _never_entered(extractor: TapExtractor, runner: nn.Module, last: str) -> list[str]:
    """Paths of the modules with weights behind the stack of the last tap that no forward up to there calls.

    Registered behind it is not enough: BART's stacks register the norm of their embeddings there. Modules in front of
    the stack may be read without being called (tied weights), so that they stay.
    """
    behind: dict[str, nn.Module] = {}
    parent, prefix = runner, ""
    for part in last.split(".")[:-1]:
        names = [name for name, _ in parent.named_children()]
        for name in names[names.index(part) + 1 :]:
            module = parent.get_submodule(name)
            if any(True for _ in module.parameters()):
                behind[prefix + name] = module
        parent, prefix = parent.get_submodule(part), f"{prefix}{part}."
    entered: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: entered.add(path))
        for path, module in behind.items()
    ]
    try:
        if behind:
            with torch.no_grad():
                extractor(**dummy_inputs(extractor))
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in behind if path not in entered]
