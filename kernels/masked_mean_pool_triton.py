# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are Triton's: it specialises them itself)
"""masked_mean_pool on GPUs: the Triton kernels, how they are launched, and why this way.

The op reads [B, T, D] once and writes 1/T of that: its time is the time to read. So a program sums tiles down the
tokens of one example with fp32 (fp64 for fp64) accumulators, and tiles are long along D, where the memory is
contiguous. A masked token's value is never loaded: padding costs no bandwidth, and a NaN in it reaches no result.

A small batch has too few (example, feature block) pairs for the chip: then the tokens are cut into ``splits`` parts
summed side by side, and a second launch adds the parts in their order. No atomics, so the same inputs give the same
bits.

A LayerNorm of the pooled row (the tap's, without affine parameters) costs nothing where one program owns the row: in
the second launch always, in the first where the row is short. Both write through any strides, so a tap lands in its
slice of an [L, B, D] bank and no stacking copy is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from levi_fast.kernels.launch_configs import PoolConfig, ceil_div, device_traits, power_of_two, tuned_or

LONGEST_ROW = 32768  # features of a row that one program can hold for the LayerNorm


@triton.jit
def _layer_norm_row(x, inside, D):
    """LayerNorm of a row held in registers; positions not inside are zero."""
    mean = tl.sum(x, 0) / D
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, 0) / D
    return centred / tl.sqrt(variance + 1e-5)


@triton.jit
def _pool_kernel(
    hidden,
    mask,
    out,
    partial,
    counts,
    B,
    T,
    D,
    tokens_per_split,
    stride_hb,
    stride_ht,
    stride_hd,
    stride_mb,
    stride_mt,
    stride_ob,
    stride_od,
    HAS_MASK: tl.constexpr,
    SPLIT: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(D, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    split = tl.program_id(1)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    start = split * tokens_per_split
    end = tl.minimum(start + tokens_per_split, T)
    row = hidden + b * stride_hb + d.to(tl.int64)[None, :] * stride_hd
    total = tl.zeros([BLOCK_D], dtype=WIDE)
    count = tl.zeros([BLOCK_T], dtype=tl.int32)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        keep = t < end
        if HAS_MASK:
            keep = keep & (tl.load(mask + b * stride_mb + t.to(tl.int64) * stride_mt, mask=keep, other=0) != 0)
        count += keep.to(tl.int32)
        x = tl.load(row + t.to(tl.int64)[:, None] * stride_ht, mask=keep[:, None] & inside[None, :], other=0.0)
        total += tl.sum(x.to(WIDE), 0)
    kept = tl.sum(count, 0)
    if SPLIT:
        tl.store(partial + (split * B + b) * D + d, total, mask=inside)
        if block == 0:
            tl.store(counts + split * B + b, kept)
    else:
        mean = total / tl.maximum(kept, 1).to(WIDE)
        if NORMALIZE:
            mean = _layer_norm_row(mean, inside, D)
        tl.store(out + b * stride_ob + d.to(tl.int64) * stride_od, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _finish_pool_kernel(
    partial,
    counts,
    out,
    B,
    D,
    splits,
    stride_ob,
    stride_od,
    NORMALIZE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the parts of one example in their order, divides, and normalises the row if asked."""
    blocks = tl.cdiv(D, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    total = tl.zeros([BLOCK_D], dtype=WIDE)
    kept = 0
    for split in range(splits):
        total += tl.load(partial + (split * B + b) * D + d, mask=inside, other=0.0)
        kept += tl.load(counts + split * B + b)
    mean = total / tl.maximum(kept, 1).to(WIDE)
    if NORMALIZE:
        mean = _layer_norm_row(mean, inside, D)
    tl.store(out + b * stride_ob + d.to(tl.int64) * stride_od, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pool_backward_kernel(
    grad,
    mask,
    out,
    T,
    D,
    tokens_per_split,
    stride_gb,
    stride_gd,
    stride_mb,
    stride_mt,
    HAS_MASK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``grad / count`` where kept, zero elsewhere. Every program counts its example's mask itself: T values."""
    blocks = tl.cdiv(D, BLOCK_D)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    start = tl.program_id(1) * tokens_per_split
    end = tl.minimum(start + tokens_per_split, T)
    kept = T
    if HAS_MASK:
        count = tl.zeros([BLOCK_T], dtype=tl.int32)
        for t0 in range(0, T, BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            value = tl.load(mask + b * stride_mb + t.to(tl.int64) * stride_mt, mask=t < T, other=0)
            count += (value != 0).to(tl.int32)
        kept = tl.sum(count, 0)
    g = tl.load(grad + b * stride_gb + d.to(tl.int64) * stride_gd, mask=inside, other=0.0).to(WIDE)
    g = g / tl.maximum(kept, 1).to(WIDE)
    for t0 in range(start, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        written = t < end
        value = tl.broadcast_to(g[None, :], [BLOCK_T, BLOCK_D])
        if HAS_MASK:
            m = tl.load(mask + b * stride_mb + t.to(tl.int64) * stride_mt, mask=written, other=0)
            # where, not a product: a gradient of infinity times zero would be NaN at the masked tokens.
            value = tl.where((m != 0)[:, None], value, 0.0)
        where = out + (b * T + t)[:, None] * D + d[None, :]
        tl.store(where, value.to(out.dtype.element_ty), mask=written[:, None] & inside[None, :])


def _wide(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the bytes it is made of; no copy."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def forward(
    hidden: Tensor,
    mask: Tensor | None = None,
    *,
    normalize: bool = False,
    out: Tensor | None = None,
    config: PoolConfig | None = None,
) -> Tensor:
    """Pool on the device of ``hidden``.

    Args:
        hidden: [B, T, D], any strides.
        mask: [B, T] or None; nonzero keeps.
        normalize: also LayerNorm the pooled row, without affine parameters. Needs D <= :data:`LONGEST_ROW`.
        out: [B, D] to write to, any strides and float dtype: a slice of a bank. None allocates it.
        config: the launch; None takes the device's tuned one or the heuristic's.

    Returns:
        ``out``, [B, D].

    Raises:
        ValueError: if ``out`` has another shape, or ``normalize`` meets a row that one program cannot hold.
    """
    batch, length, width = hidden.shape
    if out is None:
        out = hidden.new_empty((batch, width))
    if out.shape != (batch, width):
        raise ValueError(f"out: expected [B, D] = {[batch, width]}, got {list(out.shape)}")
    if normalize and width > LONGEST_ROW:
        raise ValueError(f"normalize: expected at most {LONGEST_ROW} features, got {width}")
    if not out.numel():
        return out
    whole_row = normalize and width <= 2048
    if config is None:
        traits = device_traits(hidden.device)
        heuristic = PoolConfig.from_bandwidth_heuristic(
            traits, batch, length, width, hidden.element_size(), whole_row
        )
        config = tuned_or(heuristic, traits, "pool", hidden.dtype, B=batch, T=length, D=width)
    row_block = power_of_two(width)
    # Without whole rows in the first pass, a LayerNorm takes the second one.
    split = config.splits > 1 or (normalize and config.block_d < width)
    per_split = max(ceil_div(ceil_div(length, config.splits), config.block_t) * config.block_t, 1)
    splits = max(ceil_div(length, per_split), 1)
    mask = _as_bytes(mask)
    wide, tl_wide = _wide(hidden.dtype)
    partial = hidden.new_empty((splits, batch, width), dtype=wide) if split else out
    counts = hidden.new_empty((splits, batch), dtype=torch.int32) if split else out
    _pool_kernel[(batch * ceil_div(width, config.block_d), splits)](
        hidden,
        mask if mask is not None else hidden,
        out,
        partial,
        counts,
        batch,
        length,
        width,
        per_split,
        *hidden.stride(),
        *(mask.stride() if mask is not None else (0, 0)),
        *out.stride(),
        HAS_MASK=mask is not None,
        SPLIT=split,
        NORMALIZE=normalize and not split,
        WIDE=tl_wide,
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    if split:
        block = row_block if normalize else min(row_block, 1024)
        _finish_pool_kernel[(batch * ceil_div(width, block),)](
            partial,
            counts,
            out,
            batch,
            width,
            splits,
            *out.stride(),
            NORMALIZE=normalize,
            WIDE=tl_wide,
            BLOCK_D=block,
            num_warps=4 if block <= 4096 else 16,
        )
    return out


def backward(grad: Tensor, mask: Tensor | None, length: int, *, config: PoolConfig | None = None) -> Tensor:
    """Gradient with respect to ``hidden`` [B, T, D], from ``grad`` [B, D] of any strides."""
    batch, width = grad.shape
    out = grad.new_empty((batch, length, width))
    if not out.numel():
        return out
    if config is None:
        traits = device_traits(grad.device)
        heuristic = PoolConfig.from_bandwidth_heuristic(traits, batch, length, width, grad.element_size(), False)
        config = tuned_or(heuristic, traits, "pool_backward", grad.dtype, B=batch, T=length, D=width)
    per_split = max(ceil_div(ceil_div(length, config.splits), config.block_t) * config.block_t, 1)
    mask = _as_bytes(mask)
    _pool_backward_kernel[(batch * ceil_div(width, config.block_d), ceil_div(length, per_split))](
        grad,
        mask if mask is not None else grad,
        out,
        length,
        width,
        per_split,
        *grad.stride(),
        *(mask.stride() if mask is not None else (0, 0)),
        HAS_MASK=mask is not None,
        WIDE=_wide(grad.dtype)[1],
        BLOCK_T=config.block_t,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
    )
    return out
