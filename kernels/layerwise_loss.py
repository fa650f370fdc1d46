"""layerwise_loss: the task's loss over all layers' predictions at once. Checks, eager twin, gradient and dispatch.

Value and gradient are made in the same pass; the gradient is kept in fp32 (a half-precision one would lose small
entries before a GradScaler could lift them). The native CPU kernel is csrc/layerwise_loss.cpp.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from levi_fast.kernels import native, registry
from levi_fast.kernels.registry import LIBRARY, Implementation, forced, raise_second_derivative, register, require

NAME = "layerwise_loss"
_below_autograd: Any = registry._below_autograd
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
IGNORED = -100  # PyTorch's own index of an example that does not count


# --- the eager twin -----------------------------------------------------------------------------------------------


def _value(layer_logits: Tensor, target: Tensor, problem: int) -> Tensor:
    """Differentiable by PyTorch itself, any number of times."""
    layers, batch, outputs = layer_logits.shape
    logits = layer_logits.float()
    if problem == 0:
        # Every layer ignores the same examples, so the mean over all kept rows is the mean of the layers' means.
        return F.cross_entropy(logits.reshape(layers * batch, outputs), target.repeat(layers), ignore_index=IGNORED)
    wide = target.to(logits.dtype).reshape(batch, outputs).expand_as(logits)
    return F.binary_cross_entropy_with_logits(logits, wide) if problem == 1 else F.mse_loss(logits, wide)


def eager_forward(layer_logits: Tensor, target: Tensor, problem: int, save: bool) -> tuple[Tensor, Tensor]:
    """The op ``levi_fast::layerwise_loss``: the loss, and its fp32 gradient where ``save`` (empty elsewhere)."""
    _check(layer_logits, target, problem)
    loss = _value(layer_logits, target, problem)
    if not save:
        return loss, loss.new_empty(0)
    logits = layer_logits.float()
    layers, batch, outputs = logits.shape
    if problem == 0:
        kept = target != IGNORED
        gradient = logits.softmax(-1)
        gradient = gradient - F.one_hot(target.clamp(min=0), outputs)
        # where, not a product: an ignored example's NaN must not come through
        gradient = torch.where(kept[None, :, None], gradient / (kept.sum() * layers), torch.zeros_like(gradient))
    else:
        wide = target.to(logits.dtype).reshape(batch, outputs)
        difference = logits.sigmoid() - wide if problem == 1 else 2 * (logits - wide)
        gradient = difference / max(logits.numel(), 1)
    return loss, gradient


def eager_backward(grad: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
    """The op ``levi_fast::layerwise_loss_backward``: scalar ``grad`` times the kept gradient, in ``like``'s dtype.

    ``like`` is the predictions: not read, but a second derivative must find the way to them and be refused.
    """
    return (grad * gradient).to(like.dtype)


# --- checks and fakes ---------------------------------------------------------------------------------------------


def _check(layer_logits: Tensor, target: Tensor, problem: int) -> None:
    require(
        layer_logits.dim() == 3, lambda: f"{NAME}: layer_logits must be [L, B, C], got {list(layer_logits.shape)}"
    )
    require(0 <= problem < 3, lambda: f"{NAME}: problem must be 0, 1 or 2, got {problem}")
    require(
        layer_logits.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64),
        lambda: f"{NAME}: layer_logits must be floating-point, got {layer_logits.dtype}",
    )
    wanted = torch.int64 if problem == 0 else torch.float32
    require(target.dtype == wanted, lambda: f"{NAME}: target must be {wanted}, got {target.dtype}")
    rank = 1 if problem == 0 else 2
    require(
        target.dim() == rank, lambda: f"{NAME}: target must have {rank} dimensions, got shape {list(target.shape)}"
    )
    require(
        target.device == layer_logits.device,
        lambda: f"{NAME}: target must be on the device of layer_logits, {layer_logits.device}, got {target.device}",
    )
    for index in range(rank):
        require(
            target.shape[index] == layer_logits.shape[index + 1],
            lambda: f"{NAME}: target must fit layer_logits {list(layer_logits.shape)}, got {list(target.shape)}",
        )


def _fake_forward(layer_logits: Tensor, target: Tensor, problem: int, save: bool) -> tuple[Tensor, Tensor]:
    _check(layer_logits, target, problem)
    loss = layer_logits.new_empty((), dtype=torch.float32)
    return loss, loss.new_empty(layer_logits.shape if save else (0,))


def _fake_backward(grad: Tensor, gradient: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(gradient, dtype=like.dtype)


# --- gradient and dispatch ----------------------------------------------------------------------------------------


def _op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], inputs[0])


def _op_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    gradient, like = ctx.saved_tensors
    return torch.ops.levi_fast.layerwise_loss_backward.default(grad, gradient, like), None, None, None


class _Function(torch.autograd.Function):
    """The gradient of ordinary calls, without the cost of torch.library's own wrapper."""

    @staticmethod
    def forward(ctx: Any, layer_logits: Tensor, target: Tensor, problem: int) -> Tensor:
        with _below_autograd():  # the op's own way in has torch.library's wrapper in front
            loss, gradient = _OP(layer_logits, target, problem, True)
        ctx.save_for_backward(gradient, layer_logits)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gradient, like = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _BACKWARD_OP(grads[0], gradient, like), None, None
        with _below_autograd():
            return _BACKWARD_OP(grads[0], gradient, like), None, None


