"""``TapExtractor``: streams pooled activations out of a frozen backbone.

Each tapped layer's output is pooled inside a forward hook, and the hidden state is let go at once: what stays
is [B, D] per tap, never [B, T, D]. The forward ends at the last tap; nothing above it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from levi_fast.functional import masked_mean_pool, masked_mean_pool_into
from levi_fast.layers import find_stacks, keyword_names, with_decoder_inputs
from levi_fast.offloading import after_interrupted_forward, modules_above
from levi_fast.selection import resolve_taps

Pooling = Literal["mean", "cls", "last", "token"]
POOLINGS: tuple[str, ...] = ("mean", "cls", "last", "token")

# Asked of every backbone that has the argument: none of it is used, and each would keep large tensors alive.
_KEEP_NOTHING = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}


class _LastTapReached(Exception):
    """Raised inside the last tap's hook to end the backbone's forward there."""


class TapExtractor:
    """Reads pooled activations of a frozen backbone's layers.

    Building one freezes the backbone: its parameters stop requiring gradients and it is put into eval mode,
    which every call makes sure of again, so that dropout stays off and BatchNorm's statistics stay still even
    after ``model.train()``. With ``trained=True`` it is left as it is, and gradients flow through the taps.

    Args:
        backbone: a transformers model, or any module whose layers stand in one ``nn.ModuleList``. Of an
            encoder-decoder, the encoder is tapped unless ``layers`` says otherwise.
        taps: which layers' outputs: "all", "last", "even:k" (k layers spread evenly, the last one included),
            or indices counted from 0 at the first layer, negative ones from the end.
        pooling: over the tokens that the attention mask keeps: "mean", "cls" (the first of them) or "last"
            (the last of them). Without a mask all tokens count. "token": none at all, every position, padding too, is
            an example of its own: [L, B * T, D].
        layers: dotted name of the ``nn.ModuleList`` of layers, for a backbone where it cannot be found; of an
            encoder-decoder "encoder" (the default), "decoder", or "encoder+decoder", whose layers are counted on from
            the encoder's. The decoder reads the same tokens, moved one place on behind its start token, as T5 and
            BART do for classification, unless ``decoder_input_ids`` are given.
        trained: the backbone, or adapters inside it, are trained.

    Attributes:
        runner: the module that is run: the backbone, or its encoder.
        blocks: the runner's whole stack of layers.
        layers: the tapped indices, ascending.
        first_decoder_block: index among ``blocks`` of the decoder's first one; None where none of a decoder's can be
            tapped.

    Raises:
        ValueError: for an unknown pooling, a tap out of range, or layers that cannot be found.
    """

    def __init__(
        self,
        backbone: nn.Module,
        taps: str | Sequence[int] = "all",
        pooling: Pooling = "mean",
        *,
        layers: str | None = None,
        trained: bool = False,
    ) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        self.backbone = backbone
        self.pooling = pooling
        self.runner, self.blocks, self.first_decoder_block = find_stacks(backbone, layers)
        self.layers = resolve_taps(taps, len(self.blocks))
        if pooling == "token" and self.first_decoder_block is not None:
            raise ValueError("pooling: 'token' is for one stack of layers; a decoder's tokens are moved by one place")
        self._accepted, _ = keyword_names(self.runner)
        self._interrupted = modules_above(self.runner, self.blocks[self.layers[-1]])
        self.trained = trained
        if not trained:
            self.freeze()

    def freeze(self) -> None:
        """Stop gradients into the backbone and put it into eval mode."""
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def accepts(self, name: str) -> bool:
        """Whether the backbone's forward takes an argument of this name."""
        return name in self._accepted

    @property
    def input_names(self) -> frozenset[str]:
        """Names of the arguments that the backbone's forward takes."""
        return self._accepted

    def __call__(self, **inputs: Any) -> Tensor | list[Tensor]:
        """Run the backbone as far as the last tap.

        Args:
            **inputs: the backbone's own keyword arguments (``input_ids`` [B, T], ``attention_mask`` [B, T],
                ``pixel_values`` [B, 3, H, W], ...).

        Returns:
            [L, B, D] in the backbone's dtype, or a list of L tensors [B, D_l] where widths differ.

        Raises:
            ValueError: if a row of ``attention_mask`` (on the CPU, where looking costs nothing) is all padding,
                or if the mask's length differs from the hidden states'.
        """
        if self.backbone.training and not self.trained:  # a parent's .train() reached it
            self.backbone.eval()
        mask = inputs.get("attention_mask")
        _check_mask(mask)
        arguments = dict(inputs)
        decoder_mask = mask
        if self.first_decoder_block is not None:
            arguments = with_decoder_inputs(self.runner, arguments)
            decoder_mask = arguments.get("decoder_attention_mask")
        for name, value in _KEEP_NOTHING.items():
            if name in self._accepted:
                arguments[name] = value
        with_gradients = self.trained and torch.is_grad_enabled()
        pooled = _Graph(len(self.layers)) if with_gradients else _Bank(len(self.layers))
        handles = [
            self.blocks[layer].register_forward_hook(
                self._make_hook(pooled, position, decoder_mask if self._is_decoders(layer) else mask)
            )
            for position, layer in enumerate(self.layers)
        ]
        try:
            with torch.set_grad_enabled(with_gradients):
                self.runner(**arguments)
        except _LastTapReached:
            after_interrupted_forward(self._interrupted)
        finally:
            for handle in handles:
                handle.remove()
        missing = [layer for layer, tap in zip(self.layers, pooled.taps, strict=True) if tap is None]
        if missing:  # e.g. layer drop, or a model that calls its blocks' insides directly
            raise RuntimeError(f"taps: the backbone's forward never ran its layers {missing}")
        return pooled.result()

    def _is_decoders(self, layer: int) -> bool:
        return self.first_decoder_block is not None and layer >= self.first_decoder_block

    def _make_hook(
        self, pooled: _Bank | _Graph, position: int, mask: Tensor | None
    ) -> Callable[[nn.Module, Any, Any], None]:
        # A checkpointed layer must be left as it is entered, so those above the last tap run too.
        checkpointed = self.trained and getattr(self.runner, "is_gradient_checkpointing", False)
        last = position == len(self.layers) - 1 and not checkpointed

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            # A backbone that is spread over devices runs elsewhere than where its inputs were.
            pooled.put(position, hidden, None if mask is None else mask.to(hidden.device), self.pooling)
            if last:
                raise _LastTapReached

        return hook


