# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are Triton's: it specialises them itself)
"""The Triton kernels of layerwise_ensemble's forward; layerwise_ensemble_triton.py says what for."""

from __future__ import annotations

import triton
import triton.language as tl

from levi_fast.kernels.ensemble_tiles_triton import activate, feature_offsets, tap_address, tile_of


@triton.jit
def add_product(
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
def first_product_kernel(
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
        acc = add_product(
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
        acc = add_product(
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
def finish_first_product_kernel(
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
def output_kernel(
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
def mix_kernel(
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
