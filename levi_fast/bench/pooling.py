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


class Case:
    """One shape in one dtype: the contenders, and hidden states to rotate through.

    Args:
        shape: B, T, D.
        dtype: of the hidden states.
        cold: rotate through inputs that together exceed any cache; else one input again and again, as a model's
            pooling sees it: the hidden state was written a moment ago.
        backward: whether the gradient of the hidden states is part of a call; then of the peers only
            ``sum-over-count`` and ``bmm`` are kept.
        peers: of :data:`PEERS`.
    """

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, cold: bool, backward: bool, peers: Sequence[str]
    ) -> None:
        batch, length, width = self.shape = shape
        self.dtype, self.backward = dtype, backward
        copies = max(2, -(-COLD_BYTES // (batch * length * width * dtype.itemsize))) if cold else 1
        generator = torch.Generator().manual_seed(0)
        self.hidden = [torch.randn(shape, generator=generator).to(dtype) for _ in range(min(copies, 2))]
        self.hidden += [self.hidden[i % 2].clone() for i in range(copies - len(self.hidden))]
        self.mask, self.tokens = _mask(shape, generator)
        self.grad = torch.randn(batch, width, generator=generator).to(dtype)
        self.calls = _forms([peer for peer in peers if not backward or peer in ("sum-over-count", "bmm")])
        for hidden in self.hidden:
            hidden.requires_grad_(backward)

    def prepare(self, index: int) -> tuple[Tensor]:
        """The hidden states that ``index`` numbers."""
        return (self.hidden[index % len(self.hidden)],)

    def call(self, name: str, hidden: Tensor) -> None:
        """What is timed: one call of a contender, with its backward pass where that is asked for."""
        pooled = self.calls[name](hidden, self.mask)
        if self.backward:
            torch.autograd.grad(pooled, hidden, self.grad)

    def run(self, name: str, index: int) -> float:
        """Seconds of one call of a contender."""
        inputs = self.prepare(index)
        return timed(lambda: self.call(name, *inputs))

    def check(self) -> dict[str, float]:
        """Largest errors against float64, of ours and of what most code does.

        Raises:
            WrongResultError: ours is more than twice the other.
        """
        hidden = self.hidden[0].detach()
        wide = (hidden.double() * self.mask[..., None]).sum(1) / self.mask.sum(1, keepdim=True)
        error, theirs = (
            float((form(hidden, self.mask).double() - wide).abs().max())
            for form in (masked_mean_pool, sum_over_count)
        )
        if error > 2 * theirs + 1e-12:
            raise WrongResultError(
                f"masked_mean_pool at {self.shape} in {self.dtype}: error {error}, PyTorch's own {theirs}"
            )
        return {"ours": error, "sum-over-count": theirs}

    @property
    def kept_bytes(self) -> int:
        """Of the tokens that the mask keeps."""
        return self.tokens * self.shape[2] * self.dtype.itemsize

    def flop(self) -> int:
        """Of one call: additions; behind it a division a row."""
        return self.tokens * self.shape[2]

    def bytes(self) -> int:
        """What must be read in one call; behind it also the gradient, read and written."""
        batch, length, width = self.shape
        behind = batch * (length + 1) * width * self.dtype.itemsize if self.backward else 0
        return self.kept_bytes + self.mask.numel() * self.mask.itemsize + behind


def pooling_row(
    shape: tuple[int, int, int], dtype: torch.dtype, cold: bool, peers: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Forward, see :class:`Case`.

    The roofline is a plain sum over as many bytes as the mask keeps, of the same tensors, in the same rounds, from
    one stretch of memory. What is to be read lies in B stretches, padding between them: ``plain_sum_fraction`` is
    what a plain sum over as many bytes in B stretches reaches of the roofline.
    """
    case = Case(shape, dtype, cold, False, peers)
    errors = case.check()
    words = [values.flatten().view(torch.float32) for values in case.hidden]
    flat = [values[: case.kept_bytes // 4] for values in words]
    rows = [values.view(shape[0], -1)[:, : case.kept_bytes // 4 // shape[0]] for values in words]
    contenders: dict[str, Callable[[int], float]] = {name: partial(case.run, name) for name in case.calls}
    contenders["plain-read"] = lambda i: timed(lambda: flat[i % len(flat)].sum())
    contenders["plain-rows"] = lambda i: timed(lambda: rows[i % len(rows)].sum())
    with torch.no_grad():
        times = interleaved(contenders, seconds, 30)
    found = compared(times, also=("plain-read", "plain-rows"))
    needed = case.bytes()
    return {
        "case": {**dict(zip(AXES, shape, strict=True)), "input": "cold" if cold else "warm"},
        "dtype": str(dtype)[6:],
        "pass": "forward",
        **found,
        "bytes_needed": needed,
        "gigabytes_per_second": round(needed / found["median_us"]["ours"] / 1e3, 2),
        "fraction_of_roofline": round(found["median_us"]["plain-read"] / found["median_us"]["ours"], 3),
        "plain_sum_fraction": round(found["median_us"]["plain-read"] / found["median_us"]["plain-rows"], 3),
        "max_error": errors,
    }


def pooling_backward_row(
    shape: tuple[int, int, int], dtype: torch.dtype, peers: Sequence[str], seconds: float
) -> dict[str, Any]:
    """Forward and the gradient of the hidden states, one input again and again."""
    case = Case(shape, dtype, False, True, peers)
    case.check()
    times = interleaved({name: partial(case.run, name) for name in case.calls}, seconds, 30)
    return {"case": {**dict(zip(AXES, shape, strict=True)), "input": "warm"}, "dtype": str(dtype)[6:],
            "pass": "forward+backward", **compared(times)}  # fmt: skip
