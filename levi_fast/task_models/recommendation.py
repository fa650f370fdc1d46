"""Recommendation: how a user rated the items of a history, read in the light of a target item."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import TaskModel, require_finite, require_fraction, require_int, require_shape

EPSILON = 1e-8


class RecommendationTaskModel(TaskModel):
    """Rating statistics, per-feature preferences, and attention from the target to the history.

    Everything is symmetric in the history's items: their order carries nothing. (To use recency, add a
    feature for it.) Averages are shrunk towards the prior by ``shrinkage`` pseudo-ratings, so a short history
    is believed little and an empty one, a new user, gives the prior itself.

    What reads item features directly starts at zero weights. A feature that training never meets (say, a
    genre first seen in use) therefore adds no untrained noise to the view; it still counts where items are
    compared.

    Args:
        num_features: G, the number of features that describe an item (multi-hot genres, scaled year, ...).
        view_width: V, the output width.
        hidden_width: of the perceptron.
        num_heads: attention heads; each compares items by cosine similarity of their features, weighted by
            learned per-feature scales, with its own sharpness.
        shrinkage: pseudo-ratings at the prior in every average.
        rating_mean, rating_scale: the prior rating, and the unit in which deviations from it are measured.
        dropout: inside the perceptron.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    type_name = "recommendation"

    def __init__(
        self,
        num_features: int,
        view_width: int = 64,
        hidden_width: int = 128,
        num_heads: int = 4,
        shrinkage: float = 3.0,
        rating_mean: float = 3.5,
        rating_scale: float = 1.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(
            view_width,
            num_features=num_features,
            hidden_width=hidden_width,
            num_heads=num_heads,
            shrinkage=shrinkage,
            rating_mean=rating_mean,
            rating_scale=rating_scale,
            dropout=dropout,
        )
        self.num_features = require_int("num_features", num_features)
        require_int("hidden_width", hidden_width)
        require_int("num_heads", num_heads)
        self.shrinkage = require_finite("shrinkage", shrinkage, positive=True)
        self.rating_mean = require_finite("rating_mean", rating_mean)
        self.rating_scale = require_finite("rating_scale", rating_scale, positive=True)
        require_fraction("dropout", dropout)
        self.feature_scale = nn.Parameter(torch.ones(num_heads, num_features))
        # Sharpness e^0 .. e^3: from nearly the plain mean to the nearest items only.
        self.log_sharpness = nn.Parameter(torch.linspace(0.0, 3.0, num_heads))
        self.from_statistics = nn.Linear(4 + 2 * num_heads, hidden_width)
        self.from_features = nn.Linear(3 * num_features, hidden_width, bias=False)
        nn.init.zeros_(self.from_features.weight)
        self.dropout = nn.Dropout(dropout)
        self.hidden = nn.Linear(hidden_width, hidden_width)
        self.head = nn.Linear(hidden_width, view_width)

    def forward(
        self, history_features: Tensor, history_ratings: Tensor, history_mask: Tensor, target_features: Tensor
    ) -> Tensor:
        """Return the view.

        Args:
            history_features: ``[B, N, G]`` float, N >= 0.
            history_ratings: ``[B, N]`` float, in the users' units.
            history_mask: ``[B, N]`` bool or 0/1, non-zero for real items; what stands elsewhere is not read.
            target_features: ``[B, G]`` float.

        Returns:
            ``[B, V]``, finite also for empty histories.

        Raises:
            ValueError: a shape does not fit.
        """
        batch, length, _ = require_shape("history_features", history_features, None, None, self.num_features).shape
        require_shape("history_ratings", history_ratings, batch, length)
        mask = require_shape("history_mask", history_mask, batch, length) != 0
        dtype = self.head.weight.dtype
        target = require_shape("target_features", target_features, batch, self.num_features).to(dtype)
        items = torch.where(mask.unsqueeze(-1), history_features, 0.0).to(dtype)
        deviation = torch.where(mask, (history_ratings - self.rating_mean) / self.rating_scale, 0.0).to(dtype)

        count = mask.sum(dim=1, keepdim=True).to(dtype)
        user_mean = deviation.sum(dim=1, keepdim=True) / (count + self.shrinkage)
        residual = torch.where(mask, deviation - user_mean, 0.0)
        spread = ((residual.square().sum(dim=1, keepdim=True) + self.shrinkage) / (count + self.shrinkage)).sqrt()
        # One ridge regression per feature: how much the feature moves this user's ratings.
        preference = torch.einsum("bn,bng->bg", residual, items) / (items.square().sum(dim=1) + self.shrinkage)
        affinity = preference * target

        attended, found = self._attend(items, residual, mask, target)
        statistics = torch.cat(
            [user_mean, spread, count.log1p(), affinity.sum(dim=1, keepdim=True), attended, found], dim=1
        )
        features = torch.cat([target, preference, affinity], dim=1)
        hidden = F.gelu(self.from_statistics(statistics) + self.from_features(features))
        hidden = F.gelu(self.hidden(self.dropout(hidden)))
        return self.head(self.dropout(hidden))

    def _attend(self, items: Tensor, residual: Tensor, mask: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Mean residual of the items most like the target, and how many there were; ``[B, heads]`` each."""
        # Cosine of the scaled features, from three matrix products: [B, N, heads, G] is never built.
        weight = self.feature_scale.square()
        length = (items.square() @ weight.T).transpose(1, 2).clamp(min=EPSILON).sqrt()  # [B, heads, N]
        query = target.unsqueeze(1) * weight  # [B, heads, G]
        query = query / (target.square() @ weight.T).clamp(min=EPSILON).sqrt().unsqueeze(-1)
        similarity = query @ items.transpose(1, 2) / length
        scores = (similarity - 1.0) * self.log_sharpness.exp()[:, None]
        # Softmax with an extra empty slot that weighs as much as `shrinkage` perfect matches, residual zero.
        # Scores are at most 0 (and exp below 1), so no maximum needs to be subtracted.
        weights = torch.where(mask.unsqueeze(1), scores, -torch.inf).exp()
        total = weights.sum(dim=-1)
        attended = torch.einsum("bhn,bn->bh", weights, residual) / (total + self.shrinkage)
        return attended, total / (total + self.shrinkage)
