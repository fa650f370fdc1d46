"""What stands on the taps and the view: LEVI's layer-wise ensemble, or one of the baselines' ways to combine them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from levi_fast.config import LeviConfig
from levi_fast.modules import EnsembleOutput, LayerwiseEnsemble
from levi_fast.reference import norm


class ConcatenatedHead(nn.Module):
    """One linear layer or MLP on the concatenation of all taps, as Head2Toe reads them (Evci et al. 2022).

    Args:
        tap_widths: D_l, one per tapped layer.
        num_outputs: C.
        selected: K, how many of the sum_l D_l features are read; None reads all. Which ones is the buffer
            ``selected`` [K] (int64), saved with the weights; the first K until it is set.
        hidden_width, activation, normalize, dropout: as of :class:`levi_fast.LayerwiseEnsemble`; each tap is
            normalised by itself.
    """

    def __init__(
        self,
        tap_widths: Sequence[int],
        num_outputs: int,
        *,
        selected: int | None = None,
        hidden_width: int | None = 256,
        activation: Any = "gelu",
        normalize: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tap_widths = tuple(tap_widths)
        self.normalize = normalize
        total = sum(self.tap_widths)
        if selected is not None and not 1 <= selected <= total:
            raise ValueError(f"selected_features: expected 1 to {total}, the width of all taps, got {selected}")
        self.selected: Tensor | None
        self.register_buffer("selected", None if selected is None else torch.arange(selected))
        self.head = LayerwiseEnsemble(
            [total if selected is None else selected],
            0,
            num_outputs,
            hidden_width=hidden_width,
            activation=activation,
            normalize=False,
            dropout=dropout,
        )

    @property
    def bias(self) -> Tensor:
        """Of the first linear layer, ``[1, K]``: tells the dtype."""
        return self.head.bias

    def features(self, taps: Tensor | Sequence[Tensor]) -> Tensor:
        """The concatenated taps, each normalised, ``[B, sum_l D_l]``."""
        return torch.cat([norm(tap) if self.normalize else tap for tap in taps], dim=1)

    def forward(
        self, taps: Tensor | Sequence[Tensor], view: Tensor | None = None, *, zeroed_view: bool = False
    ) -> EnsembleOutput:
        """taps [L, B, D] or L × [B, D_l] → logits [B, C] and, for the one layer, layer_logits [1, B, C]."""
        features = self.features(taps)
        if self.selected is not None:
            features = features[:, self.selected]
        return cast(EnsembleOutput, self.head([features]))


class OutputEnsemble(nn.Module):
    """The mean of two models' outputs: a linear probe on the last tap, and the task model with a head of its own.

    The two share no parameter, so under the "per_layer" objective each learns as it would by itself. The prediction
    with the view zeroed is the probe's: the blend then weighs the two models' outputs.

    Args:
        tap_widths: D_l; the probe is the mean of one linear layer per tap.
        view_width: V, above 0.
        num_outputs: C.
        hidden_width, activation, dropout: of the task model's head.
        normalize: LayerNorm on taps and view.
    """

    def __init__(
        self,
        tap_widths: Sequence[int],
        view_width: int,
        num_outputs: int,
        *,
        hidden_width: int | None = 256,
        activation: Any = "gelu",
        normalize: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.probe = LayerwiseEnsemble(tap_widths, 0, num_outputs, hidden_width=None, normalize=normalize)
        self.task_head = LayerwiseEnsemble(
            [0],
            view_width,
            num_outputs,
            hidden_width=hidden_width,
            activation=activation,
            normalize=normalize,
            dropout=dropout,
            view_dropout=0.0,
        )

    @property
    def tap_widths(self) -> tuple[int, ...]:
        """D_l."""
        return self.probe.tap_widths

    @property
    def bias(self) -> Tensor:
        """Of the probe, ``[L, C]``: tells the dtype."""
        return self.probe.bias

    def forward(
        self, taps: Tensor | Sequence[Tensor], view: Tensor | None = None, *, zeroed_view: bool = False
    ) -> EnsembleOutput:
        """taps [L, B, D] or L × [B, D_l], view [B, V] → logits [B, C], layer_logits [2, B, C]: probe, task model."""
        if view is None:
            raise ValueError("view: expected [B, V], got None")
        of_taps = self.probe(taps).logits
        of_view = self.task_head([view.new_empty(view.shape[0], 0)], view).logits
        both = torch.stack([of_taps, of_view])
        if not zeroed_view:
            return EnsembleOutput(both.mean(0), both)
        return EnsembleOutput(both.mean(0), both, of_taps, torch.stack([of_taps, of_taps]))


def build_head(config: LeviConfig) -> nn.Module:
    """The head that ``config.head`` names, newly initialised.

    Raises:
        ValueError: a head that does not go with the config's taps and view; the message names the argument.
    """
    assert config.tap_widths is not None
    outputs = cast(int, config.num_labels)
    common: dict[str, Any] = {
        "hidden_width": config.hidden_width,
        "activation": config.activation,
        "normalize": config.normalize,
        "dropout": config.dropout,
    }
    if config.head == "layerwise":
        return LayerwiseEnsemble(
            config.tap_widths,
            config.view_width,
            outputs,
            **common,
            mix=cast(Any, config.mix),
            view_dropout=config.view_dropout,
        )
    if not any(config.tap_widths):
        raise ValueError(f"head: {config.head!r} reads taps, and taps='none' leaves it none")
    if config.head == "concatenated":
        if config.view_width:
            raise ValueError("head: 'concatenated' reads the taps alone; leave out the task model")
        return ConcatenatedHead(config.tap_widths, outputs, selected=config.selected_features, **common)
    if not config.view_width:
        raise ValueError("head: 'output-ensemble' needs a task model")
    return OutputEnsemble(config.tap_widths, config.view_width, outputs, **common)
