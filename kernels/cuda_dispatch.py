"""The CUDA C++ kernels' place in the dispatch: every op on NVIDIA GPUs, for machines where Triton does not serve.

``liblevi_fast_cuda.so`` registers its ops under a name of its own, ``torch.ops.levi_fast_cuda.*``
(csrc/cuda/library.cu says why). :func:`connect` gives them the same input checks and gradients as ``levi_fast::*``;
so the backend can be asked for by name also where Triton comes first. Where it does not, the library itself takes
``levi_fast::*`` on CUDA, and a call reaches it without passing through Python.

Every kernel runs in the tests, block after block on the CPU, and is compiled for three GPUs; no GPU has run them yet.
Until one has, they serve only where ``LEVI_FAST_CUDA_KERNELS=1`` asks for them.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from levi_fast.kernels import layerwise_ensemble as ensemble_op
from levi_fast.kernels import layerwise_loss as loss_op
from levi_fast.kernels import masked_mean_pool as pool_op
from levi_fast.kernels import native, registry, triton_dispatch
from levi_fast.kernels.registry import Implementation, raise_second_derivative

SWITCH = "LEVI_FAST_CUDA_KERNELS"
NAMESPACE = "levi_fast_cuda"
_libraries: list[torch.library.Library] = []  # registrations live as long as these


@functools.cache
def _why_not() -> str | None:
    if torch.version.hip is not None:
        return "the cuda kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "this PyTorch sees no GPU"
    if os.environ.get(SWITCH) != "1":
        return f"the cuda kernels have not been run on a GPU yet; {SWITCH}=1, set before the import, turns them on"
    return native.load_cuda().reason or None


def unavailable(device: str) -> str | None:
    """Why the CUDA C++ kernels do not serve a device type, or None where they do."""
    return _why_not() if device == "cuda" else f"the cuda kernels serve cuda, not {device}"


def connect(namespace: str) -> None:
    """Give the ops under ``torch.ops.<namespace>`` the checks, fakes and gradients of ``levi_fast::*``."""
    library = torch.library.Library(namespace, "FRAGMENT")
    _libraries.append(library)
    ops = getattr(torch.ops, namespace)

    def gradient_of_pool(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        (mask,) = ctx.saved_tensors
        return ops.masked_mean_pool_backward.default(grad, mask, ctx.length), None

    def gradient_of_loss(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        gradient, like = ctx.saved_tensors
        return ops.layerwise_loss_backward.default(grad, gradient, like), None, None, None

    def gradient_of_ensemble(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return ensemble_op.op_gradient(ctx, ops.layerwise_ensemble_backward.default, grads)

    fakes: dict[str, Callable[..., Any]] = {}
    for module in (pool_op, loss_op, ensemble_op):
        fakes[module.NAME] = module._fake_forward
        fakes[f"{module.NAME}_backward"] = module._fake_backward
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    for name, gradient, context in (
        (pool_op.NAME, gradient_of_pool, pool_op._save),
        (loss_op.NAME, gradient_of_loss, loss_op._op_context),
        (ensemble_op.NAME, gradient_of_ensemble, ensemble_op._op_context),
    ):
        torch.library.register_autograd(f"{namespace}::{name}", gradient, setup_context=context, lib=library)

        def second(ctx: Any, *_: Any, name: str = name) -> None:
            raise_second_derivative(name)

        torch.library.register_autograd(f"{namespace}::{name}_backward", second, lib=library)


def connected(namespace: str) -> dict[str, Callable[..., Any]]:
    """Each op under ``torch.ops.<namespace>`` as the registry runs it, with the public op's arguments."""
    ops = getattr(torch.ops, namespace)

    def ensemble(taps: Any, *rest: Any) -> Any:
        tensors, options = rest[:9], rest[9:]
        if tensors[2].dtype not in ensemble_op.FAST_DTYPES:
            return ensemble_op._run_eager(taps, *rest)
        asks = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*taps, *tensors))
        results = ops.layerwise_ensemble.default(list(taps), *tensors, *options, asks)
        return (*results[:4],) if options[3] else (results[0], results[1], None, None)

    def loss(layer_logits: Tensor, target: Tensor, problem: int) -> Tensor:
        asks = torch.is_grad_enabled() and layer_logits.requires_grad
        return ops.layerwise_loss.default(layer_logits, target, problem, asks)[0]

    return {pool_op.NAME: ops.masked_mean_pool.default, ensemble_op.NAME: ensemble, loss_op.NAME: loss}


def register() -> None:
    """Make the CUDA C++ kernels known to the registry, and the dispatcher's choice where Triton does not serve."""
    runs: dict[str, Callable[..., Any]] = {}
    if unavailable("cuda") is None:
        connect(NAMESPACE)
        runs = connected(NAMESPACE)
        if triton_dispatch.unavailable("cuda") is not None:
            serve()
            runs = {module.NAME: module._run_op for module in (pool_op, ensemble_op, loss_op)}
    for op in (pool_op.NAME, ensemble_op.NAME, loss_op.NAME):
        registry.add(op, Implementation("cuda", runs.get(op, _never), unavailable))


def _never(*_: Any) -> Any:
    raise AssertionError("the registry asks unavailable() first")


def serve() -> None:
    """Have the C++ library itself take ``levi_fast::*`` on CUDA, for the rest of the process.

    Raises:
        RuntimeError: if torch refused the registration.
    """
    if ctypes.CDLL(str(native.load_cuda().path)).levi_fast_cuda_serve() != 0:
        raise RuntimeError("liblevi_fast_cuda.so could not register its kernels with this PyTorch")
