"""Public stateless ops: contracts and argument checks, in the method's words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from levi_fast import kernels
from levi_fast.kernels.layerwise_ensemble_eager import ACTIVATION_NAMES
from levi_fast.kernels.layerwise_loss import PROBLEM_TYPES


def masked_mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of each example's kept tokens: ``out[b] = sum_t keep[b, t] hidden[b, t] / sum_t keep[b, t]``.

    Sums are taken in fp32 (fp64 for fp64). A masked token's value is never added, so NaN or infinity in the padding
    reaches no result. The same inputs give the same bits, whatever the number of threads. Works under
    ``torch.compile(fullgraph=True)``, ``torch.export``, autocast (which leaves the dtype alone) and inference mode.

    Args:
        hidden: [B, T, D], float32, bfloat16, float16 or float64, any strides. B, T and D may be 0.
        mask: [B, T], bool, integer or real floating-point, on the same device; nonzero keeps a token. None keeps all.

    Returns:
        [B, D] in the dtype of ``hidden``; zeros for an example that keeps nothing. Differentiable once with respect
        to ``hidden``; where that asks for no gradient, nothing is saved.

    Raises:
        RuntimeError: for a wrong number of dimensions, shape, dtype or device, naming the argument; on
            differentiating the gradient again.
        levi_fast.kernels.BackendUnavailableError: if a backend was asked for by name and cannot serve.
    """
    return kernels.masked_mean_pool(hidden, mask)


def masked_mean_pool_into(
    out: Tensor, hidden: Tensor, mask: Tensor | None = None, *, normalize: bool = False
) -> Tensor:
    """:func:`masked_mean_pool` of a frozen model's activations, written where it belongs: into a slice of a bank.

    Args:
        out: [B, D], any strides; a slice of an [L, B, D] bank.
        hidden: [B, T, D].
        mask: [B, T] or None.
        normalize: also LayerNorm each pooled row, without affine parameters.

    Returns:
        ``out``. No gradient flows through it. On a GPU that Triton serves, pooling, LayerNorm and the writing are one
        launch or two; elsewhere the pooled rows are copied.

    Raises:
        ValueError: if ``out`` has another shape than [B, D].
        RuntimeError: as :func:`masked_mean_pool`.
    """
    if hidden.dim() == 3 and out.shape != (hidden.shape[0], hidden.shape[2]):
        raise ValueError(f"out: expected {[hidden.shape[0], hidden.shape[2]]}, got {list(out.shape)}")
    return kernels.masked_mean_pool_into(out, hidden, mask, normalize)


def layerwise_ensemble(
    taps: Tensor | Sequence[Tensor],
    view: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None = None,
    output_bias: Tensor | None = None,
    mix_weights: Tensor | None = None,
    *,
    activation: str = "gelu",
    normalize: bool = True,
    view_keep: Tensor | None = None,
    dropout: float = 0.0,
    zeroed_view: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """LEVI's layer-wise ensemble (Roh et al. 2024): ``y_l = A_l([norm(tap_l) ; norm(view)])``, ``y = sum_l m_l y_l``.

    Args:
        taps: [L, B, D], or L tensors [B, D_l].
        view: [B, V], or None for taps alone.
        tap_weight: [sum_l D_l, K]; layer l's rows follow layer l-1's. K = H, or C without an output layer.
        view_weight: [V, L, K]; None exactly when ``view`` is.
        bias: [L, K].
        output_weight: [C, L, H], or None for linear adapting layers.
        output_bias: [L, C]; None exactly when ``output_weight`` is.
        mix_weights: m [L]; None for 1/L.
        activation: "gelu" (exact), "relu", "silu" or "tanh"; unused without an output layer.
        normalize: LayerNorm without affine parameters on each tap and on the view.
        view_keep: bool [B], False where an example's view counts as zero; None keeps all.
        dropout: probability of dropping a hidden activation; drawn from torch's default generator.
        zeroed_view: also return the predictions with every view zeroed.

    Returns:
        logits [B, C], layer_logits [L, B, C], and the same two with the view zeroed (None, None unless asked).

    Raises:
        ValueError: if a shape does not fit the others, or an option is unknown; the message names the argument.
    """
    _require_ensemble_shapes(taps, view, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights)
    if activation not in ACTIVATION_NAMES:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATION_NAMES)}, got {activation!r}")
    if view_keep is not None and (view is None or view_keep.shape != view.shape[:1]):
        shown = None if view is None else [view.shape[0]]
        raise ValueError(f"view_keep: expected {shown}, one a view, got {list(view_keep.shape)}")
    return checked_ensemble(taps, view, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights,
                            activation, normalize, view_keep, dropout, zeroed_view)  # fmt: skip


