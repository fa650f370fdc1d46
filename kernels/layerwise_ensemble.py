"""The layer-wise ensemble, hand-batched in PyTorch: one batched GEMM over all taps, one GEMM for the view.

``W [tap ; view] = W_t tap + W_v view``: the concatenation is never built, and all layers' view products are
one GEMM. This is the eager twin that any faster backend is compared with and falls back to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}

EnsembleTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def layerwise_ensemble_eager(
    taps: Tensor | Sequence[Tensor],
    view: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    *,
    activation: str,
    normalize: bool,
    view_keep: Tensor | None,
    dropout: float,
    zeroed_view: bool,
) -> EnsembleTensors:
    """See :func:`levi_fast.functional.layerwise_ensemble`, which checks the arguments and calls this."""
    before = _tap_products(taps, tap_weight, bias, normalize)  # [L, B, K]

    def adapt(first: Tensor) -> tuple[Tensor, Tensor]:
        layer_logits = first
        if output_weight is not None and output_bias is not None:
            hidden = F.dropout(ACTIVATIONS[activation](first), dropout, training=dropout > 0)
            layer_logits = torch.baddbmm(output_bias[:, None], hidden, output_weight.permute(1, 2, 0))
        if mix_weights is None:
            return layer_logits.mean(0), layer_logits
        return torch.einsum("l,lbc->bc", mix_weights.to(layer_logits.dtype), layer_logits), layer_logits

    without = adapt(before) if zeroed_view else (None, None)
    if view is not None and view_weight is not None:
        before = before + _view_products(view, view_weight, normalize, view_keep)
    return *adapt(before), *without


def _tap_products(taps: Tensor | Sequence[Tensor], tap_weight: Tensor, bias: Tensor, normalize: bool) -> Tensor:
    """``norm(tap_l) W_l + b_l`` for all layers, [L, B, K]."""
    if isinstance(taps, Tensor) and taps.shape[2]:
        layers, _, width = taps.shape
        taps = F.layer_norm(taps, (width,)) if normalize else taps
        return torch.baddbmm(bias[:, None], taps, tap_weight.view(layers, width, -1))
    weights = tap_weight.split([tap.shape[1] for tap in taps])
    return torch.stack(
        [
            torch.addmm(row, F.layer_norm(tap, tap.shape[1:]) if normalize and tap.shape[1] else tap, weight)
            for tap, weight, row in zip(taps, weights, bias, strict=True)
        ]
    )


def _view_products(view: Tensor, view_weight: Tensor, normalize: bool, keep: Tensor | None) -> Tensor:
    """``norm(view) V_l`` for all layers as one GEMM, [L, B, K]; a view that is not kept counts as zero."""
    width, layers, outputs = view_weight.shape
    view = F.layer_norm(view, (width,)) if normalize else view
    if keep is not None:  # where, not a product: a NaN in a dropped view must not survive as NaN * 0
        view = torch.where(keep[:, None], view, torch.zeros_like(view))
    product = view @ view_weight.reshape(width, layers * outputs)
    return product.view(-1, layers, outputs).transpose(0, 1)
