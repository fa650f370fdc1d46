"""masked_mean_pool: mean over the kept tokens. Schema checks, eager twin, gradient and dispatch.

    out[b] = sum_t keep[b, t] * hidden[b, t] / sum_t keep[b, t]        (zeros where nothing is kept)

The native CPU kernel is csrc/masked_mean_pool.cpp; it repeats the checks below word for word.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from levi_fast.kernels import native, registry
from levi_fast.kernels.registry import (
    LIBRARY,
    Implementation,
    call,
    forced,
    raise_second_derivative,
    records_plainly,
    register,
    requested_backend,
    require,
    serving,
)

NAME = "masked_mean_pool"
below_autograd: Any = registry._below_autograd
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_NATIVE_MISSING = native.load().reason  # a constant, so that Dynamo has nothing to trace
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASK_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOAT_DTYPES)


# --- input checks: the fake kernels and the eager twin run them, the native kernel has its own copy ---------------


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_float(op: str, argument: str, tensor: Tensor) -> None:
    require(
        tensor.dtype in FLOAT_DTYPES,
        lambda: f"{op}: {argument} must be float32, bfloat16, float16 or float64, got {_dtype_name(tensor.dtype)}",
    )


def _check_mask(op: str, mask: Tensor | None, like: Tensor, length: int) -> None:
    if mask is None:
        return
    batch = like.shape[0]
    require(
        mask.dtype in MASK_DTYPES,
        lambda: f"{op}: mask must be bool, integer or real floating-point, got {_dtype_name(mask.dtype)}",
    )
    message = f"{op}: mask must have shape [B, T] = "
    require(mask.dim() == 2, lambda: f"{message}{[batch, length]}, got {list(mask.shape)}")
    require(mask.shape[0] == batch, lambda: f"{message}{[batch, length]}, got {list(mask.shape)}")
    require(mask.shape[1] == length, lambda: f"{message}{[batch, length]}, got {list(mask.shape)}")
    require(
        mask.device == like.device,
        lambda: f"{op}: mask must be on the device of the other input, {like.device}, got {mask.device}",
    )


def _check_forward(hidden: Tensor, mask: Tensor | None) -> None:
    require(
        hidden.dim() == 3,
        lambda: f"{NAME}: hidden must have 3 dimensions [B, T, D], got shape {list(hidden.shape)}",
    )
    _check_float(NAME, "hidden", hidden)
    _check_mask(NAME, mask, hidden, hidden.shape[1])


def _check_backward(grad: Tensor, mask: Tensor | None, length: int) -> None:
    op = f"{NAME}_backward"
    require(grad.dim() == 2, lambda: f"{op}: grad must have 2 dimensions [B, D], got shape {list(grad.shape)}")
    require(length >= 0, lambda: f"{op}: length must be at least 0, got {length}")
    _check_float(op, "grad", grad)
    _check_mask(op, mask, grad, length)


def _fake_forward(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    _check_forward(hidden, mask)
    return hidden.new_empty((hidden.shape[0], hidden.shape[2]))


def _fake_backward(grad: Tensor, mask: Tensor | None, length: int) -> Tensor:
    _check_backward(grad, mask, length)
    return grad.new_empty((grad.shape[0], length, grad.shape[1]))


# --- the eager twin: any device, plain PyTorch --------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _narrow(result: Tensor, dtype: torch.dtype) -> Tensor:
    # Not by an idle ``to``: torch 2.11 compiles an autograd.Function that ends in one to a gradient of zero.
    return result if result.dtype == dtype else result.to(dtype)


def eager_forward(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The op in plain PyTorch: accumulates in fp32 (fp64 for fp64); a masked value, NaN included, is never added."""
    _check_forward(hidden, mask)
    wide = _wide(hidden.dtype)
    if mask is None:
        count = max(hidden.shape[1], 1)
        return _narrow(hidden.sum(1, dtype=wide) / count, hidden.dtype)
    keep = mask != 0
    total = hidden.masked_fill(~keep[..., None], 0).sum(1, dtype=wide)
    return _narrow(total / keep.sum(1).clamp(min=1)[:, None], hidden.dtype)


def eager_backward(grad: Tensor, mask: Tensor | None, length: int) -> Tensor:
    """Gradient with respect to ``hidden`` [B, T, D]: ``grad / count`` where kept, zero elsewhere."""
    _check_backward(grad, mask, length)
    wide = grad.to(_wide(grad.dtype))
    if mask is None:
        row = (wide / max(length, 1)).to(grad.dtype)
        return row[:, None].expand(-1, length, -1).contiguous()
    keep = mask != 0
    row = (wide / keep.sum(1).clamp(min=1)[:, None]).to(grad.dtype)
    # where, not a product: a gradient of infinity times zero would be NaN at the masked tokens.
    return torch.where(keep[..., None], row[:, None], torch.zeros((), dtype=grad.dtype, device=grad.device))


