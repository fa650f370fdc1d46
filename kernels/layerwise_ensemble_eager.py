"""The layer-wise ensemble in plain PyTorch, forward and backward: the eager twin of the op, for any device and dtype.

``W [tap ; view] = W_t tap + W_v view``: the concatenation is never built; all taps are one batched GEMM and all
layers' view products are one GEMM.
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
ACTIVATION_NAMES = tuple(ACTIVATIONS)  # an op's int ``activation`` is an index into this

# Bits of the backward op's ``needs``, in the order of its results (the taps' gradients come last, one a tap).
NEEDS = ("view", "tap_weight", "view_weight", "bias", "output_weight", "output_bias", "mix_weights", "taps")

EnsembleTensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def ensemble(
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    activation: int,
    normalize: bool,
    dropout: float,
    zeroed_view: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The whole computation, differentiable by PyTorch itself (any number of times, forward mode and vmap too).

    Returns:
        [logits, layer_logits, the same two with the view zeroed], and the pre-activations [L, B, K] with the view and
        with the view zeroed.
    """
    zeroed = _tap_products(taps, tap_weight, bias, normalize)
    before = zeroed
    if view is not None and view_weight is not None:
        before = before + _view_products(view, view_weight, normalize, view_keep)

    def adapt(first: Tensor) -> list[Tensor | None]:
        layer_logits = first
        if output_weight is not None and output_bias is not None:
            hidden = _drop(ACTIVATIONS[ACTIVATION_NAMES[activation]](first), hidden_keep, dropout)
            layer_logits = torch.baddbmm(output_bias[:, None], hidden, output_weight.permute(1, 2, 0))
        if mix_weights is None:
            return [layer_logits.mean(0), layer_logits]
        return [torch.einsum("l,lbc->bc", mix_weights.to(layer_logits.dtype), layer_logits), layer_logits]

    without = adapt(zeroed) if zeroed_view else [None, None]
    return [*adapt(before), *without], [before, zeroed if zeroed_view else None]


def _drop(hidden: Tensor, keep: Tensor | None, dropout: float) -> Tensor:
    """Dropout with a given draw: where, not a product, so that a dropped NaN does not survive as NaN * 0."""
    if keep is None:
        return hidden
    scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    return torch.where(keep, hidden * scale, torch.zeros_like(hidden))


def _normed(x: Tensor, normalize: bool) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) if normalize and x.shape[-1] else x


def _tap_products(taps: Sequence[Tensor], tap_weight: Tensor, bias: Tensor, normalize: bool) -> Tensor:
    """``norm(tap_l) W_l + b_l`` for all layers, [L, B, K]."""
    if taps[0].dim() == 3 and taps[0].shape[2]:
        layers, _, width = taps[0].shape
        return torch.baddbmm(bias[:, None], _normed(taps[0], normalize), tap_weight.view(layers, width, -1))
    rows = _rows(taps)
    weights = tap_weight.split([tap.shape[1] for tap in rows])
    return torch.stack(
        [torch.addmm(b, _normed(tap, normalize), weight) for tap, weight, b in zip(rows, weights, bias, strict=True)]
    )


def _rows(taps: Sequence[Tensor]) -> Sequence[Tensor]:
    """L tensors [B, D_l], also where they came as one [L, B, D]."""
    return taps[0].unbind(0) if taps[0].dim() == 3 else taps


def _view_rows(view: Tensor, normalize: bool, keep: Tensor | None) -> Tensor:
    """``norm(view)`` [B, V]; a view that is not kept counts as zero."""
    view = _normed(view, normalize)
    # where, not a product: a NaN in a dropped view must not survive as NaN * 0
    return view if keep is None else torch.where(keep[:, None], view, torch.zeros_like(view))


def _view_products(view: Tensor, view_weight: Tensor, normalize: bool, keep: Tensor | None) -> Tensor:
    """``norm(view) V_l`` for all layers as one GEMM, [L, B, K]."""
    width, layers, outputs = view_weight.shape
    product = _view_rows(view, normalize, keep) @ view_weight.reshape(width, layers * outputs)
    return product.view(-1, layers, outputs).transpose(0, 1)


