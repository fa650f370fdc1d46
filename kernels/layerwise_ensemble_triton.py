# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are Triton's: it specialises them itself)
"""layerwise_ensemble on GPUs, forward: the Triton kernels, how they are launched, and why this way.

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
import triton
import triton.language as tl
from torch import Tensor

from levi_fast.kernels.ensemble_tiles_triton import (
    activate,
    dot_precision,
    feature_offsets,
    locate,
    row_stats,
    tap_address,
    tile_of,
)
from levi_fast.kernels.launch_configs import ProductConfig, ceil_div, device_traits, tuned_or

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ELEMENTS = 1024  # of one program of an elementwise launch


@triton.jit
def _add_product(
    acc,
    base,
    row_stride,
    feature_stride,
    weight,
    weight_stride,
    means,
    rstds,
    rows,
    row_in,
    columns,
    K,
    start,
    end,
    UNIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc += norm(x[rows, start:end]) @ weight[start:end, columns]``; rows that are not in count as zero."""
    mean = tl.zeros_like(rows).to(tl.float32)
    rstd = mean
    if NORMALIZE:
        mean = tl.load(means + rows, mask=row_in, other=0.0)
        rstd = tl.load(rstds + rows, mask=row_in, other=0.0)
    x_rows = base + rows[:, None] * row_stride
    column_in = (columns < K)[None, :]
    for k0 in range(start, end, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = k < end
        x = tl.load(
            x_rows + feature_offsets(k, feature_stride, UNIT)[None, :],
            mask=row_in[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + k.to(tl.int64)[:, None] * weight_stride + columns[None, :],
            mask=inside[:, None] & column_in,
            other=0.0,
        )
        if NORMALIZE:
            x = tl.where(inside[None, :], (x.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _first_product_kernel(
    bank,
    table,
    stats,
    view,
    view_keep,
    tap_weight,
    view_weight,
    bias,
    before,
    before_zeroed,
    partial,
    B,
    D,
    V,
    K,
    layers,
    stride_l,
    stride_b,
    stride_d,
    stride_vb,
    stride_vd,
    tap_parts,
    part_length,
    HAS_TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    VIEW_UNIT: tl.constexpr,
    HAS_VIEW: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ZEROED: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of ``before_l``, or one part of its sum: the first ``tap_parts`` are the tap's, the rest the view's."""
    pid_m, pid_n = tile_of(tl.program_id(0), B, K, BLOCK_M, BLOCK_N, GROUP_M)
    layer = tl.program_id(1)
    part = tl.program_id(2)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < B
    inside = row_in[:, None] & (columns < K)[None, :]
    layer64 = layer.to(tl.int64)
    where = (layer64 * B + rows)[:, None] * K + columns[None, :]
    rstds = stats + tl.cast(layers + 1, tl.int64) * B
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    if part < tap_parts:
        base, row_stride, feature_stride, width, first = tap_address(
            bank, table, layer, stride_l, stride_b, stride_d, D, HAS_TABLE, ALIGNED
        )
        start = part * part_length if SPLIT else 0
        end = tl.minimum(start + part_length, width) if SPLIT else width
        acc = _add_product(
            acc, base, row_stride, feature_stride, tap_weight + first * K, K,
            stats + layer64 * B, rstds + layer64 * B, rows, row_in, columns, K, start, end,
            UNIT, NORMALIZE, PRECISION, BLOCK_K,
        )  # fmt: skip
    if not SPLIT:
        acc += tl.load(bias + layer64 * K + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
        if ZEROED:
            tl.store(before_zeroed + where, acc.to(before_zeroed.dtype.element_ty), mask=inside)
    if HAS_VIEW and (not SPLIT or part >= tap_parts):
        kept = row_in
        if HAS_KEEP:  # a dropped view is not read: its NaN would survive a product with zero
            kept = row_in & (tl.load(view_keep + rows, mask=row_in, other=0) != 0)
        start = (part - tap_parts) * part_length if SPLIT else 0
        end = tl.minimum(start + part_length, V) if SPLIT else V
        view_stats = tl.cast(layers, tl.int64) * B
        acc = _add_product(
            acc, view, tl.cast(stride_vb, tl.int64), stride_vd, view_weight + layer64 * K,
            tl.cast(layers, tl.int64) * K,
            stats + view_stats, rstds + view_stats, rows, kept, columns, K, start, end,
            VIEW_UNIT, NORMALIZE, PRECISION, BLOCK_K,
        )  # fmt: skip
    if SPLIT:
        tl.store(partial + part.to(tl.int64) * layers * B * K + where, acc, mask=inside)
    else:
        tl.store(before + where, acc.to(before.dtype.element_ty), mask=inside)


@triton.jit
def _finish_first_product_kernel(
    partial,
    bias,
    before,
    before_zeroed,
    B,
    K,
    layers,
    tap_parts,
    parts,
    ZEROED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the parts of ``before`` in their order."""
    layer = tl.program_id(1).to(tl.int64)
    size = tl.cast(B, tl.int64) * K
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    where = layer * size + i
    acc = tl.load(bias + layer * K + i % K, mask=inside, other=0.0).to(tl.float32)
    for part in range(tap_parts):
        acc += tl.load(partial + part * layers * size + where, mask=inside, other=0.0)
    if ZEROED:
        tl.store(before_zeroed + where, acc.to(before_zeroed.dtype.element_ty), mask=inside)
    for part in range(tap_parts, parts):
        acc += tl.load(partial + part * layers * size + where, mask=inside, other=0.0)
    tl.store(before + where, acc.to(before.dtype.element_ty), mask=inside)


@triton.jit
def _output_kernel(
    before,
    before_zeroed,
    hidden_keep,
    output_weight,
    output_bias,
    layer_logits,
    layer_logits_zeroed,
    B,
    H,
    C,
    layers,
    scale,
    ACTIVATION: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``y_l = drop(act(before_l)) O_l + c_l``; the grid's second half is the prediction with the view zeroed."""
    pid_m, pid_n = tile_of(tl.program_id(0), B, C, BLOCK_M, BLOCK_N, GROUP_M)
    source = before
    result = layer_logits
    if tl.program_id(1) >= layers:
        source = before_zeroed
        result = layer_logits_zeroed
    layer = (tl.program_id(1) % layers).to(tl.int64)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = rows < B
    column_in = columns < C
    starts = ((layer * B + rows) * H)[:, None]
    weights = output_weight + (columns.to(tl.int64) * layers + layer)[None, :] * H
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for h0 in range(0, H, BLOCK_K):
        h = h0 + tl.arange(0, BLOCK_K)
        here = row_in[:, None] & (h < H)[None, :]
        x = activate(tl.load(source + starts + h[None, :], mask=here, other=0.0).to(tl.float32), ACTIVATION)
        if HAS_KEEP:
            x = tl.where(tl.load(hidden_keep + starts + h[None, :], mask=here, other=0) != 0, x * scale, 0.0)
        w = tl.load(weights + h[:, None], mask=(h < H)[:, None] & column_in[None, :], other=0.0)
        acc = tl.dot(x.to(w.dtype), w, acc, input_precision=PRECISION)
    acc += tl.load(output_bias + layer * C + columns, mask=column_in, other=0.0).to(tl.float32)[None, :]
    where = (layer * B + rows)[:, None] * C + columns[None, :]
    tl.store(result + where, acc.to(result.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


@triton.jit
def _mix_kernel(
    layer_logits, layer_logits_zeroed, mix_weights, logits, logits_zeroed, size, layers,
    HAS_MIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``y = sum_l m_l y_l``, one layer after the other."""
    source = layer_logits
    result = logits
    if tl.program_id(1) == 1:
        source = layer_logits_zeroed
        result = logits_zeroed
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for layer in range(layers):
        y = tl.load(source + tl.cast(layer, tl.int64) * size + i, mask=inside, other=0.0).to(tl.float32)
        if HAS_MIX:
            y *= tl.load(mix_weights + layer).to(tl.float32)
        acc += y
    if not HAS_MIX:
        acc = acc / layers
    tl.store(result + i, acc.to(result.dtype.element_ty), mask=inside)


def declined(taps: Sequence[Tensor], view: Tensor | None, tap_weight: Tensor) -> str | None:
    """Why these tensors are not for the Triton kernels, or None where they are."""
    dtypes = {tensor.dtype for tensor in (*taps, tap_weight, *(() if view is None else (view,)))}
    if len(dtypes) > 1:
        return f"the Triton kernels take taps, view and weights of one dtype, got {sorted(map(str, dtypes))}"
    if not dtypes <= set(DTYPES):
        return f"the Triton kernels take float32, bfloat16 and float16, got {dtypes.pop()}"
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
    _first_product_kernel[(tiles, layers, parts)](
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
        _finish_first_product_kernel[(ceil_div(batch * first, _ELEMENTS), layers)](
            partial, bias.contiguous(), before, before_zeroed, batch, first, layers, tap_parts, parts,
            ZEROED=zeroed_view, BLOCK=_ELEMENTS,
        )  # fmt: skip
    if output_weight is not None and output_bias is not None:
        stacked = 2 * layers if zeroed_view else layers
        heuristic = ProductConfig.from_tile_heuristic(traits, stacked, batch, outputs, first, bias.element_size())
        out = tuned_or(heuristic, traits, "output", bias.dtype, L=layers, B=batch, K=first, C=outputs)
        tiles = ceil_div(batch, out.block_m) * ceil_div(outputs, out.block_n)
        _output_kernel[(tiles, stacked)](
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
    _mix_kernel[(ceil_div(batch * outputs, _ELEMENTS), 2 if zeroed_view else 1)](
        layer_logits, layer_logits_zeroed, layer_logits if mix_weights is None else mix_weights.contiguous(),
        logits, logits_zeroed, batch * outputs, layers, HAS_MIX=mix_weights is not None, BLOCK=_ELEMENTS,
    )  # fmt: skip
    return results