class _EagerBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad: Tensor, mask: Tensor | None, length: int) -> Tensor:
        return eager_backward(grad, mask, length)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise_second_derivative(NAME)


class _Eager(torch.autograd.Function):
    """The twin with the same gradient contract as the op: nothing but the mask is kept for the backward pass."""

    @staticmethod
    def forward(hidden: Tensor, mask: Tensor | None) -> Tensor:
        return eager_forward(hidden, mask)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _EagerBackward.apply(grad, mask, ctx.length), None


class _Function(torch.autograd.Function):
    """The op's gradient for ordinary calls, without the cost of torch.library's own wrapper."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.length = hidden.shape[1]
        with below_autograd():
            return _OP(hidden, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (mask,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _BACKWARD_OP(grads[0], mask, ctx.length), None
        with below_autograd():
            return _BACKWARD_OP(grads[0], mask, ctx.length), None


# --- registration -------------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    hidden, mask = inputs
    ctx.save_for_backward(mask)
    ctx.length = hidden.shape[1]


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
    (mask,) = ctx.saved_tensors
    return torch.ops.levi_fast.masked_mean_pool_backward.default(grad, mask, ctx.length), None


def _second_derivative(ctx: Any, *_: Tensor) -> None:
    raise_second_derivative(NAME)


def _fallback_forward(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    if hidden.device.type == "cpu":
        native.warn_missing_once(NAME)
    return eager_forward(hidden, mask)


def _register() -> None:
    forward, backward = f"levi_fast::{NAME}", f"levi_fast::{NAME}_backward"
    torch.library.register_fake(forward, _fake_forward, lib=LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=LIBRARY)
    LIBRARY.impl(NAME, _fallback_forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{NAME}_backward", eager_backward, "CompositeExplicitAutograd")
    torch.library.register_autograd(forward, _gradient, setup_context=_save, lib=LIBRARY)
    torch.library.register_autograd(backward, _second_derivative, lib=LIBRARY)
    register(
        NAME,
        Implementation("cpp", _run_op, _cpp_unavailable),
        Implementation("eager", _Eager.apply, lambda device: None),
    )


def _cpp_unavailable(device: str) -> str | None:
    if device != "cpu":
        return f"the cpp kernels serve cpu, not {device}"
    return _NATIVE_MISSING or None


def _run_op(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    # What call() would ask, asked at once: passing through it costs as much as pooling a short sentence.
    if (
        not torch.compiler.is_compiling()
        and type(hidden) is Tensor
        and not hidden.requires_grad
        and below_autograd is not None
        and forward_ad._current_level < 0
        and not _wrapped(hidden)
    ):
        with below_autograd():
            return _DIRECT(hidden, mask)
    if below_autograd is not None and records_plainly(hidden):
        return _Function.apply(hidden, mask)
    return call(_OP, hidden, mask)


def masked_mean_pool(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The op, by the backend asked for or else by the best one; see :func:`levi_fast.functional.masked_mean_pool`."""
    backend = requested_backend()
    if backend is None:
        return _run_op(hidden, mask)
    return forced(NAME, backend, hidden)(hidden, mask)


def masked_mean_pool_into(out: Tensor, hidden: Tensor, mask: Tensor | None = None, normalize: bool = False) -> Tensor:
    """The op without a gradient, its result written to ``out``; by Triton in the same launch, else copied there."""
    alike = out.device == hidden.device and out.dtype == hidden.dtype
    direct = alike and hidden.device.type == "cuda" and not torch.compiler.is_compiling()
    if direct and serving(NAME, "cuda") == "triton":
        from levi_fast.kernels import triton_dispatch

        return triton_dispatch.pool_into(out, hidden, mask, normalize)
    with torch.no_grad():
        pooled = masked_mean_pool(hidden, mask)
        if normalize and pooled.shape[1]:
            pooled = torch.nn.functional.layer_norm(pooled, pooled.shape[1:])
        return out.copy_(pooled)


_register()
_OP = torch.ops.levi_fast.masked_mean_pool.default
_DIRECT: Any = getattr(_OP, "_op", _OP)  # what OpOverload's own call hands over to
_BACKWARD_OP = torch.ops.levi_fast.masked_mean_pool_backward.default
