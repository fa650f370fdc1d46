# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are Triton's: it specialises them itself)
"""The Triton kernels of layerwise_ensemble's backward; layerwise_ensemble_backward_triton.py says what for."""

from __future__ import annotations

import triton
import triton.language as tl

from levi_fast.kernels.ensemble_tiles_triton import (
    activate,
    activate_backward,
    feature_offsets,
    tap_address,
    tile_of,
)


@triton.jit
def _prediction_grad(
    grad, layer_grad, mix_weights, layer, layers, B, C, b, c, inside,
    HAS_GRAD: tl.constexpr, HAS_LAYER_GRAD: tl.constexpr, HAS_MIX: tl.constexpr,
):  # fmt: skip
    """``g_l`` in fp32 at examples ``b`` and outputs ``c``, which broadcast to a tile, either way round."""
    where = b * C + c
    if HAS_LAYER_GRAD:
        g = tl.load(layer_grad + layer * B * C + where, mask=inside, other=0.0).to(tl.float32)
        if HAS_GRAD:
            g += _mix(mix_weights, layer, layers, HAS_MIX) * tl.load(grad + where, mask=inside, other=0.0).to(
                tl.float32
            )
    else:
        g = _mix(mix_weights, layer, layers, HAS_MIX) * tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
def _mix(mix_weights, layer, layers, HAS_MIX: tl.constexpr):
    if HAS_MIX:
        return tl.load(mix_weights + layer).to(tl.float32)
    else:
        return 1.0 / tl.cast(layers, tl.float32)


