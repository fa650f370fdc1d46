# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are Triton's: it specialises them itself)
"""What layerwise_ensemble's forward and backward share on GPUs: where a tap lies, its LayerNorm, activations.

**Taps of unequal width** are read where they are. A table [L, 5] of (address, row stride, feature stride, width,
first weight row) is written by a kernel that takes the addresses as plain arguments: no copy from the host, so
nothing synchronises and a CUDA graph captures it. Taps in one [L, B, D] bank need no table, only strides.

**LayerNorm** is done on load: ``(x - mean) * rstd`` on the tile in registers, before the product. The statistics
come from one small launch for all taps and the view. Each program of the product could find them itself, by reading
its rows twice, but every column block of every layer would do so again. The other way round,
``rstd * (x W - mean * 1 W)``, needs no statistics before the product, but subtracts two large numbers where a tap's
mean is far from zero, and frozen taps have such means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from levi_fast.kernels.launch_configs import RowConfig, ceil_div, device_traits, tuned_or

TABLE_COLUMNS = 5
_TAPS_A_LAUNCH = 8
_UNSPECIALIZED = [f"{letter}{i}" for i in range(_TAPS_A_LAUNCH) for letter in "prfw"]


@triton.jit
def tap_address(bank, table, layer, stride_l, stride_b, stride_d, D, HAS_TABLE: tl.constexpr, ALIGNED: tl.constexpr):
    """A layer's tap: address of its row 0, row stride, feature stride, width and first weight row (all 64 bit)."""
    if HAS_TABLE:
        entry = table + layer.to(tl.int64) * 5
        address = tl.load(entry)
        rows = tl.load(entry + 1)
        if ALIGNED:  # lets loads be 16 bytes long, which an address out of a table would not
            address = tl.multiple_of(address, 16)
            rows = tl.multiple_of(rows, 8)
        base = address.to(bank.dtype)
        features = tl.load(entry + 2)
        width = tl.load(entry + 3).to(tl.int32)
        first = tl.load(entry + 4)
    else:
        layer64 = layer.to(tl.int64)
        base = bank + layer64 * stride_l
        rows = tl.cast(stride_b, tl.int64)
        features = tl.cast(stride_d, tl.int64)
        width = D
        first = layer64 * D
    return base, rows, features, width, first


@triton.jit
def feature_offsets(d, features, UNIT: tl.constexpr):
    """Offsets of features ``d``: themselves where they are neighbours, so that the compiler sees it."""
    if UNIT:
        return d
    else:
        return d.to(tl.int64) * features


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 values: 0 gelu (exact), 1 relu, 2 silu, 3 tanh."""
    if ACTIVATION == 0:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == 1:
        y = tl.where(x < 0, 0.0, x)  # not maximum(x, 0): a NaN stays one
    elif ACTIVATION == 2:
        y = x / (1.0 + tl.exp(-x))
    else:
        y = tanh(x)
    return y


@triton.jit
def activate_backward(x, ACTIVATION: tl.constexpr):
    """The activation's derivative at fp32 ``x``."""
    if ACTIVATION == 0:
        y = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == 1:
        y = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        s = 1.0 / (1.0 + tl.exp(-x))
        y = s * (1.0 + x * (1.0 - s))
    else:
        t = tanh(x)
        y = 1.0 - t * t
    return y


@triton.jit
def tanh(x):
    """tanh of fp32: by exponentials, and near zero, where those cancel, by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    near = x * (1.0 - s * (0.3333333333333333 - s * (0.13333333333333333 - s * 0.05396825396825397)))
    return tl.where(s < 0.01, near, far)


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column block of a program: groups of GROUP_M row blocks share their columns in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit(do_not_specialize=["first", "row", *_UNSPECIALIZED])
def _table_kernel(
    table, first, row, count: tl.constexpr,
    p0, r0, f0, w0, p1, r1, f1, w1, p2, r2, f2, w2, p3, r3, f3, w3,
    p4, r4, f4, w4, p5, r5, f5, w5, p6, r6, f6, w6, p7, r7, f7, w7,
):  # fmt: skip
    """Writes the entries ``first`` to ``first + count``; ``row`` is the first one's first weight row."""
    entry = table + first * 5
    row = tl.cast(row, tl.int64)
    row = _entry(entry, 0, count, row, p0, r0, f0, w0)
    row = _entry(entry, 1, count, row, p1, r1, f1, w1)
    row = _entry(entry, 2, count, row, p2, r2, f2, w2)
    row = _entry(entry, 3, count, row, p3, r3, f3, w3)
    row = _entry(entry, 4, count, row, p4, r4, f4, w4)
    row = _entry(entry, 5, count, row, p5, r5, f5, w5)
    row = _entry(entry, 6, count, row, p6, r6, f6, w6)
    row = _entry(entry, 7, count, row, p7, r7, f7, w7)


@triton.jit
def _entry(entry, index: tl.constexpr, count: tl.constexpr, row, address, rows, features, width):
    if index < count:
        tl.store(entry + index * 5, tl.cast(address, tl.int64))
        tl.store(entry + index * 5 + 1, tl.cast(rows, tl.int64))
        tl.store(entry + index * 5 + 2, tl.cast(features, tl.int64))
        tl.store(entry + index * 5 + 3, tl.cast(width, tl.int64))
        tl.store(entry + index * 5 + 4, row)
    return row + width


