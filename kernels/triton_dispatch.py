"""Triton's place in the dispatch: every op on CUDA and ROCm, where Triton can be imported and is switched on.

The kernels are checked in Triton's interpreter and compiled for four GPUs, but no GPU has run them yet. Until one
has, they serve only where ``LEVI_FAST_TRITON=1`` asks for them; the eager twins serve GPUs otherwise.

Each function here is an op as PyTorch's dispatcher calls it. It checks what the eager twin checks, hands tensors that
the kernels do not take (float64, mixed dtypes) to that twin, and launches on the tensors' own device.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from levi_fast.kernels import registry
from levi_fast.kernels.layerwise_ensemble import NAME as ENSEMBLE
from levi_fast.kernels.layerwise_ensemble import _check as check_ensemble
from levi_fast.kernels.layerwise_ensemble import _run_op as run_ensemble
from levi_fast.kernels.layerwise_ensemble_eager import eager_backward, eager_forward
from levi_fast.kernels.layerwise_loss import NAME as LOSS
from levi_fast.kernels.layerwise_loss import _check as check_loss
from levi_fast.kernels.layerwise_loss import _run_op as run_loss
from levi_fast.kernels.layerwise_loss import eager_backward as eager_loss_backward
from levi_fast.kernels.layerwise_loss import eager_forward as eager_loss
from levi_fast.kernels.masked_mean_pool import NAME as POOL
from levi_fast.kernels.masked_mean_pool import _check_backward as check_pool_backward
from levi_fast.kernels.masked_mean_pool import _check_forward as check_pool
from levi_fast.kernels.masked_mean_pool import _run_op as run_pool
from levi_fast.kernels.registry import LIBRARY, Implementation

SWITCH = "LEVI_FAST_TRITON"


@functools.cache
def _import_error() -> str | None:
    """Why the kernels cannot be imported, or None. Triton itself is imported on machines with a GPU alone."""
    if not torch.cuda.is_available():
        return "this PyTorch sees no GPU"
    if os.environ.get(SWITCH) != "1":
        return f"the triton kernels have not been run on a GPU yet; {SWITCH}=1, set before the import, turns them on"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install levi_fast[gpu]` brings it"
    return None


def unavailable(device: str) -> str | None:
    """Why the Triton kernels do not serve a device type, or None where they do."""
    if device != "cuda":
        return f"the triton kernels serve cuda, not {device}"
    return _import_error()


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's GPU the current one: Triton launches there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """``levi_fast::masked_mean_pool``."""
    from levi_fast.kernels import masked_mean_pool_triton

    check_pool(hidden, mask)
    with _on(hidden):
        return masked_mean_pool_triton.forward(hidden, mask)


def pool_into(out: Tensor, hidden: Tensor, mask: Tensor | None, normalize: bool) -> Tensor:
    """Pool, and normalise if asked, straight into ``out`` [B, D] of any strides."""
    from levi_fast.kernels import masked_mean_pool_triton

    check_pool(hidden, mask)
    if normalize and hidden.shape[2] > masked_mean_pool_triton.LONGEST_ROW:
        pooled = pool(hidden, mask)
        return out.copy_(torch.nn.functional.layer_norm(pooled, pooled.shape[1:]))
    with _on(hidden):
        return masked_mean_pool_triton.forward(hidden, mask, normalize=normalize, out=out)


def pool_backward(grad: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """``levi_fast::masked_mean_pool_backward``."""
    from levi_fast.kernels import masked_mean_pool_triton

    check_pool_backward(grad, mask, length)
    with _on(grad):
        return masked_mean_pool_triton.backward(grad, mask, length)


def ensemble(taps: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``levi_fast::layerwise_ensemble``."""
    from levi_fast.kernels import layerwise_ensemble_triton

    check_ensemble(taps, *rest[:10])
    if layerwise_ensemble_triton.declined(taps, *rest[:9]):
        return eager_forward(taps, *rest)
    with _on(taps[0]):
        return layerwise_ensemble_triton.forward(taps, *rest)


def ensemble_backward(*arguments: Any) -> list[Tensor]:
    """``levi_fast::layerwise_ensemble_backward``."""
    from levi_fast.kernels import layerwise_ensemble_backward_triton, layerwise_ensemble_triton

    taps, view, view_keep, tap_weight, view_weight, output_weight, mix_weights, hidden_keep = arguments[4:12]
    check_ensemble(
        taps,
        view,
        view_keep,
        tap_weight,
        view_weight,
        None,
        output_weight,
        None,
        mix_weights,
        hidden_keep,
        arguments[16],
    )
    declined = layerwise_ensemble_triton.declined(
        taps, view, view_keep, tap_weight, view_weight, None, output_weight, None, mix_weights, hidden_keep
    )
    if declined:
        return eager_backward(*arguments)
    with _on(taps[0]):
        return layerwise_ensemble_backward_triton.backward(*arguments)


def loss(layer_logits: Tensor, target: Tensor, problem: int, save: bool) -> tuple[Tensor, Tensor]:
    """``levi_fast::layerwise_loss``."""
    from levi_fast.kernels import layerwise_loss_triton

    check_loss(layer_logits, target, problem)
    if layer_logits.dtype == torch.float64:
        return eager_loss(layer_logits, target, problem, save)
    with _on(layer_logits):
        return layerwise_loss_triton.forward(layer_logits, target, problem, save)


def loss_backward(grad: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
    """``levi_fast::layerwise_loss_backward``."""
    from levi_fast.kernels import layerwise_loss_triton

    if like.dtype == torch.float64:
        return eager_loss_backward(grad, gradient, like)
    with _on(gradient):
        return layerwise_loss_triton.backward(grad, gradient, like)


OPS = {
    "masked_mean_pool": pool,
    "masked_mean_pool_backward": pool_backward,
    "layerwise_ensemble": ensemble,
    "layerwise_ensemble_backward": ensemble_backward,
    "layerwise_loss": loss,
    "layerwise_loss_backward": loss_backward,
}


def register() -> None:
    """Make Triton known to the registry, and the dispatcher's choice on GPUs where it can serve."""
    runs: dict[str, Callable[..., Any]] = {
        POOL: run_pool,
        ENSEMBLE: run_ensemble,
        LOSS: run_loss,
    }
    for op, run in runs.items():
        registry.add(op, Implementation("triton", run, unavailable))
    if unavailable("cuda") is None:
        for name, function in OPS.items():
            LIBRARY.impl(name, function, "CUDA")