def eager_forward(
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    activation: int,
    normalize: bool,
    dropout: float,
    zeroed_view: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``levi_fast::layerwise_ensemble``; what was not asked for is an empty tensor."""
    outputs, before = ensemble(
        taps, view, view_keep, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights, hidden_keep,
        activation, normalize, dropout, zeroed_view,
    )  # fmt: skip
    if not save or output_weight is None:  # a linear layer's pre-activations are its layer_logits
        before = [None, None]
    empty = [bias.new_empty(0) if t is None else t for t in (*outputs, *before)]
    if output_weight is None and zeroed_view and (view is None or view_weight is None):
        empty[3] = empty[3].clone()  # no two results of an op may share memory
    if before[1] is not None and before[1] is before[0]:
        empty[5] = empty[5].clone()
    return empty[0], empty[1], empty[2], empty[3], empty[4], empty[5]


def eager_backward(
    grad_logits: Tensor | None,
    grad_layer_logits: Tensor | None,
    grad_logits_zeroed: Tensor | None,
    grad_layer_logits_zeroed: Tensor | None,
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    output_weight: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    layer_logits: Tensor | None,
    layer_logits_zeroed: Tensor | None,
    before: Tensor,
    before_zeroed: Tensor,
    activation: int,
    normalize: bool,
    dropout: float,
    needs: int,
) -> list[Tensor]:
    """The op ``levi_fast::layerwise_ensemble_backward``: gradients as in :data:`NEEDS`, empty where not asked.

    ``layer_logits`` are read for the gradient of ``mix_weights`` alone, taps for their weight's and their own.
    """
    wanted = {name: bool(needs >> bit & 1) for bit, name in enumerate(NEEDS)}
    rows = _rows(taps)
    layers, batch = len(rows), rows[0].shape[0]
    outputs = tap_weight.shape[1] if output_weight is None else output_weight.shape[0]
    mix = tap_weight.new_full((layers,), 1 / layers) if mix_weights is None else mix_weights.to(tap_weight.dtype)
    results: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        results[name] = results[name] + value if name in results else value

    def through_output(g: Tensor | None, g_layers: Tensor | None, y: Tensor | None, first: Tensor) -> Tensor | None:
        """Gradient at the pre-activations [L, B, K]."""
        if g is None and g_layers is None:
            return None
        if g is not None and wanted["mix_weights"] and y is not None:
            add("mix_weights", torch.einsum("bc,lbc->l", g, y))
        dy = g_layers
        if g is not None:
            mixed = mix[:, None, None] * g
            dy = mixed if dy is None else dy + mixed
        assert dy is not None
        if output_weight is None:
            return dy
        if wanted["output_bias"]:
            add("output_bias", dy.sum(1))
        if wanted["output_weight"]:
            hidden = _drop(ACTIVATIONS[ACTIVATION_NAMES[activation]](first), hidden_keep, dropout)
            add("output_weight", (dy.transpose(1, 2) @ hidden).transpose(0, 1))
        dh = _drop(dy @ output_weight.transpose(0, 1), hidden_keep, dropout)
        return _activation_backward(dh, first, activation)

    with_view = through_output(grad_logits, grad_layer_logits, layer_logits, before)
    zeroed = through_output(grad_logits_zeroed, grad_layer_logits_zeroed, layer_logits_zeroed, before_zeroed)
    parts = [part for part in (with_view, zeroed) if part is not None]
    width = outputs if output_weight is None else output_weight.shape[2]
    if not parts:
        parts = [tap_weight.new_zeros(layers, batch, width)]
    both = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    if wanted["bias"]:
        results["bias"] = both.sum(1)
    if wanted["tap_weight"]:
        grads = [_normed(tap, normalize).T @ d for tap, d in zip(rows, both, strict=True)]
        results["tap_weight"] = torch.cat(grads)
    if view is not None and view_weight is not None:
        d = both.new_zeros(both.shape) if with_view is None else with_view
        flat = d.transpose(0, 1).reshape(batch, layers * width)
        if wanted["view_weight"]:
            results["view_weight"] = (_view_rows(view, normalize, view_keep).T @ flat).view(-1, layers, width)
        if wanted["view"]:
            dv = flat @ view_weight.reshape(-1, layers * width).T
            if view_keep is not None:
                dv = torch.where(view_keep[:, None], dv, torch.zeros_like(dv))
            results["view"] = _norm_backward(dv, view, normalize)
    tap_grads = [tap_weight.new_empty(0)] * 0
    if wanted["taps"]:
        weights = tap_weight.split([tap.shape[1] for tap in rows])
        tap_grads = [_norm_backward(d @ w.T, tap, normalize) for d, w, tap in zip(both, weights, rows, strict=True)]
        tap_grads = [torch.stack(tap_grads)] if taps[0].dim() == 3 else tap_grads
    dtypes = {"mix_weights": tap_weight.dtype if mix_weights is None else mix_weights.dtype}
    missing = {"mix_weights": mix_weights, "output_weight": output_weight}
    ordered = []
    for name in NEEDS[:-1]:
        value = results.get(name)
        if value is None and wanted[name] and name in ("mix_weights", "output_weight", "output_bias"):
            like = missing.get(name)
            shape = (layers, outputs) if name == "output_bias" else () if like is None else like.shape
            value = tap_weight.new_zeros(shape)
        ordered.append(
            tap_weight.new_empty(0) if value is None else value.to(dtypes.get(name, tap_weight.dtype)).contiguous()
        )
    return [*ordered, *(tap_grads if wanted["taps"] else [tap_weight.new_empty(0) for _ in taps])]


def _activation_backward(grad: Tensor, x: Tensor, activation: int) -> Tensor:
    name = ACTIVATION_NAMES[activation]
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if name == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    return torch.ops.aten.tanh_backward(grad, torch.tanh(x))


def _norm_backward(grad: Tensor, x: Tensor, normalize: bool) -> Tensor:
    if not normalize or not x.shape[-1] or not x.shape[0]:
        return grad.contiguous()
    _, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
    return torch.ops.aten.native_layer_norm_backward(
        grad.contiguous(), x, x.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]
