"""layerwise_ensemble on GPUs, forward: how the kernels of ensemble_forward_kernels_triton.py are launched, and why.

    before_l = norm(tap_l) W_l + norm(view) V_l + b_l        [B, K]   one launch for all layers
    y_l      = drop(act(before_l)) O_l + c_l                 [B, C]   one launch for all layers
    y        = sum_l m_l y_l                                 [B, C]

The first launch finds LayerNorm's statistics (see ensemble_tiles_triton.py). The second keeps the tap's and the
view's product in one fp32 accumulator, so the concatenation and the two products are never written; the prediction
with the view zeroed is the same accumulator, stored before the view is added. All layers' tiles are in one grid: 32
layers of a small head fill the chip where one layer cannot.

With few examples the time is the time to read the weights, and a grid of output tiles has too few programs to read
at full bandwidth: then the sum over features is cut into parts, each part's [B, K] product goes to memory in fp32,
and a further launch adds them in their order. No atomics anywhere: the same inputs give the same bits.

The activation is taken when ``before`` is read for the second product, not when it is written: the backward needs
``before`` itself, and H values an example are few beside the D + V read for them. The sum over layers is a launch of
its own, in the layers' order; inside the second product it would leave L times fewer programs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from levi_fast.kernels.ensemble_forward_kernels_triton import (
    finish_first_product_kernel,
    first_product_kernel,
    mix_kernel,
    output_kernel,
)
from levi_fast.kernels.ensemble_tiles_triton import dot_precision, locate, row_stats
from levi_fast.kernels.launch_configs import ProductConfig, ceil_div, device_traits, tuned_or

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 32768  # features of a tap or the view; the LayerNorm's backward holds a row in registers
_ELEMENTS = 1024  # of one program of an elementwise launch
_FINISHED = 512  # of one program that adds parts: few examples make few elements, and more would spill


def declined(
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor | None,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
) -> str | None:
    """Why these tensors are not for the Triton kernels, or None where they are.

    Sizes that do not fit each other are declined too: a kernel would read past the end, PyTorch's operators raise.
    """
    if tap_weight.dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, got {tap_weight.dtype}"
    layers = taps[0].shape[0] if taps[0].dim() == 3 else len(taps)
    batch, width = taps[0].shape[-2], tap_weight.shape[1]
    widths = [taps[0].shape[2]] * layers if taps[0].dim() == 3 else [tap.shape[1] for tap in taps]
    outputs = width if output_weight is None else output_weight.shape[0]
    view_width = 0 if view is None else view.shape[1]
    if max(*widths, view_width) > WIDEST:
        return f"the Triton kernels take at most {WIDEST} features, got {max(*widths, view_width)}"
    expected = {
        "tap_weight": (tap_weight, (sum(widths), width)),
        "view": (view, (batch, view_width)),
        "view_keep": (view_keep, (batch,)),
        "view_weight": (view_weight, (view_width, layers, width)),
        "bias": (bias, (layers, width)),
        "output_weight": (output_weight, (outputs, layers, width)),
        "output_bias": (output_bias, (layers, outputs)),
        "mix_weights": (mix_weights, (layers,)),
        "hidden_keep": (hidden_keep, (layers, batch, width)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{name} must be {list(shape)}, got {list(tensor.shape)}"
    if any(tap.shape[-2] != batch for tap in taps):
        return "the taps differ in their number of examples"
    return None


def dropout_scale(dropout: float) -> float:
    """What a kept activation is multiplied with."""
    return 1 / (1 - dropout) if dropout < 1 else 0.0


def forward(
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
    *,
    config: ProductConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``levi_fast::layerwise_ensemble`` on the device of ``taps``; see its schema for the arguments.

    Args:
        config: the first product's launch; None takes the device's tuned one or the heuristic's.

    Returns:
        logits [B, C], layer_logits [L, B, C], the same two with the view zeroed, and ``before`` [L, B, H] with and
        without the view; what was not asked for is an empty tensor.
    """
    located = locate(taps)
    layers, first = located.layers, bias.shape[1]
    batch = taps[0].shape[-2]
    width = max(located.widths)
    view_width = 0 if view is None else view.shape[1]
    outputs = first if output_weight is None else output_weight.shape[0]
    empty = bias.new_empty

    before = empty((layers, batch, first))
    before_zeroed = empty((layers, batch, first)) if zeroed_view else empty(0)
    logits = empty((batch, outputs))
    logits_zeroed = empty((batch, outputs)) if zeroed_view else empty(0)
    layer_logits, layer_logits_zeroed = before, before_zeroed
    if output_weight is not None:
        layer_logits = empty((layers, batch, outputs))
        layer_logits_zeroed = empty((layers, batch, outputs)) if zeroed_view else empty(0)
    saved = (before, before_zeroed) if save and output_weight is not None else (empty(0), empty(0))
    results = (logits, layer_logits, logits_zeroed, layer_logits_zeroed, *saved)
    if not batch:
        return results

    traits = device_traits(bias.device)
    if config is None:
        reduction = width + view_width
        heuristic = ProductConfig.from_tile_heuristic(traits, layers, batch, first, reduction, bias.element_size())
        config = tuned_or(
            heuristic, traits, "first_product", bias.dtype, L=layers, B=batch, D=width, V=view_width, K=first
        )
    stats = row_stats(located, view, batch) if normalize else before
    part_length = ceil_div(ceil_div(width + view_width, config.splits), config.block_k) * config.block_k
    part_length = max(part_length, config.block_k)
    # At least one part is the tap's, though it be empty, so that the view's parts follow it.
    tap_parts = max(1, ceil_div(width, part_length))
    parts = tap_parts + ceil_div(view_width, part_length)
    split = config.splits > 1
    if not split:
        tap_parts = parts = 1
    partial = empty((parts, layers, batch, first), dtype=torch.float32) if split else before
    tiles = ceil_div(batch, config.block_m) * ceil_div(first, config.block_n)
    first_product_kernel[(tiles, layers, parts)](
        located.bank,
        located.table,
        stats,
        bias if view is None else view,
        bias if view_keep is None else view_keep.contiguous().view(torch.uint8),
        tap_weight.contiguous(),
        bias if view_weight is None else view_weight.contiguous(),
        bias.contiguous(),
        before,
        before_zeroed,
        partial,
        batch,
        width,
        view_width,
        first,
        layers,
        *located.strides,
        *((0, 0) if view is None else view.stride()),
        tap_parts,
        part_length,
        **located.constants,
        VIEW_UNIT=view is not None and view.stride(1) == 1,
        HAS_VIEW=view is not None,
        HAS_KEEP=view_keep is not None,
        NORMALIZE=normalize,
        ZEROED=zeroed_view,
        SPLIT=split,
        PRECISION=dot_precision(bias.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split:
        finish_first_product_kernel[(ceil_div(batch * first, _FINISHED), layers)](
            partial, bias.contiguous(), before, before_zeroed, batch, first, layers, tap_parts, parts,
            ZEROED=zeroed_view, BLOCK=_FINISHED,
        )  # fmt: skip
    if output_weight is not None and output_bias is not None:
        stacked = 2 * layers if zeroed_view else layers
        heuristic = ProductConfig.from_tile_heuristic(traits, stacked, batch, outputs, first, bias.element_size())
        out = tuned_or(heuristic, traits, "output", bias.dtype, L=layers, B=batch, K=first, C=outputs)
        tiles = ceil_div(batch, out.block_m) * ceil_div(outputs, out.block_n)
        output_kernel[(tiles, stacked)](
            before,
            before_zeroed,
            before if hidden_keep is None else hidden_keep.contiguous().view(torch.uint8),
            output_weight.contiguous(),
            output_bias.contiguous(),
            layer_logits,
            layer_logits_zeroed,
            batch,
            first,
            outputs,
            layers,
            dropout_scale(dropout),
            ACTIVATION=activation,
            HAS_KEEP=hidden_keep is not None,
            PRECISION=dot_precision(bias.dtype),
            BLOCK_M=out.block_m,
            BLOCK_N=out.block_n,
            BLOCK_K=out.block_k,
            GROUP_M=out.group_m,
            num_warps=out.num_warps,
            num_stages=out.num_stages,
        )
    mix_kernel[(ceil_div(batch * outputs, _ELEMENTS), 2 if zeroed_view else 1)](
        layer_logits, layer_logits_zeroed, layer_logits if mix_weights is None else mix_weights.contiguous(),
        logits, logits_zeroed, batch * outputs, layers, HAS_MIX=mix_weights is not None, BLOCK=_ELEMENTS,
    )  # fmt: skip
    return results