@triton.jit
def _row_stats_kernel(
    bank,
    table,
    view,
    stats,
    B,
    D,
    V,
    layers,
    stride_l,
    stride_b,
    stride_d,
    stride_vb,
    stride_vd,
    HAS_TABLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and 1/sqrt(variance + eps) of every row of every tap, and of the view (index ``layers``)."""
    layer = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base, row_stride, feature_stride, width, _first = tap_address(
        bank, table, tl.minimum(layer, layers - 1), stride_l, stride_b, stride_d, D, HAS_TABLE, ALIGNED
    )
    is_view = layer == layers
    base = tl.where(is_view, view, base)
    row_stride = tl.where(is_view, tl.cast(stride_vb, tl.int64), row_stride)
    feature_stride = tl.where(is_view, tl.cast(stride_vd, tl.int64), feature_stride)
    width = tl.where(is_view, V, width)
    start = base + rows[:, None] * row_stride
    inside = (rows < B)[:, None]
    d = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for d0 in range(0, width, BLOCK):
        offsets = feature_offsets(d0 + d, feature_stride, UNIT)
        total += tl.load(start + offsets[None, :], mask=inside & (d0 + d < width)[None, :], other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / tl.maximum(width, 1)
    squares = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for d0 in range(0, width, BLOCK):  # the row again, out of the cache: E[x^2] - mean^2 would cancel
        offsets = feature_offsets(d0 + d, feature_stride, UNIT)
        here = inside & (d0 + d < width)[None, :]
        centred = tl.load(start + offsets[None, :], mask=here, other=0.0).to(tl.float32) - mean[:, None]
        squares += tl.where(here, centred * centred, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 1) / tl.maximum(width, 1) + 1e-5)
    where = stats + layer.to(tl.int64) * B + rows
    tl.store(where, mean, mask=rows < B)
    tl.store(where + tl.cast(layers + 1, tl.int64) * B, rstd, mask=rows < B)


@dataclass(frozen=True)
class Taps:
    """Where all taps lie, as the kernels take it.

    Attributes:
        bank: a tensor of the taps' dtype: the [L, B, D] bank itself, or the first tap where there is a table.
        table: [L, 5] int64, or the bank again where none is needed.
        widths: D_l.
        strides: layer, row and feature stride of a bank; all 0 with a table.
        constants: the kernels' constants that say which of the two it is.
    """

    bank: Tensor
    table: Tensor
    widths: tuple[int, ...]
    strides: tuple[int, int, int]
    constants: dict[str, Any]

    @property
    def layers(self) -> int:
        """L."""
        return len(self.widths)


def locate(taps: Sequence[Tensor]) -> Taps:
    """Where the taps lie: ``taps`` is one [L, B, D], or L tensors [B, D_l]; any strides, nothing is copied."""
    if taps[0].dim() == 3:
        bank = taps[0]
        constants = {"HAS_TABLE": False, "ALIGNED": False, "UNIT": bank.stride(2) == 1}
        strides = (bank.stride(0), bank.stride(1), bank.stride(2))
        return Taps(bank, bank, (bank.shape[2],) * bank.shape[0], strides, constants)
    aligned = all(tap.data_ptr() % 16 == 0 and tap.stride(0) % 8 == 0 for tap in taps)
    constants = {"HAS_TABLE": True, "ALIGNED": aligned, "UNIT": all(tap.stride(1) == 1 for tap in taps)}
    table = torch.empty((len(taps), TABLE_COLUMNS), dtype=torch.int64, device=taps[0].device)
    row = 0
    for first in range(0, len(taps), _TAPS_A_LAUNCH):
        group = taps[first : first + _TAPS_A_LAUNCH]
        entries = [n for tap in group for n in (tap.data_ptr(), *tap.stride(), tap.shape[1])]
        entries += [0] * (4 * _TAPS_A_LAUNCH - len(entries))
        _table_kernel[(1,)](table, first, row, len(group), *entries, num_warps=1)
        row += sum(tap.shape[1] for tap in group)
    return Taps(taps[0], table, tuple(tap.shape[1] for tap in taps), (0, 0, 0), constants)


def row_stats(taps: Taps, view: Tensor | None, batch: int) -> Tensor:
    """LayerNorm's mean and reciprocal deviation of all rows, [2, L + 1, B] fp32; the view is layer L."""
    layers, device = taps.layers, taps.bank.device
    stats = torch.empty((2, layers + 1, batch), dtype=torch.float32, device=device)
    traits = device_traits(device)
    widest = max(*taps.widths, 0 if view is None else view.shape[1])
    heuristic = RowConfig.from_row_heuristic(traits, batch * (layers + 1), widest)
    config = tuned_or(heuristic, traits, "row_stats", taps.bank.dtype, B=batch, L=layers, D=widest)
    constants = dict(taps.constants)
    if view is not None:
        constants["UNIT"] = constants["UNIT"] and view.stride(1) == 1
    _row_stats_kernel[(ceil_div(batch, config.rows), layers + (view is not None))](
        taps.bank,
        taps.table,
        taps.bank if view is None else view,
        stats,
        batch,
        taps.widths[0],
        0 if view is None else view.shape[1],
        layers,
        *taps.strides,
        *((0, 0) if view is None else view.stride()),
        **constants,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return stats


def dot_precision(dtype: torch.dtype) -> str:
    """How a product of two fp32 tiles is taken: as PyTorch's own float32 matmul precision asks."""
    if dtype == torch.float32 and (
        torch.version.hip is not None or torch.get_float32_matmul_precision() == "highest"
    ):
        return "ieee"
    return "tf32"
