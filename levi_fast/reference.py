"""The method as a specification: LEVI's layer-wise ensemble in eager PyTorch, reading like its equations.

Source: Roh et al., "LEVI: Generalizable Fine-tuning via Layer-wise Ensemble of Different Views", ICML 2024
(arXiv 2402.04644). A frozen pre-trained model is read at L depths; a small task model, trained from scratch,
gives a second view; at every tapped depth an adapting layer sees both::

    tap_l  = pool(hidden_l)                      [B, D_l]   (no gradient into the backbone)
    view   = task_model(inputs)                  [B, V]
    y_l    = A_l([norm(tap_l) ; norm(view)])     [B, C]     A_l: Linear, or Linear-act-Linear (width H)
    y      = sum_l m_l y_l                       [B, C]     m = 1/L, or a learned softmax
    loss   = mean_l loss(y_l, t)  "per_layer"  |  loss(y, t)  "ensemble"  |  their mean  "both"

The paper fixes the frozen backbone, the concatenation of intermediate outputs with the small model's final
output, and the shared loss over layers. The adapting layer's form, ``norm``, view dropout and the blend with
the zeroed view are this library's choices.

This file imports torch alone. It is the yardstick: every faster implementation is measured against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "relu", "silu", "tanh"]
Mix = Literal["mean", "learned"]
Objective = Literal["per_layer", "ensemble", "both"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
OBJECTIVES: tuple[str, ...] = ("per_layer", "ensemble", "both")
PROBLEM_TYPES: tuple[str, ...] = ("single_label_classification", "multi_label_classification", "regression")


class EnsembleOutput(NamedTuple):
    """What a layer-wise ensemble returns.

    Attributes:
        logits: [B, C], the mixed prediction ``y``.
        layer_logits: [L, B, C], each adapting layer's own prediction ``y_l``.
        logits_without_view: [B, C], ``y`` with the view zeroed; only where it was asked for.
        layer_logits_without_view: [L, B, C], likewise for ``y_l``.
    """

    logits: Tensor
    layer_logits: Tensor
    logits_without_view: Tensor | None = None
    layer_logits_without_view: Tensor | None = None


def norm(x: Tensor) -> Tensor:
    """LayerNorm over the last dimension without affine parameters: the linear that follows absorbs them."""
    return F.layer_norm(x, x.shape[-1:]) if x.shape[-1] else x


class LayerwiseEnsemble(nn.Module):
    """LEVI's layer-wise ensemble of a frozen backbone's taps and a small task model's view.

    The weight of adapting layer l on ``[tap_l ; view]`` is kept as its two blocks, all layers packed into one
    parameter each, so that a fast implementation reads them without a copy:

    - ``tap_weight`` [sum_l D_l, K]: layer l owns the rows ``sum_{j<l} D_j`` to ``sum_{j<=l} D_j``
    - ``view_weight`` [V, L, K] (absent when ``view_width`` is 0), ``bias`` [L, K]
    - ``output_weight`` [C, L, H], ``output_bias`` [L, C] (absent when ``hidden_width`` is None)
    - ``mix_logits`` [L] (only for ``mix="learned"``)

    with K = H, or C when ``hidden_width`` is None.

    Args:
        tap_widths: D_l, one per tapped layer; they may differ. A width of 0 leaves the view alone.
        view_width: V, width of the task model's output; 0 for taps alone.
        num_outputs: C, classes, labels or regression targets.
        hidden_width: H of a one-hidden-layer adapting layer, or None for a linear one.
        activation: of the hidden layer: "gelu" (exact), "relu", "silu" or "tanh".
        normalize: LayerNorm (no affine parameters) on each tap and on the view.
        mix: "mean" for m_l = 1/L, "learned" for a softmax over one logit per layer.
        dropout: probability of dropping a hidden activation while training.
        view_dropout: probability of zeroing an example's whole view while training (not rescaled: the zeroed
            view is a mode of its own, which the blended prediction uses).

    Raises:
        ValueError: for an argument outside its range; the message names it.
    """

    def __init__(
        self,
        tap_widths: Sequence[int],
        view_width: int,
        num_outputs: int,
        *,
        hidden_width: int | None = 256,
        activation: Activation = "gelu",
        normalize: bool = True,
        mix: Mix = "mean",
        dropout: float = 0.0,
        view_dropout: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_ensemble_arguments(
            tap_widths, view_width, num_outputs, hidden_width, activation, mix, dropout, view_dropout
        )
        self.tap_widths = tuple(int(width) for width in tap_widths)
        self.view_width = view_width
        self.num_outputs = num_outputs
        self.hidden_width = hidden_width
        self.activation = activation
        self.normalize = normalize
        self.mix = mix
        self.dropout = dropout
        self.view_dropout = view_dropout

        layers, first = len(self.tap_widths), hidden_width if hidden_width is not None else num_outputs

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.tap_weight = parameter(sum(self.tap_widths), first)
        self.view_weight = parameter(view_width, layers, first) if view_width else None
        self.bias = parameter(layers, first)
        self.output_weight = parameter(num_outputs, layers, hidden_width) if hidden_width is not None else None
        self.output_bias = parameter(layers, num_outputs) if hidden_width is not None else None
        self.mix_logits = parameter(layers) if mix == "learned" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each adapting layer as ``nn.Linear`` does: uniform in ±1/sqrt(fan in)."""
        with torch.no_grad():
            for layer, weight in enumerate(self.tap_weight.split(self.tap_widths)):
                bound = 1 / math.sqrt(self.tap_widths[layer] + self.view_width)
                weight.uniform_(-bound, bound)
                if self.view_weight is not None:
                    self.view_weight[:, layer].uniform_(-bound, bound)
                self.bias[layer].uniform_(-bound, bound)
            if self.output_weight is not None and self.output_bias is not None and self.hidden_width:
                bound = 1 / math.sqrt(self.hidden_width)
                self.output_weight.uniform_(-bound, bound)
                self.output_bias.uniform_(-bound, bound)
            if self.mix_logits is not None:
                self.mix_logits.zero_()

    def mix_weights(self) -> Tensor:
        """The mixing weights m [L]: uniform, or the softmax of the learned logits."""
        if self.mix_logits is not None:
            return self.mix_logits.softmax(0)
        return self.bias.new_full((len(self.tap_widths),), 1 / len(self.tap_widths))

    def draw_view_keep(self, batch: int, device: torch.device) -> Tensor | None:
        """View dropout's draw: a bool [B], False where an example's view is zeroed; None where none is."""
        if not (self.training and self.view_width and self.view_dropout > 0):
            return None
        return torch.rand(batch, device=device) >= self.view_dropout

    def forward(
        self,
        taps: Tensor | Sequence[Tensor],
        view: Tensor | None = None,
        *,
        zeroed_view: bool = False,
    ) -> EnsembleOutput:
        """Combine the taps with the view.

        Args:
            taps: [L, B, D], or L tensors [B, D_l] when the widths differ.
            view: [B, V]; None exactly when ``view_width`` is 0.
            zeroed_view: also return the prediction with the view zeroed, for the blend
                ``(1 - a) y(tap, view) + a y(tap, 0)``.

        Raises:
            ValueError: if a shape does not fit the constructor's widths; the message names the argument.
        """
        check_ensemble_inputs(taps, view, self.tap_widths, self.view_width)
        if view is not None:
            view = norm(view) if self.normalize else view
            keep = self.draw_view_keep(view.shape[0], view.device)
            if keep is not None:  # where, not a product: a NaN in a dropped view must not survive as NaN * 0
                view = torch.where(keep[:, None], view, torch.zeros_like(view))
        layer_logits, without_view = [], []
        tap_weights = self.tap_weight.split(self.tap_widths)
        for layer, tap in enumerate(taps):
            tap = norm(tap) if self.normalize else tap
            before = tap @ tap_weights[layer] + self.bias[layer]  # A_l's first product, with the view zeroed
            if zeroed_view:
                without_view.append(self._adapt(before, layer))
            if view is not None and self.view_weight is not None:
                before = before + view @ self.view_weight[:, layer]
            layer_logits.append(self._adapt(before, layer))
        stacked = torch.stack(layer_logits)
        m = self.mix_weights().to(stacked.dtype)
        logits = torch.einsum("l,lbc->bc", m, stacked)
        if not zeroed_view:
            return EnsembleOutput(logits, stacked)
        stacked_without = torch.stack(without_view)
        return EnsembleOutput(logits, stacked, torch.einsum("l,lbc->bc", m, stacked_without), stacked_without)

    def without_taps(self, view: Tensor) -> EnsembleOutput:
        """The view's own prediction ``y(0, view)``: every normalised tap zero, no example's view dropped.

        Args:
            view: [B, V].

        Raises:
            ValueError: if the view does not fit, or the ensemble has none; the message names the argument.
        """
        check_view(view, self.view_width, view.shape[0])
        assert self.view_weight is not None
        view = norm(view) if self.normalize else view
        layers = range(len(self.tap_widths))
        stacked = torch.stack([self._adapt(self.bias[i] + view @ self.view_weight[:, i], i) for i in layers])
        return EnsembleOutput(torch.einsum("l,lbc->bc", self.mix_weights().to(stacked.dtype), stacked), stacked)

    def _adapt(self, before_activation: Tensor, layer: int) -> Tensor:
        """What follows the first product of A_l: nothing for a linear one, else act, dropout, Linear."""
        if self.output_weight is None or self.output_bias is None:
            return before_activation
        hidden = ACTIVATIONS[self.activation](before_activation)
        hidden = F.dropout(hidden, self.dropout, self.training)
        return hidden @ self.output_weight[:, layer].T + self.output_bias[layer]

    def extra_repr(self) -> str:
        """The constructor's arguments, for ``repr``."""
        widths = sorted(set(self.tap_widths))
        shown = f"{len(self.tap_widths)} taps of {widths[0]}" if len(widths) == 1 else f"taps {self.tap_widths}"
        return (
            f"{shown}, view_width={self.view_width}, num_outputs={self.num_outputs}, "
            f"hidden_width={self.hidden_width}, activation={self.activation!r}, normalize={self.normalize}, "
            f"mix={self.mix!r}, dropout={self.dropout}, view_dropout={self.view_dropout}"
        )