@triton.jit
def mixed_grad_kernel(
    grad, layer_grad, mix_weights, out, B, C, layers,
    HAS_GRAD: tl.constexpr, HAS_LAYER_GRAD: tl.constexpr, HAS_MIX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes ``g_l``: of linear adapting layers it is ``d_l``."""
    layer = tl.program_id(1).to(tl.int64)
    size = tl.cast(B, tl.int64) * C
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = _prediction_grad(
        grad, layer_grad, mix_weights, layer, layers, size, 1, i, 0, i < size, HAS_GRAD, HAS_LAYER_GRAD, HAS_MIX
    )
    tl.store(out + layer * size + i, g.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def hidden_grad_kernel(
    grad,
    layer_grad,
    mix_weights,
    output_weight,
    before,
    hidden_keep,
    out,
    B,
    H,
    C,
    layers,
    scale,
    ACTIVATION: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_LAYER_GRAD: tl.constexpr,
    HAS_MIX: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``d_l = (g_l O_l) * drop * act'(before_l)``."""
    pid_m, pid_n = tile_of(tl.program_id(0), B, H, BLOCK_M, BLOCK_N, GROUP_M)
    layer = tl.program_id(1).to(tl.int64)
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_in = (rows < B)[:, None]
    column_in = (columns < H)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for c0 in range(0, C, BLOCK_K):
        c = c0 + tl.arange(0, BLOCK_K)
        g = _prediction_grad(
            grad, layer_grad, mix_weights, layer, layers, B, C, rows[:, None], c[None, :], row_in & (c < C)[None, :],
            HAS_GRAD, HAS_LAYER_GRAD, HAS_MIX,
        )  # fmt: skip
        weights = output_weight + (c.to(tl.int64) * layers + layer)[:, None] * H + columns[None, :]
        w = tl.load(weights, mask=(c < C)[:, None] & column_in, other=0.0)
        acc = tl.dot(g.to(w.dtype), w, acc, input_precision=PRECISION)
    where = (layer * B + rows)[:, None] * H + columns[None, :]
    inside = row_in & column_in
    if HAS_KEEP:
        acc = tl.where(tl.load(hidden_keep + where, mask=inside, other=0) != 0, acc * scale, 0.0)
    x = tl.load(before + where, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + where, (acc * activate_backward(x, ACTIVATION)).to(out.dtype.element_ty), mask=inside)


@triton.jit
def output_weight_grad_kernel(
    grad,
    layer_grad,
    mix_weights,
    before,
    hidden_keep,
    weight_out,
    bias_out,
    B,
    H,
    C,
    layers,
    part_length,
    first_part,
    scale,
    ACTIVATION: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_LAYER_GRAD: tl.constexpr,
    HAS_MIX: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``g_l^T drop(act(before_l))`` as [C, L, H], and ``sum_b g_l`` by the programs of the first column block."""
    pid_m, pid_n = tile_of(tl.program_id(0), C, H, BLOCK_M, BLOCK_N, GROUP_M)
    layer = tl.program_id(1).to(tl.int64)
    part = (tl.program_id(2) + first_part).to(tl.int64)
    c = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    h = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    start = tl.program_id(2) * part_length
    end = tl.minimum(start + part_length, B)
    for b0 in range(start, end, BLOCK_K):
        b = (b0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        g = _prediction_grad(
            grad, layer_grad, mix_weights, layer, layers, B, C, b[None, :], c[:, None],
            (b < end)[None, :] & (c < C)[:, None], HAS_GRAD, HAS_LAYER_GRAD, HAS_MIX,
        )  # fmt: skip
        sums += tl.sum(g, 1)
        where = (layer * B + b)[:, None] * H + h[None, :]
        inside = (b < end)[:, None] & (h < H)[None, :]
        x = tl.load(before + where, mask=inside, other=0.0)
        y = activate(x.to(tl.float32), ACTIVATION)
        if HAS_KEEP:
            y = tl.where(tl.load(hidden_keep + where, mask=inside, other=0) != 0, y * scale, 0.0)
        acc = tl.dot(g.to(x.dtype), y.to(x.dtype), acc, input_precision=PRECISION)
    rows = (part * C + c) * layers + layer
    tl.store(
        weight_out + rows[:, None] * H + h[None, :],
        acc.to(weight_out.dtype.element_ty),
        mask=(c < C)[:, None] & (h < H)[None, :],
    )
    if pid_n == 0:
        tl.store(bias_out + (part * layers + layer) * C + c, sums.to(bias_out.dtype.element_ty), mask=c < C)


@triton.jit
def input_weight_grad_kernel(
    bank,
    table,
    stats,
    keep,
    d,
    weight_out,
    bias_out,
    B,
    D,
    K,
    layers,
    stride_l,
    stride_b,
    stride_d,
    part_length,
    part_size,
    HAS_TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    IS_VIEW: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``norm(x_l)^T d_l`` for x the taps [sum D_l, K] (with ``sum_b d_l``) or the view [V, L, K]."""
    pid_m, pid_n = tile_of(tl.program_id(0), tl.maximum(D, 1), K, BLOCK_M, BLOCK_N, GROUP_M)
    layer = tl.program_id(1)
    part = tl.program_id(2).to(tl.int64)
    base, row_stride, feature_stride, width, first = tap_address(
        bank, table, layer, stride_l, stride_b, stride_d, D, HAS_TABLE, ALIGNED
    )
    layer = layer.to(tl.int64)
    means = stats + (tl.cast(layers, tl.int64) * B if IS_VIEW else layer * B)
    rstds = means + tl.cast(layers + 1, tl.int64) * B
    i = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    features = base + feature_offsets(i, feature_stride, UNIT)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    sums = tl.zeros([BLOCK_N], dtype=tl.float32)
    start = tl.program_id(2) * part_length
    end = tl.minimum(start + part_length, B)
    for b0 in range(start, end, BLOCK_K):
        b = (b0 + tl.arange(0, BLOCK_K)).to(tl.int64)
        kept = b < end
        y = tl.load(d + (layer * B + b)[:, None] * K + k[None, :], mask=kept[:, None] & (k < K)[None, :], other=0.0)
        if not IS_VIEW:
            sums += tl.sum(y.to(tl.float32), 0)
        if HAS_KEEP:
            kept = kept & (tl.load(keep + b, mask=kept, other=0) != 0)
        inside = kept[None, :] & (i < width)[:, None]
        x = tl.load(features + b[None, :] * row_stride, mask=inside, other=0.0)
        if NORMALIZE:
            mean = tl.load(means + b, mask=kept, other=0.0)
            rstd = tl.load(rstds + b, mask=kept, other=0.0)
            x = tl.where(inside, (x.to(tl.float32) - mean[None, :]) * rstd[None, :], 0.0)
        acc = tl.dot(x.to(y.dtype), y, acc, input_precision=PRECISION)
    if IS_VIEW:
        where = (i.to(tl.int64) * layers + layer)[:, None] * K + k[None, :]
    else:
        where = (first + i)[:, None] * K + k[None, :]
    inside = (i < width)[:, None] & (k < K)[None, :]
    tl.store(weight_out + part * part_size + where, acc.to(weight_out.dtype.element_ty), mask=inside)
    if not IS_VIEW and pid_m == 0:
        tl.store(bias_out + (part * layers + layer) * K + k, sums.to(bias_out.dtype.element_ty), mask=k < K)


@triton.jit
def input_grad_kernel(
    d,
    table,
    weight,
    out,
    B,
    D,
    K,
    layers,
    layers_a_part,
    row_length,
    HAS_TABLE: tl.constexpr,
    IS_VIEW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Gradient at the normalised input, fp32: a part of ``sum_l d_l V_l^T``, or one layer's ``d_l W_l^T``."""
    pid_m, pid_n = tile_of(tl.program_id(0), B, D, BLOCK_M, BLOCK_N, GROUP_M)
    part = tl.program_id(1)
    start = part * layers_a_part
    rows = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = D
    if IS_VIEW:
        target = out + (part.to(tl.int64) * B + rows)[:, None] * row_length
        weights = weight + i.to(tl.int64)[None, :] * layers * K
    else:
        first = part.to(tl.int64) * D
        if HAS_TABLE:
            width = tl.load(table + part.to(tl.int64) * 5 + 3).to(tl.int32)
            first = tl.load(table + part.to(tl.int64) * 5 + 4)
        target = out + rows[:, None] * row_length + first
        weights = weight + (first + i)[None, :] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for layer in range(start, tl.minimum(start + layers_a_part, layers)):
        layer64 = tl.cast(layer, tl.int64)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                d + (layer64 * B + rows)[:, None] * K + k[None, :],
                mask=(rows < B)[:, None] & (k < K)[None, :],
                other=0.0,
            )
            offset = layer64 * K if IS_VIEW else 0
            w = tl.load(weights + offset + k[:, None], mask=(k < K)[:, None] & (i < width)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    tl.store(target + i[None, :], acc, mask=(rows < B)[:, None] & (i < width)[None, :])


@triton.jit
def norm_backward_kernel(
    partial,
    bank,
    table,
    keep,
    out_bank,
    out_table,
    B,
    D,
    parts,
    row_length,
    stride_l,
    stride_b,
    stride_d,
    HAS_TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the parts of the gradient at the normalised input in their order, and takes it through the LayerNorm."""
    layer = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base, row_stride, feature_stride, width, first = tap_address(
        bank, table, layer, stride_l, stride_b, stride_d, D, HAS_TABLE, ALIGNED
    )
    i = tl.arange(0, BLOCK)
    row_in = rows < B
    written = row_in[:, None] & (i < width)[None, :]
    if HAS_KEEP:  # a dropped view gets zeros, whatever NaN it holds
        row_in = row_in & (tl.load(keep + rows, mask=row_in, other=0) != 0)
    inside = row_in[:, None] & (i < width)[None, :]
    where = rows[:, None] * row_length + first + i[None, :]
    g = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for part in range(parts):
        g += tl.load(partial + tl.cast(part, tl.int64) * B * row_length + where, mask=inside, other=0.0)
    if NORMALIZE:
        offsets = rows[:, None] * row_stride + feature_offsets(i, feature_stride, UNIT)[None, :]
        x = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
        count = tl.maximum(width, 1)
        x = tl.where(inside, x - (tl.sum(x, 1) / count)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / count + 1e-5)
        x = x * rstd[:, None]
        g = (g - (tl.sum(g, 1) / count)[:, None] - x * (tl.sum(g * x, 1) / count)[:, None]) * rstd[:, None]
    out_base, out_row_stride, _features, _width, _first = tap_address(
        out_bank, out_table, layer, tl.cast(B, tl.int64) * D, D, 1, D, HAS_TABLE, ALIGNED
    )
    g = tl.where(inside, g, 0.0).to(out_bank.dtype.element_ty)
    tl.store(out_base + rows[:, None] * out_row_stride + i[None, :], g, mask=written)


@triton.jit
def mix_grad_kernel(grad, layer_logits, partial, size, layers, part_length, first_part, BLOCK: tl.constexpr):
    """Parts of ``sum_bc dloss/dy * y_l``, [parts, L]."""
    layer = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * part_length
    end = tl.minimum(start + part_length, size)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for i0 in range(start, end, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        g = tl.load(grad + i, mask=i < end, other=0.0).to(tl.float32)
        acc += g * tl.load(layer_logits + layer * size + i, mask=i < end, other=0.0).to(tl.float32)
    tl.store(partial + (tl.program_id(0) + first_part).to(tl.int64) * layers + layer, tl.sum(acc, 0))


@triton.jit
def sum_parts_kernel(partial, out, size, parts, BLOCK: tl.constexpr):
    """Adds parts in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(parts):
        acc += tl.load(partial + tl.cast(part, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)
