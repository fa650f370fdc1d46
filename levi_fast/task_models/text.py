"""Text: token embeddings, pooled at once or after a few transformer blocks, trained from scratch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import TaskModel, masked_mean, perceptron, require_fraction, require_int, require_shape

ENCODERS = ("pooled", "transformer")


class TextTaskModel(TaskModel):
    """Token embedding, ``encoder``, masked mean over tokens, two-layer perceptron.

    ``encoder="pooled"`` averages the token embeddings (a learned bag of words); ``"transformer"`` adds
    learned positions and ``num_layers`` pre-norm blocks first. The pooled form is the default: on small
    training sets it learns the words that matter with far less to memorise.

    Args:
        vocab_size: number of token ids; the backbone's tokenizer is the usual source of ids.
        embedding_dim: width of the token embeddings and of the blocks; ``num_heads`` must divide it.
        view_width: V, the output width.
        encoder: ``"pooled"`` or ``"transformer"``.
        num_layers, num_heads, max_positions: of the transformer; ignored by ``"pooled"``.
        token_dropout: probability of taking an input token out of the mean and of the attention, in training
            only. At least one real token of every row is kept. It keeps single words from carrying the whole
            answer.
        dropout: inside the blocks and the perceptron.
        pad_token_id: where no ``attention_mask`` is passed, tokens with this id count as padding.
        per_token: a view of every token instead of their mean; ``"pooled"`` then sees each token by itself.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    type_name = "text"

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int = 64,
        view_width: int = 64,
        encoder: str = "pooled",
        num_layers: int = 2,
        num_heads: int = 4,
        max_positions: int = 512,
        token_dropout: float = 0.5,
        dropout: float = 0.1,
        pad_token_id: int | None = None,
        per_token: bool = False,
    ) -> None:
        super().__init__(
            view_width,
            vocab_size=vocab_size,
            embedding_dim=embedding_dim,
            encoder=encoder,
            num_layers=num_layers,
            num_heads=num_heads,
            max_positions=max_positions,
            token_dropout=token_dropout,
            dropout=dropout,
            pad_token_id=pad_token_id,
            **({"per_token": True} if per_token else {}),
        )
        if not isinstance(per_token, bool):
            raise ValueError(f"per_token: expected True or False, got {per_token!r}")
        self.per_token = per_token
        require_int("vocab_size", vocab_size)
        require_int("embedding_dim", embedding_dim)
        if encoder not in ENCODERS:
            raise ValueError(f"encoder: expected one of {', '.join(ENCODERS)}, got {encoder!r}")
        self.token_dropout = require_fraction("token_dropout", token_dropout)
        require_fraction("dropout", dropout)
        if pad_token_id is not None:
            require_int("pad_token_id", pad_token_id, minimum=0)
        self.pad_token_id = pad_token_id
        self.max_positions = require_int("max_positions", max_positions) if encoder == "transformer" else None

        self.token_embedding = nn.Embedding(vocab_size, embedding_dim)
        self.position_embedding: nn.Embedding | None = None
        self.blocks = nn.ModuleList()
        self.final_norm: nn.LayerNorm | None = None
        if encoder == "transformer":
            require_int("num_layers", num_layers)
            if embedding_dim % require_int("num_heads", num_heads):
                raise ValueError(f"num_heads: expected a divisor of {embedding_dim=}, got {num_heads}")
            # Small random values, so that the residual stream starts at the scale the blocks are built for.
            nn.init.normal_(self.token_embedding.weight, std=embedding_dim**-0.5)
            self.position_embedding = nn.Embedding(max_positions, embedding_dim)
            nn.init.normal_(self.position_embedding.weight, std=embedding_dim**-0.5)
            self.blocks.extend(TransformerBlock(embedding_dim, num_heads, dropout) for _ in range(num_layers))
            self.final_norm = nn.LayerNorm(embedding_dim)
        self.head = perceptron(embedding_dim, 2 * view_width, view_width, dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the view.

        Args:
            input_ids: ``[B, T]`` int64.
            attention_mask: ``[B, T]`` bool or 0/1, non-zero for real tokens, padding on either side; by
                default every token that is not ``pad_token_id``.

        Returns:
            ``[B, V]`` (``[B, T, V]`` with ``per_token``), finite also for a row that is all padding.

        Raises:
            ValueError: a shape does not fit, or T exceeds ``max_positions`` of the transformer.
        """
        batch, length = require_shape("input_ids", input_ids, None, None).shape
        if attention_mask is not None:
            mask = require_shape("attention_mask", attention_mask, batch, length) != 0
        elif self.pad_token_id is not None:
            mask = input_ids != self.pad_token_id
        else:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        if self.max_positions is not None and length > self.max_positions:
            raise ValueError(f"input_ids: expected at most max_positions={self.max_positions} tokens, got {length}")

        kept = mask
        if self.training and self.token_dropout > 0.0 and length > 0:
            kept = drop_tokens(mask, self.token_dropout)
        if self.training and length > 0 and self.position_embedding is None and not self.per_token:
            return self.head(mean_embedding(input_ids, kept, self.token_embedding.weight))
        hidden = self.token_embedding(input_ids)
        if self.position_embedding is not None and self.final_norm is not None:
            # Counted over real tokens, so that padding on the left moves nothing; before token dropout, so
            # that a dropped token leaves a gap instead of shifting what follows.
            positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
            hidden = hidden + self.position_embedding(positions)
            # A row with nothing to attend to would divide zero by zero: let its padding see itself, then pool
            # it away below.
            visible = kept | ~kept.any(dim=1, keepdim=True)
            for block in self.blocks:
                hidden = block(hidden, visible)
            hidden = self.final_norm(hidden)
        if self.per_token:
            return self.head(hidden * kept[..., None])  # a dropped token is not known by its own embedding either
        return self.head(masked_mean(hidden, kept))


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and feed-forward, bidirectional.

    Written out rather than ``nn.TransformerEncoderLayer``: that one leaves for another code path in eval
    mode, where autocast and masks behave differently.
    """

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = perceptron(width, 4 * width, width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, visible: Tensor) -> Tensor:
        """``hidden [B, T, D]``, ``visible [B, T]`` bool (keys that may be attended to) -> ``[B, T, D]``."""
        batch, length, width = hidden.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = self.query_key_value(self.attention_norm(hidden)).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(
            query.reshape(heads).transpose(1, 2),
            key.reshape(heads).transpose(1, 2),
            value.reshape(heads).transpose(1, 2),
            attn_mask=visible[:, None, None, :],
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        hidden = hidden + self.dropout(self.attention_out(mixed))
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden)))


def mean_embedding(input_ids: Tensor, kept: Tensor, weight: Tensor) -> Tensor:
    """The mean embedding [B, D] of the tokens [B, T] that are ``kept``: without [B, T, D] in memory, or its gradient.

    In training that is a third of the time; elsewhere the plain form stays, which every exporter knows.
    """
    shares = kept.to(weight.dtype) / kept.sum(dim=1, keepdim=True).clamp(min=1).to(weight.dtype)
    return F.embedding_bag(input_ids, weight, per_sample_weights=shares, mode="sum")


def drop_tokens(mask: Tensor, probability: float) -> Tensor:
    """Switch entries of ``mask [B, T]`` off with ``probability``; one random entry per row always stays."""
    draw = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, -1.0)
    # The largest draw marks a uniformly random real token.
    survivor = torch.arange(mask.shape[1], device=mask.device) == draw.argmax(dim=1, keepdim=True)
    return mask & ((draw >= probability) | survivor)
