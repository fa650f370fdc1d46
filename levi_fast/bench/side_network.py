"""A ladder side network on a frozen backbone, as a peer.

Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022
(arXiv 2206.06522): small blocks beside the backbone's, fed with gated projections of its hidden states, so that no
gradient goes through the backbone. Left out here are LST's initial weights (pruned from the backbone) and its
dropping of side layers; the side blocks see every position, also beside a causal backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from levi_fast.task_models.text import TransformerBlock

REDUCTION = 8  # of the backbone's width, as in the paper


class SideNetwork(nn.Module):
    """One small transformer block beside each of the backbone's layers, mean over positions, a linear head.

    Args:
        width: D of the backbone.
        layers: L of the backbone.
        num_outputs: C.
        reduction: the side network's width is D over this, rounded down to a multiple of its four heads.
    """

    def __init__(self, width: int, layers: int, num_outputs: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        heads = 4
        narrow = max(width // reduction // heads, 1) * heads
        self.down = nn.ModuleList(nn.Linear(width, narrow) for _ in range(layers + 1))
        self.gates = nn.Parameter(torch.zeros(layers))  # the sigmoid of 0: half ladder, half backbone
        self.blocks = nn.ModuleList(TransformerBlock(narrow, heads, 0.1) for _ in range(layers))
        self.up = nn.Linear(narrow, width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, hidden_states: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Logits [B, C].

        Args:
            hidden_states: the embeddings' and every layer's output, L + 1 times [B, T, D].
            mask: [B, T], non-zero where a position counts; None counts all.
        """
        first = hidden_states[0]
        kept = torch.ones(first.shape[:2], device=first.device) if mask is None else mask
        visible = kept.bool()
        side = self.down[0](first.to(self.gates.dtype))
        for layer, block in enumerate(self.blocks):
            gate = torch.sigmoid(self.gates[layer])
            ours = self.down[layer + 1](hidden_states[layer + 1].to(self.gates.dtype))
            side = block(gate * ours + (1 - gate) * side, visible)
        weights = kept.to(side.dtype)[..., None]
        return self.head(self.up((side * weights).sum(1) / weights.sum(1)))