def layerwise_loss(layer_logits: Tensor, target: Tensor, problem_type: ProblemType) -> Tensor:
    """Mean over layers of the task's loss: ``mean_l loss(y_l, t)``, a scalar.

    Args:
        layer_logits: [L, B, C].
        target: [B] int64 class indices (−100 is ignored) for "single_label_classification"; [B, C] floats in
            [0, 1] for "multi_label_classification"; [B] or [B, C] floats for "regression" (MSE).
        problem_type: transformers' convention, as above.
    """
    return torch.stack([task_loss(logits, target, problem_type) for logits in layer_logits]).mean()


def task_loss(logits: Tensor, target: Tensor, problem_type: ProblemType) -> Tensor:
    """The task's loss on one prediction [B, C]; ``target`` as in :func:`layerwise_loss`."""
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits.float(), target)
    if problem_type == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), target.float())
    if problem_type == "regression":
        return F.mse_loss(logits.float(), target.float().reshape(logits.shape))
    raise ValueError(f"problem_type: expected one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")


def objective_loss(output: EnsembleOutput, target: Tensor, problem_type: ProblemType, objective: Objective) -> Tensor:
    """LEVI's objective: "per_layer", "ensemble", or "both" (their mean); a scalar."""
    if objective == "per_layer":
        return layerwise_loss(output.layer_logits, target, problem_type)
    if objective == "ensemble":
        return task_loss(output.logits, target, problem_type)
    if objective == "both":
        per_layer = layerwise_loss(output.layer_logits, target, problem_type)
        return (per_layer + task_loss(output.logits, target, problem_type)) / 2
    raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}")