def checked_ensemble(
    taps: Tensor | Sequence[Tensor],
    view: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    activation: str,
    normalize: bool,
    view_keep: Tensor | None,
    dropout: float,
    zeroed_view: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """:func:`layerwise_ensemble` for a caller that has checked its arguments: casts, draws dropout, dispatches."""
    rows = (taps,) if isinstance(taps, Tensor) else tuple(taps)
    device = tap_weight.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows = tuple(tap.to(dtype) for tap in rows)
        tap_weight, bias = tap_weight.to(dtype), bias.to(dtype)
        view, view_weight, output_weight, output_bias = (
            None if tensor is None else tensor.to(dtype) for tensor in (view, view_weight, output_weight, output_bias)
        )
    hidden_keep = None
    if dropout > 0 and output_weight is not None:
        shape = (bias.shape[0], rows[0].shape[-2], bias.shape[1])
        hidden_keep = torch.rand(shape, device=tap_weight.device) >= dropout
    return kernels.layerwise_ensemble(
        rows,
        view,
        view_keep,
        tap_weight,
        view_weight,
        bias,
        output_weight,
        output_bias,
        mix_weights,
        hidden_keep,
        ACTIVATION_NAMES.index(activation),
        normalize,
        dropout,
        zeroed_view,
    )


def layerwise_loss(layer_logits: Tensor, target: Tensor, problem_type: str) -> Tensor:
    """Mean over layers of the task's loss, ``mean_l loss(y_l, t)``: a float32 scalar.

    Args:
        layer_logits: [L, B, C].
        target: [B] int64 class indices (-100 is ignored) for "single_label_classification"; [B, C] floats in
            [0, 1] for "multi_label_classification"; [B] (C = 1) or [B, C] floats for "regression" (MSE).
        problem_type: transformers' convention, as above.

    Raises:
        ValueError: for an unknown problem type, or a target whose shape or dtype does not fit it.
    """
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type: expected one of {', '.join(PROBLEM_TYPES)}, got {problem_type!r}")
    if layer_logits.dim() != 3:
        raise ValueError(f"layer_logits: expected [L, B, C], got {list(layer_logits.shape)}")
    _, batch, outputs = layer_logits.shape
    if problem_type == "single_label_classification":
        if list(target.shape) != [batch] or target.is_floating_point():
            raise ValueError(f"target: expected [{batch}] int64 classes, got {list(target.shape)} {target.dtype}")
    elif list(target.shape) != [batch, outputs] and not (outputs == 1 and list(target.shape) == [batch]):
        raise ValueError(f"target: expected [{batch}, {outputs}] for {problem_type}, got {list(target.shape)}")
    if problem_type == "single_label_classification":
        target = target.to(torch.int64)
    else:
        target = target.to(torch.float32).reshape(batch, outputs)
    return kernels.layerwise_loss(layer_logits, target, PROBLEM_TYPES.index(problem_type))


def _require_ensemble_shapes(
    taps: Tensor | Sequence[Tensor],
    view: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
) -> None:
    if isinstance(taps, Tensor) and taps.dim() != 3:
        raise ValueError(f"taps: expected [L, B, D], or L tensors [B, D_l], got {list(taps.shape)}")
    if isinstance(taps, Tensor):  # by its shape alone: going through it would make a tensor of every layer
        layers, batch, columns = taps.shape[0], taps.shape[1], taps.shape[0] * taps.shape[2]
    else:
        layers, batch = len(taps), taps[0].shape[0] if len(taps) else 0
        for layer, tap in enumerate(taps):
            if tap.dim() != 2 or tap.shape[0] != batch:
                raise ValueError(f"taps[{layer}]: expected [{batch}, D], got {list(tap.shape)}")
        columns = sum(tap.shape[1] for tap in taps)
    if bias.dim() != 2 or bias.shape[0] != layers or not layers:
        raise ValueError(f"bias: expected [{max(layers, 1)}, K], one row a tap, got {list(bias.shape)}")
    first = bias.shape[1]
    expected: list[tuple[str, Tensor | None, list[int] | None]] = [
        ("tap_weight", tap_weight, [columns, first]),
        ("mix_weights", mix_weights, None if mix_weights is None else [layers]),
    ]
    if (view is None) != (view_weight is None):
        raise ValueError("view_weight: expected exactly when view is given")
    if view is not None:
        if view.dim() != 2 or view.shape[0] != batch:
            raise ValueError(f"view: expected [{batch}, V], got {list(view.shape)}")
        expected.append(("view_weight", view_weight, [view.shape[1], layers, first]))
    if (output_weight is None) != (output_bias is None):
        raise ValueError("output_bias: expected exactly when output_weight is given")
    if output_weight is not None:
        outputs = output_weight.shape[0]
        expected += [
            ("output_weight", output_weight, [outputs, layers, first]),
            ("output_bias", output_bias, [layers, outputs]),
        ]
    for name, tensor, shape in expected:
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected {shape}, got {list(tensor.shape)}")