class _Bank:
    """The taps as they come: rows of one [L, B, D] bank while their shapes agree, else tensors of their own."""

    def __init__(self, count: int) -> None:
        self.taps: list[Tensor | None] = [None] * count
        self._bank: Tensor | None = None
        self._inside: set[int] = set()  # positions whose tap is a row of the bank

    def put(self, position: int, hidden: Tensor, mask: Tensor | None, pooling: str) -> None:
        """Pool one layer's output into its place."""
        hidden, mask = _tokens(hidden, mask)
        shape = (hidden.shape[0], hidden.shape[2])
        if pooling == "mean" and self._bank is None:
            self._bank = hidden.new_empty((len(self.taps), *shape))
        place = None if self._bank is None or pooling != "mean" else self._bank[position]
        if place is not None and (place.shape, place.dtype, place.device) == (shape, hidden.dtype, hidden.device):
            self.taps[position] = masked_mean_pool_into(place, hidden, mask)
            self._inside.add(position)
        else:
            self.taps[position] = pool(hidden, mask, pooling)
            self._inside.discard(position)

    def result(self) -> Tensor | list[Tensor]:
        """[L, B, D], or L tensors [B, D_l] where widths differ."""
        taps = cast(list[Tensor], self.taps)
        if self._bank is not None and len(self._inside) == len(taps):
            return self._bank
        if len({tap.shape[1] for tap in taps}) == 1:
            return torch.stack([tap.to(taps[0].device) for tap in taps])
        # A row must not keep the whole bank alive.
        return [tap.clone() if position in self._inside else tap for position, tap in enumerate(taps)]


class _Graph:
    """The taps of a backbone that is trained: pooled after its forward, outside of any gradient checkpoint."""

    def __init__(self, count: int) -> None:
        self.taps: list[Tensor | None] = [None] * count
        self._pool: list[Callable[[], Tensor]] = [lambda: torch.empty(0)] * count

    def put(self, position: int, hidden: Tensor, mask: Tensor | None, pooling: str) -> None:
        """Note one layer's output."""
        self.taps[position] = hidden
        self._pool[position] = lambda: pool(hidden, mask, pooling)

    def result(self) -> Tensor | list[Tensor]:
        """[L, B, D], or L tensors [B, D_l] where widths differ."""
        taps = [pooled() for pooled in self._pool]
        return torch.stack(taps) if len({tap.shape[1] for tap in taps}) == 1 else taps


def _tokens(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[B, T, D] and its mask; of a convolutional stage [B, D, height, width] every position is a token."""
    if hidden.dim() == 4:
        hidden, mask = hidden.flatten(2).transpose(1, 2), None
    if hidden.dim() != 3:
        raise ValueError(f"hidden: expected [B, T, D] or [B, D, height, width], got {list(hidden.shape)}")
    if mask is not None and mask.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"attention_mask: expected the hidden states' {hidden.shape[1]} positions, got {mask.shape[1]}; "
            "pad the inputs to a length that the backbone keeps"
        )
    return hidden, mask


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Reduce hidden states to one vector an example.

    Args:
        hidden: [B, T, D], or [B, D, height, width] (a convolutional stage: every position is a token).
        mask: [B, T], non-zero where a token counts, or None.
        pooling: "mean", "cls", "last" or "token".

    Returns:
        [B, D] in ``hidden``'s dtype; [B * T, D] for "token".

    Raises:
        ValueError: if the mask's length differs from T.
    """
    hidden, mask = _tokens(hidden, mask)
    if pooling == "mean":
        return masked_mean_pool(hidden, mask)
    if pooling == "token":
        return hidden.flatten(0, 1)
    if mask is None:
        return hidden[:, 0 if pooling == "cls" else -1].clone()  # a clone lets the hidden states go
    kept = (mask != 0).to(torch.int64)
    first, last = kept.argmax(1), kept.shape[1] - 1 - kept.flip(1).argmax(1)  # kept ones, wherever the padding is
    index = first if pooling == "cls" else last
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]


def _check_mask(mask: Tensor | None) -> None:
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, T], got {list(mask.shape)}")
    if mask.device.type == "cpu":
        empty = ((mask != 0).sum(1) == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"attention_mask: expected at least one token a row, got only padding in rows {empty}")
