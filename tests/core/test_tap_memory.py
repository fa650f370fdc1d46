"""Memory of streamed taps: however many layers are tapped, no more hidden states are alive than in a bare forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from levi_fast import TapExtractor

BATCH, TOKENS, WIDTH = 8, 24, 16
HIDDEN_STATE = BATCH * TOKENS * WIDTH * 4


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made inside the ``with`` block and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.live -= size


def peak_of(forward: Callable[[], object]) -> int:
    forward()
    with LiveBytes() as counter:
        forward()
    return counter.peak


@pytest.mark.parametrize("layers", [6, 12, 32])
def test_the_peak_does_not_grow_with_the_number_of_taps(
    build_backbone: Callable[..., nn.Module], layers: int
) -> None:
    backbone = build_backbone("bert", num_hidden_layers=layers)
    inputs = {
        "input_ids": torch.ones(BATCH, TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.int64),
    }

    def plain(keep: bool) -> object:
        with torch.no_grad():
            return backbone(**inputs, output_hidden_states=keep)

    extractor = TapExtractor(backbone, "all")
    bare, streamed = peak_of(lambda: plain(False)), peak_of(lambda: extractor(**inputs))
    kept = peak_of(lambda: plain(True))
    pooled = 2 * layers * BATCH * WIDTH * 4  # one by one, and stacked
    assert streamed <= bare + pooled + HIDDEN_STATE // 2  # the mask that pooling reads
    assert kept >= bare + (layers - 3) * HIDDEN_STATE  # what output_hidden_states costs: the count can tell