def blend(output: EnsembleOutput, weight: float) -> EnsembleOutput:
    """The blended prediction ``(1 - a) y(tap, view) + a y(tap, 0)`` with ``a = weight`` in [0, 1]."""
    if weight == 0 or output.logits_without_view is None or output.layer_logits_without_view is None:
        return output
    without_view = EnsembleOutput(output.logits_without_view, output.layer_logits_without_view)
    return mixed(output, without_view, weight)


def mixed(output: EnsembleOutput, other: EnsembleOutput, weight: float) -> EnsembleOutput:
    """``(1 - weight) output + weight other`` of logits and layer logits, for a weight in [0, 1]."""
    if weight == 0:
        return output
    return output._replace(
        logits=torch.lerp(output.logits, other.logits, weight),
        layer_logits=torch.lerp(output.layer_logits, other.layer_logits, weight),
    )


def check_ensemble_arguments(
    tap_widths: Sequence[int],
    view_width: int,
    num_outputs: int,
    hidden_width: int | None,
    activation: str,
    mix: str,
    dropout: float,
    view_dropout: float,
) -> None:
    """Raise ValueError, naming the argument, unless the constructor's arguments make an ensemble."""
    if not tap_widths or any(width < 0 for width in tap_widths):
        raise ValueError(f"tap_widths: expected at least one width >= 0, got {list(tap_widths)}")
    if view_width < 0:
        raise ValueError(f"view_width: expected >= 0 (0: no view), got {view_width}")
    if view_width == 0 and 0 in tap_widths:
        raise ValueError("tap_widths: a width of 0 needs a view, got view_width=0")
    if num_outputs < 1:
        raise ValueError(f"num_outputs: expected >= 1, got {num_outputs}")
    if hidden_width is not None and hidden_width < 1:
        raise ValueError(f"hidden_width: expected >= 1, or None for linear adapting layers, got {hidden_width}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if mix not in ("mean", "learned"):
        raise ValueError(f"mix: expected 'mean' or 'learned', got {mix!r}")
    for name, value in (("dropout", dropout), ("view_dropout", view_dropout)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a probability in [0, 1], got {value}")
    if dropout and hidden_width is None:
        raise ValueError(f"dropout: acts on hidden activations, and hidden_width=None has none; got {dropout}")


def check_ensemble_inputs(
    taps: Tensor | Sequence[Tensor], view: Tensor | None, tap_widths: Sequence[int], view_width: int
) -> None:
    """Raise ValueError, naming the argument, unless taps and view fit the ensemble's widths."""
    if isinstance(taps, Tensor) and taps.dim() != 3:
        raise ValueError(f"taps: expected [L, B, D], or L tensors [B, D_l], got shape {list(taps.shape)}")
    if len(taps) != len(tap_widths):
        raise ValueError(f"taps: expected {len(tap_widths)} layers, got {len(taps)}")
    # A stacked tensor by its shape alone: going through it would make a tensor of every layer.
    stacked = taps.shape[1:] if isinstance(taps, Tensor) else None
    if stacked is not None and tap_widths.count(stacked[1]) == len(tap_widths):
        batch = stacked[0]
    else:
        shapes = [tap.shape for tap in taps] if stacked is None else [stacked] * len(tap_widths)
        batch = shapes[0][0] if shapes[0] else 0
        for layer, (shape, width) in enumerate(zip(shapes, tap_widths, strict=True)):
            if len(shape) != 2 or shape[0] != batch or shape[1] != width:
                raise ValueError(f"taps[{layer}]: expected [{batch}, {width}], got {list(shape)}")
    check_view(view, view_width, batch)


def check_view(view: Tensor | None, view_width: int, batch: int) -> None:
    """Raise ValueError unless a view is [batch, view_width], or None where that is 0."""
    if view is None:
        if view_width:
            raise ValueError(f"view: expected [{batch}, {view_width}], got None (view_width=0 is for taps alone)")
    elif view_width == 0:
        raise ValueError(f"view: expected None, as view_width is 0; got shape {list(view.shape)}")
    elif list(view.shape) != [batch, view_width]:
        raise ValueError(f"view: expected [{batch}, {view_width}], got {list(view.shape)}")
