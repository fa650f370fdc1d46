# mypy: disable-error-code="no-untyped-def"
# (a kernel's arguments are Triton's: it specialises them itself)
"""layerwise_loss on GPUs: the Triton kernels, how they are launched, and why this way.

One launch takes all layers' predictions [L, B, C]: each program the losses of a few (layer, example) rows, in fp32
registers, class block after class block with a running maximum, so any number of classes fits; where a gradient will
be asked, it is written in the same pass. Each program leaves one partial sum; one more program adds those in their
order. No atomics: the same inputs give the same bits.

A gradient needs the number of examples that count before the first one is written, so a small launch counts labels
first, in at most 64 parts, which every program of the large one adds up for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from levi_fast.kernels.launch_configs import LossConfig, ceil_div, device_traits, tuned_or

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index
_COUNTS = 64  # parts of the labels' count, at most
_ELEMENTS = 1024  # of one step of an elementwise launch


@triton.jit
def _log_sum_exp(starts, row_in, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """log sum exp of each row, with the maximum subtracted."""
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        inside = row_in[:, None] & (c < C)[None, :]
        x = tl.load(starts[:, None] + c[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, 1))
        # A row of -inf alone has no maximum to subtract: 0 stands in, and exp(-inf) is 0.
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        highest = base
    return highest + tl.log(total)


@triton.jit
def _count_labels_kernel(target, counts, B, part_length, stride_t, IGNORE: tl.constexpr, BLOCK: tl.constexpr):
    """How many labels of a part count."""
    start = tl.program_id(0) * part_length
    end = tl.minimum(start + part_length, B)
    count = tl.zeros([BLOCK], dtype=tl.int32)
    for b0 in range(start, end, BLOCK):
        b = b0 + tl.arange(0, BLOCK)
        label = tl.load(target + b.to(tl.int64) * stride_t, mask=b < end, other=IGNORE)
        count += (label != IGNORE).to(tl.int32)
    tl.store(counts + tl.program_id(0), tl.sum(count, 0))


@triton.jit
def _cross_entropy_kernel(
    logits,
    target,
    counts,
    sums,
    gradient,
    rows,
    B,
    C,
    layers,
    count_parts,
    stride_t,
    IGNORE: tl.constexpr,
    SAVE: tl.constexpr,
    COUNTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of the losses of ROWS rows of [L * B, C]; with SAVE also ``(softmax - onehot) / (count L)``."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_in = row < rows
    label = tl.load(target + (row % B) * stride_t, mask=row_in, other=IGNORE)
    counted = row_in & (label != IGNORE)  # an ignored row is not read: its NaN stays where it is
    starts = logits + row * C
    log_sum = _log_sum_exp(starts, counted, C, ROWS, BLOCK)
    # A label out of range makes the loss NaN: reading there would be out of bounds, and a number would hide it.
    valid = counted & (label >= 0) & (label < C)
    own = tl.load(starts + label, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(counted, log_sum - own, 0.0), 0))
    if SAVE:
        p = tl.arange(0, COUNTS)
        count = tl.sum(tl.load(counts + p, mask=p < count_parts, other=0), 0)
        scale = 1.0 / (tl.maximum(count, 1).to(tl.float32) * layers)
        for c0 in range(0, C, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            inside = (c < C)[None, :]
            x = tl.load(starts[:, None] + c[None, :], mask=counted[:, None] & inside, other=0.0).to(tl.float32)
            g = tl.exp(x - log_sum[:, None]) - tl.where(c[None, :] == label[:, None], 1.0, 0.0)
            g = tl.where(counted[:, None], g * scale, 0.0)
            tl.store(gradient + (row * C)[:, None] + c[None, :], g, mask=row_in[:, None] & inside)


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1], exact for small e too: 1 + e rounds, and the quotient takes the rounding back."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def _elementwise_loss_kernel(
    logits,
    target,
    sums,
    gradient,
    size,
    layers,
    part_length,
    SQUARED: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum of squared errors or of BCE-with-logits over one layer's part of [B, C]; with SAVE also the gradient."""
    layer = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * part_length
    end = tl.minimum(start + part_length, size)
    scale = 1.0 / (tl.cast(size, tl.float32) * layers)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for i0 in range(start, end, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        x = tl.load(logits + layer * size + i, mask=i < end, other=0.0).to(tl.float32)
        t = tl.load(target + i, mask=i < end, other=0.0).to(tl.float32)
        if SQUARED:
            loss = (x - t) * (x - t)
            g = 2.0 * (x - t)
        else:
            e = tl.exp(-tl.abs(x))
            loss = tl.where(x < 0, 0.0, x) - x * t + _log1p(e)
            g = tl.where(x < 0, e, 1.0) / (1.0 + e) - t
        acc += tl.where(i < end, loss, 0.0)
        if SAVE:
            tl.store(gradient + layer * size + i, g * scale, mask=i < end)
    tl.store(sums + tl.program_id(0) * layers + tl.program_id(1), tl.sum(acc, 0))


@triton.jit
def _finish_loss_kernel(
    sums, counts, out, parts, count_parts, scale, HAS_COUNTS: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds the partial sums in a fixed order, times ``scale``, over the count where there is one."""
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for p0 in range(0, parts, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        acc += tl.load(sums + p, mask=p < parts, other=0.0)
    total = tl.sum(acc, 0) * scale
    if HAS_COUNTS:
        p = tl.arange(0, COUNTS)
        total = total / tl.sum(tl.load(counts + p, mask=p < count_parts, other=0), 0).to(tl.float32)
    tl.store(out, total)


@triton.jit
def _scale_kernel(grad, gradient, out, size, BLOCK: tl.constexpr):
    """The kept gradient times the loss's own."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gradient + i, mask=i < size, other=0.0) * tl.load(grad).to(tl.float32)
    tl.store(out + i, g.to(out.dtype.element_ty), mask=i < size)


def forward(layer_logits: Tensor, target: Tensor, problem: int, save: bool) -> tuple[Tensor, Tensor]:
    """The op ``levi_fast::layerwise_loss`` on the device of ``layer_logits``.

    Args:
        layer_logits: [L, B, C], float32, bfloat16 or float16, any strides.
        target: int64 [B] (-100 is ignored) for problem 0, float32 [B, C] else.
        problem: 0 cross-entropy, 1 binary cross-entropy with logits, 2 squared error.
        save: whether to make the gradient too.

    Returns:
        The loss, a float32 scalar (NaN where no example counts, as PyTorch has it), and its float32 gradient
        [L, B, C], empty without ``save``.
    """
    layers, batch, classes = layer_logits.shape
    logits = layer_logits.contiguous()
    out = logits.new_empty((), dtype=torch.float32)
    gradient = logits.new_empty(logits.shape if save else (0,), dtype=torch.float32)
    if not logits.numel():
        return out.fill_(float("nan")), gradient
    count_parts = 1
    if problem == 0:
        traits = device_traits(logits.device)
        heuristic = LossConfig.from_class_heuristic(traits, layers * batch, classes)
        config = tuned_or(heuristic, traits, "cross_entropy", logits.dtype, L=layers, B=batch, C=classes)
        length = ceil_div(ceil_div(batch, _COUNTS), _ELEMENTS) * _ELEMENTS
        count_parts = ceil_div(batch, length)
        counts = logits.new_empty(count_parts, dtype=torch.int32)
        _count_labels_kernel[(count_parts,)](
            target, counts, batch, length, target.stride(0), IGNORE=IGNORED, BLOCK=_ELEMENTS
        )
        parts = ceil_div(layers * batch, config.rows)
        sums = logits.new_empty(parts, dtype=torch.float32)
        _cross_entropy_kernel[(parts,)](
            logits, target, counts, sums, gradient, layers * batch, batch, classes, layers, count_parts,
            target.stride(0), IGNORE=IGNORED, SAVE=save, COUNTS=_COUNTS, ROWS=config.rows, BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
        scale = 1.0 / layers
    else:
        size = batch * classes
        length = ceil_div(ceil_div(size, 256), _ELEMENTS) * _ELEMENTS
        parts = ceil_div(size, length) * layers
        sums = logits.new_empty(parts, dtype=torch.float32)
        counts = sums
        _elementwise_loss_kernel[(parts // layers, layers)](
            logits, target.contiguous(), sums, gradient, size, layers, length,
            SQUARED=problem == 2, SAVE=save, BLOCK=_ELEMENTS,
        )  # fmt: skip
        scale = 1.0 / (layers * size)
    _finish_loss_kernel[(1,)](
        sums, counts, out, parts, count_parts, scale, HAS_COUNTS=problem == 0, COUNTS=_COUNTS, BLOCK=_ELEMENTS
    )
    return out, gradient


def backward(grad: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
    """The op ``levi_fast::layerwise_loss_backward``: scalar ``grad`` times ``gradient``, in ``like``'s dtype."""
    out = torch.empty_like(gradient, dtype=like.dtype)
    if out.numel():
        size = out.numel()
        _scale_kernel[(ceil_div(size, _ELEMENTS),)](grad, gradient, out, size, BLOCK=_ELEMENTS)
    return out