def layerwise_loss(layer_logits: Tensor, target: Tensor, problem: int) -> Tensor:
    """The op, by the backend asked for or else by the best one; see :func:`levi_fast.functional.layerwise_loss`.

    ``target`` is int64 [B] for problem 0, float32 [B, C] else.
    """
    backend = registry.requested_backend()
    if backend is not None:
        registry.refuse_transforms(NAME, backend, layer_logits, target)
        return forced(NAME, backend, layer_logits)(layer_logits, target, problem)
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if not torch.compiler.is_compiling() and (
        forward_ad._current_level >= 0 or wrapped(layer_logits) or wrapped(target)
    ):
        return _value(layer_logits, target, problem)  # PyTorch's own operators serve every transform of torch.func
    return _run_op(layer_logits, target, problem)


def _run_op(layer_logits: Tensor, target: Tensor, problem: int) -> Tensor:
    asks = torch.is_grad_enabled() and layer_logits.requires_grad
    if torch.compiler.is_compiling() or _below_autograd is None or type(layer_logits) is not Tensor:
        return _OP(layer_logits, target, problem, asks)[0]
    if asks:
        return _Function.apply(layer_logits, target, problem)
    with _below_autograd():
        return _OP(layer_logits, target, problem, False)[0]


def _second_derivative(ctx: Any, *_: Tensor) -> None:
    raise_second_derivative(NAME)


def _fallback_forward(layer_logits: Tensor, target: Tensor, problem: int, save: bool) -> tuple[Tensor, Tensor]:
    if layer_logits.device.type == "cpu":
        native.warn_missing_once(NAME)
    return eager_forward(layer_logits, target, problem, save)


def _cpp_unavailable(device: str) -> str | None:
    if device != "cpu":
        return f"the cpp kernels serve cpu, not {device}"
    return native.load().reason or None


def _register() -> None:
    forward, backward = f"levi_fast::{NAME}", f"levi_fast::{NAME}_backward"
    torch.library.register_fake(forward, _fake_forward, lib=LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=LIBRARY)
    LIBRARY.impl(NAME, _fallback_forward, "CompositeExplicitAutograd")
    LIBRARY.impl(f"{NAME}_backward", eager_backward, "CompositeExplicitAutograd")
    torch.library.register_autograd(forward, _op_gradient, setup_context=_op_context, lib=LIBRARY)
    torch.library.register_autograd(backward, _second_derivative, lib=LIBRARY)
    register(
        NAME,
        Implementation("cpp", _run_op, _cpp_unavailable),
        Implementation("eager", _value, lambda device: None),
    )


_register()
_OP = torch.ops.levi_fast.layerwise_loss.default
_BACKWARD_OP = torch.ops.levi_fast.layerwise_loss_backward.default
