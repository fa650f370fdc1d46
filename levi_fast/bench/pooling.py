"""Masked mean pooling beside its peers on CPU, in and out of cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from levi_fast.bench.errors import WrongResultError
from levi_fast.bench.timing import COLD_BYTES, compared, interleaved, timed
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels.masked_mean_pool import eager_forward

AXES = ("B", "T", "D")
CASES = [(1, 64, 384), (8, 64, 384), (32, 64, 384), (64, 128, 384), (64, 512, 768), (16, 2048, 1024)]
PEERS = ("eager", "sum-over-count", "bmm", "compile")


def sum_over_count(hidden: Tensor, mask: Tensor) -> Tensor:
    """What most code does: multiply, sum, divide."""
    return (hidden * mask[..., None].to(hidden.dtype)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def batched_product(hidden: Tensor, mask: Tensor) -> Tensor:
    """The sum as a matrix product: hidden is read once and never copied."""
    weights = mask.to(hidden.dtype)
    return torch.bmm(weights[:, None], hidden).squeeze(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _forms(peers: Sequence[str]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": masked_mean_pool}
    for name, form in (("eager", eager_forward), ("sum-over-count", sum_over_count), ("bmm", batched_product)):
        if name in peers:
            forms[name] = form
    if "compile" in peers:
        torch.compiler.reset()  # or the limit on recompilations would leave later shapes uncompiled
        forms["compile"] = torch.compile(sum_over_count, dynamic=False)
    return forms


def _mask(shape: tuple[int, int, int], generator: torch.Generator) -> tuple[Tensor, int]:
    """Lengths between half and all of T; the mask [B, T], and how many tokens it keeps."""
    batch, length, _ = shape
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator)
    return (torch.arange(length) < lengths[:, None]).long(), int(lengths.sum())


def pooling_row(
    shape: tuple[int, int, int], dtype: torch.dtype, cold: bool, peers: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Forward. ``cold`` rotates through inputs that together exceed any cache; else one input again and again, as a
    model's pooling sees it: the hidden state was written a moment ago.

    The roofline is a plain sum over as many bytes as the mask keeps, of the same tensors, in the same rounds.
    """
    batch, length, width = shape
    size = batch * length * width * dtype.itemsize
    copies = max(2, -(-COLD_BYTES // size)) if cold else 1
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(shape, generator=generator).to(dtype) for _ in range(min(copies, 2))]
    hidden += [hidden[i % 2].clone() for i in range(copies - len(hidden))]
    mask, tokens = _mask(shape, generator)
    forms = _forms(peers)
    wide = (hidden[0].double() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    error, theirs = (
        float((f(hidden[0], mask).double() - wide).abs().max()) for f in (masked_mean_pool, sum_over_count)
    )
    if error > 2 * theirs + 1e-12:
        raise WrongResultError(f"masked_mean_pool at {shape} in {dtype}: error {error}, PyTorch's own {theirs}")
    kept = tokens * width * dtype.itemsize
    flat = [values.flatten().view(torch.float32)[: kept // 4] for values in hidden]

    def pool(form: Callable[[Tensor, Tensor], Tensor], index: int) -> float:
        return timed(lambda: form(hidden[index % copies], mask))

    contenders: dict[str, Callable[[int], float]] = {name: partial(pool, form) for name, form in forms.items()}
    contenders["plain-read"] = lambda i: timed(lambda: flat[i % copies].sum())
    with torch.no_grad():
        times = interleaved(contenders, seconds, 30)
    found = compared(times, also=("plain-read",))
    needed = kept + mask.numel() * mask.itemsize
    return {
        "case": {**dict(zip(AXES, shape, strict=True)), "input": "cold" if cold else "warm"},
        "dtype": str(dtype)[6:],
        "pass": "forward",
        **found,
        "bytes_needed": needed,
        "gigabytes_per_second": round(needed / found["median_us"]["ours"] / 1e3, 2),
        "fraction_of_roofline": round(found["median_us"]["plain-read"] / found["median_us"]["ours"], 3),
        "max_error": {"ours": error, "sum-over-count": theirs},
    }


def pooling_backward_row(
    shape: tuple[int, int, int], dtype: torch.dtype, peers: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Forward and the gradient of the hidden states, one input again and again."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    mask, _ = _mask(shape, generator)
    grad = torch.randn(shape[0], shape[2], generator=generator).to(dtype)
    forms = _forms([peer for peer in peers if peer in ("sum-over-count", "bmm")])

    def run(form: Callable[[Tensor, Tensor], Tensor], _: int) -> float:
        return timed(lambda: torch.autograd.grad(form(hidden, mask), hidden, grad))

    times = interleaved({name: partial(run, form) for name, form in forms.items()}, seconds, 30)
    return {"case": {**dict(zip(AXES, shape, strict=True)), "input": "warm"}, "dtype": str(dtype)[6:],
            "pass": "forward+backward", **compared(times)}  # fmt: skip
