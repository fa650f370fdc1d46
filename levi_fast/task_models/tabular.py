"""Tables: numbers and category embeddings through a perceptron, trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import TaskModel, perceptron, require_fraction, require_int, require_shape


class TabularTaskModel(TaskModel):
    """Numeric columns and embedded categorical columns, concatenated, then a two-layer perceptron.

    Args:
        num_numeric: F, the number of numeric columns; may be 0 if there are categorical ones.
        cardinalities: for each of the K categorical columns, how many indices it has, index 0 (unknown or
            missing) included. Index 0 starts as a zero vector and so stays neutral unless training meets it.
        view_width: V, the output width.
        embedding_dim: width of every category embedding.
        hidden_width: of the perceptron.
        dropout: inside the perceptron.

    Raises:
        ValueError: an argument is out of range, or there is no column at all; the message names it.
    """

    type_name = "tabular"

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int] = (),
        view_width: int = 64,
        embedding_dim: int = 16,
        hidden_width: int = 128,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            view_width,
            num_numeric=num_numeric,
            cardinalities=list(cardinalities),
            embedding_dim=embedding_dim,
            hidden_width=hidden_width,
            dropout=dropout,
        )
        self.num_numeric = require_int("num_numeric", num_numeric, minimum=0)
        for column, size in enumerate(cardinalities):
            require_int(f"cardinalities[{column}]", size)
        require_int("embedding_dim", embedding_dim)
        require_int("hidden_width", hidden_width)
        require_fraction("dropout", dropout)
        in_width = num_numeric + embedding_dim * len(cardinalities)
        if in_width == 0:
            raise ValueError("num_numeric, cardinalities: expected at least one column, got none")
        self.embeddings = nn.ModuleList(_neutral_first(size, embedding_dim) for size in cardinalities)
        self.head = perceptron(in_width, hidden_width, view_width, dropout)

    def forward(self, numeric: Tensor | None = None, categorical: Tensor | None = None) -> Tensor:
        """Return the view.

        Args:
            numeric: ``[B, F]`` float, finite and already standardised; may be left out if F = 0.
            categorical: ``[B, K]`` int64, each column's indices below its cardinality; may be left out if K =
                0.

        Returns:
            ``[B, V]``.

        Raises:
            ValueError: a tensor is missing or has the wrong shape. IndexError: an index is out of range.
        """
        parts = []
        if self.num_numeric:
            dtype = next(self.head.parameters()).dtype
            parts.append(require_shape("numeric", numeric, None, self.num_numeric).to(dtype))
        if self.embeddings:
            categories = require_shape("categorical", categorical, None, len(self.embeddings))
            parts.extend(embedding(categories[:, k]) for k, embedding in enumerate(self.embeddings))
        return self.head(torch.cat(parts, dim=1))


def _neutral_first(size: int, width: int) -> nn.Embedding:
    embedding = nn.Embedding(size, width)
    with torch.no_grad():
        embedding.weight[0].zero_()
    return embedding
