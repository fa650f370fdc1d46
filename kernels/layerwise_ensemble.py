"""layerwise_ensemble: ``y_l = A_l([norm(tap_l) ; norm(view)])``, ``y = sum_l m_l y_l``. Checks, gradient, dispatch.

The forward saves the pre-activations of the hidden layer and nothing else of its own; what the gradients need beyond
them (the normalised taps, the activations) is made again from the inputs. Only what some input's gradient reads is
kept: a frozen tap is kept for its weight's gradient, never for its own.

Hidden dropout comes in as a drawn mask, so that every backend and the backward pass drop the same units. The native
CPU kernel is csrc/layerwise_ensemble.cpp, the eager twin kernels/layerwise_ensemble_eager.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from levi_fast.kernels import native, registry
from levi_fast.kernels.layerwise_ensemble_eager import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    NEEDS,
    EnsembleTensors,
    eager_backward,
    eager_forward,
    ensemble,
)
from levi_fast.kernels.registry import LIBRARY, Implementation, forced, raise_second_derivative, register, require

__all__ = ["ACTIVATIONS", "layerwise_ensemble"]

NAME = "layerwise_ensemble"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float64 is the eager twin's


# --- input checks and fakes ---------------------------------------------------------------------------------------


def _check(
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor | None,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    activation: int,
) -> None:
    """Raise RuntimeError unless ranks, dtypes and devices fit; sizes are checked by their use in the fakes below."""
    require(len(taps) > 0, lambda: f"{NAME}: taps must hold at least one tensor, got none")
    rank = 3 if len(taps) == 1 and taps[0].dim() == 3 else 2
    ranked = [(f"taps[{i}]", tap, rank) for i, tap in enumerate(taps)]
    ranked += [("tap_weight", tap_weight, 2)]
    optional = (("view", view, 2), ("view_weight", view_weight, 3), ("bias", bias, 2),
                ("output_weight", output_weight, 3), ("output_bias", output_bias, 2))  # fmt: skip
    ranked += [(name, tensor, rank) for name, tensor, rank in optional if tensor is not None]
    for name, tensor, dims in ranked:
        _require_rank(name, tensor, dims)
        _require_like(name, tensor, tap_weight)
    for name, mask, dims in (("view_keep", view_keep, 1), ("hidden_keep", hidden_keep, 3)):
        if mask is not None:
            _require_rank(name, mask, dims)
            _require_bool(name, mask)
    if mix_weights is not None:
        _require_rank("mix_weights", mix_weights, 1)
    require(
        (view is None) == (view_weight is None), lambda: f"{NAME}: view_weight must be given exactly when view is"
    )
    require(
        0 <= activation < len(ACTIVATION_NAMES),
        lambda: f"{NAME}: activation must be an index into {ACTIVATION_NAMES}, got {activation}",
    )


def _require_rank(name: str, tensor: Tensor, dims: int) -> None:
    require(
        tensor.dim() == dims, lambda: f"{NAME}: {name} must have {dims} dimensions, got shape {list(tensor.shape)}"
    )


def _require_bool(name: str, tensor: Tensor) -> None:
    require(tensor.dtype == torch.bool, lambda: f"{NAME}: {name} must be bool, got {tensor.dtype}")


def _require_like(name: str, tensor: Tensor, like: Tensor) -> None:
    require(
        tensor.dtype == like.dtype and tensor.dtype in FLOAT_DTYPES,
        lambda: f"{NAME}: {name} must be floating-point like tap_weight ({like.dtype}), got {tensor.dtype}",
    )
    require(
        tensor.device == like.device,
        lambda: f"{NAME}: {name} must be on tap_weight's device, {like.device}, got {tensor.device}",
    )


def _fake_forward(
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    activation: int,
    normalize: bool,
    dropout: float,
    zeroed_view: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(taps, view, view_keep, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights, hidden_keep,
           activation)  # fmt: skip
    layers, width = bias.shape
    batch = taps[0].shape[-2]
    outputs = width if output_weight is None else output_weight.shape[0]
    first = bias.new_empty((layers, batch, width)) if save and output_weight is not None else bias.new_empty(0)
    logits, layer_logits = bias.new_empty((batch, outputs)), bias.new_empty((layers, batch, outputs))
    if not zeroed_view:
        return logits, layer_logits, bias.new_empty(0), bias.new_empty(0), first, bias.new_empty(0)
    return (
        logits,
        layer_logits,
        torch.empty_like(logits),
        torch.empty_like(layer_logits),
        first,
        torch.empty_like(first),
    )


def _fake_backward(
    grad_logits: Tensor | None,
    grad_layer_logits: Tensor | None,
    grad_logits_zeroed: Tensor | None,
    grad_layer_logits_zeroed: Tensor | None,
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    output_weight: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    layer_logits: Tensor | None,
    layer_logits_zeroed: Tensor | None,
    before: Tensor,
    before_zeroed: Tensor,
    activation: int,
    normalize: bool,
    dropout: float,
    needs: int,
) -> list[Tensor]:
    _check(taps, view, view_keep, tap_weight, view_weight, None, output_weight, None, mix_weights, hidden_keep,
           activation)  # fmt: skip
    layers = taps[0].shape[0] if taps[0].dim() == 3 else len(taps)
    outputs = tap_weight.shape[1] if output_weight is None else output_weight.shape[0]
    like: list[Tensor | None] = [view, tap_weight, view_weight, None, output_weight, None, mix_weights, *taps]
    results = []
    for position, tensor in enumerate(like):
        name = NEEDS[min(position, len(NEEDS) - 1)]
        if not needs >> NEEDS.index(name) & 1:
            results.append(tap_weight.new_empty(0))
        elif name == "bias":
            results.append(tap_weight.new_empty((layers, tap_weight.shape[1])))
        elif name == "output_bias":
            results.append(tap_weight.new_empty((layers, outputs)))
        else:
            assert tensor is not None
            results.append(tensor.new_empty(tensor.shape))
    return results


# --- gradient -----------------------------------------------------------------------------------------------------

_FORWARD_NAMES = ("taps", "view", "view_keep", "tap_weight", "view_weight", "bias", "output_weight", "output_bias",
                  "mix_weights", "hidden_keep")  # fmt: skip
# Bits of NEEDS by the forward's names; the rest is never differentiated.
_BITS = {name: 1 << NEEDS.index(name) for name in _FORWARD_NAMES if name in NEEDS}
_TENSOR_BITS = [_BITS.get(name, 0) for name in _FORWARD_NAMES[1:]]
_MIX, _READ_TAPS = _BITS["mix_weights"], _BITS["tap_weight"] | _BITS["taps"]


def _save(ctx: Any, taps: Sequence[Tensor], rest: Sequence[Any], output: Sequence[Tensor], needs: int) -> None:
    """Keep for the backward pass what the gradients in ``needs`` read, and nothing more.

    Args:
        rest: the op's arguments after the taps.
    """
    view, view_keep, tap_weight, view_weight, _, output_weight, _, mix_weights, hidden_keep = rest[:9]
    if not needs & _READ_TAPS:  # the backward op asks them for their shapes alone
        taps = [tap.new_empty(()).expand(tap.shape) for tap in taps]
    y, y_zeroed = (output[1], output[3]) if needs & _MIX else (None, None)
    ctx.layers = len(taps)
    ctx.needs = needs
    ctx.options = rest[9:12]
    ctx.save_for_backward(*taps, view, view_keep, tap_weight, view_weight, output_weight, mix_weights, hidden_keep, y,
                          y_zeroed, output[4], output[5])  # fmt: skip
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, op: Any, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients in the order of :data:`NEEDS` (taps last), None where not asked."""
    saved, layers, needs = ctx.saved_tensors, ctx.layers, ctx.needs
    results: list[Tensor | None] = op(*grads, saved[:layers], *saved[layers:], *ctx.options, needs)
    for i in _unasked(needs, len(results)):
        results[i] = None
    return results


@functools.lru_cache(maxsize=64)
def _unasked(needs: int, count: int) -> tuple[int, ...]:
    """Places of the backward op's ``count`` results that ``needs`` does not ask for."""
    last = len(NEEDS) - 1
    return tuple(i for i in range(count) if not needs >> min(i, last) & 1)


# The same gradient twice: for the op as torch.compile and torch.export see it ...
def _op_context(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    count = len(inputs[0])
    asks = ctx.needs_input_grad  # flat: the list of taps counts one by one here
    needs = _BITS["taps"] if any(asks[:count]) else 0
    needs += sum(_BITS.get(name, 0) for i, name in enumerate(_FORWARD_NAMES[1:]) if asks[count + i])
    _save(ctx, inputs[0], inputs[1:], output, needs)


def op_gradient(ctx: Any, backward: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The op's gradient as ``torch.library`` takes it, by the backward op named."""
    if ctx.saved_tensors[-2].numel() == 0 and ctx.saved_tensors[-7] is not None and _batch(ctx):
        raise RuntimeError(f"{NAME}: differentiating it needs save=True")
    # What was not asked for came out as an empty tensor, whose gradient says nothing.
    given = _differentiate(ctx, backward, [None if g is not None and g.dim() == 1 else g for g in grads[:4]])
    by_name = dict(zip(NEEDS[:-1], given, strict=False))
    taps = given[len(NEEDS) - 1 :]
    return (taps, *(by_name.get(name) for name in _FORWARD_NAMES[1:]), None, None, None, None, None)


def _op_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return op_gradient(ctx, torch.ops.levi_fast.layerwise_ensemble_backward.default, grads)


def _batch(ctx: Any) -> int:
    return ctx.saved_tensors[0].shape[-2]


# ... and for ordinary calls, where torch.library's own wrapper would cost more than a small ensemble's arithmetic.
class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        rest, taps = tensors[:9], tensors[9:]
        with _below_autograd():  # the op's own way in has torch.library's wrapper in front
            output = _DIRECT(taps, *rest, *options, True)
        _save(ctx, taps, (*rest, *options[:3]), output, _asked(ctx.needs_input_grad))
        return output[:4] if options[3] else output[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grads = grads if len(grads) == 4 else (*grads, None, None)
        if torch.is_grad_enabled():
            given = _differentiate(ctx, _BACKWARD_OP, grads)
        else:
            with _below_autograd():
                given = _differentiate(ctx, _BACKWARD_OP, grads)
        view, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights, *taps = given
        return None, view, None, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights, None, *taps


# Function's own apply looks for leftovers of torch.func among the arguments (3 µs); the op takes those as they are.
_record: Any = getattr(super(torch.autograd.Function, _Function), "apply", _Function.apply)


@functools.lru_cache(maxsize=64)
def _asked(asks: tuple[bool, ...]) -> int:
    """The bits of :data:`NEEDS` for ``_Function``'s inputs: options, nine tensors, the taps."""
    bits = sum(bit for ask, bit in zip(asks[1:10], _TENSOR_BITS, strict=True) if ask)
    return bits + (_BITS["taps"] if any(asks[10:]) else 0)


_below_autograd: Any = registry._below_autograd
_PLAIN = frozenset((Tensor, torch.nn.Parameter, NoneType))


# --- dispatch -----------------------------------------------------------------------------------------------------


def layerwise_ensemble(
    taps: Sequence[Tensor],
    view: Tensor | None,
    view_keep: Tensor | None,
    tap_weight: Tensor,
    view_weight: Tensor | None,
    bias: Tensor,
    output_weight: Tensor | None,
    output_bias: Tensor | None,
    mix_weights: Tensor | None,
    hidden_keep: Tensor | None,
    activation: int,
    normalize: bool,
    dropout: float,
    zeroed_view: bool,
) -> EnsembleTensors:
    """The op, by the backend asked for or else by the best one; see :func:`levi_fast.functional.layerwise_ensemble`.

    ``taps`` is L tensors [B, D_l], or one [L, B, D]; all of them share ``tap_weight``'s dtype.
    """
    arguments = (taps, view, view_keep, tap_weight, view_weight, bias, output_weight, output_bias, mix_weights,
                 hidden_keep, activation, normalize, dropout, zeroed_view)  # fmt: skip
    backend = registry.requested_backend()
    if backend is not None:
        registry.refuse_transforms(NAME, backend, *taps, *arguments[1:10])
    run = _run_best if backend is None else forced(NAME, backend, tap_weight)
    return run(*arguments)


def _run_best(*arguments: Any) -> EnsembleTensors:
    if arguments[3].dtype not in FAST_DTYPES or (not torch.compiler.is_compiling() and _transformed(arguments)):
        return _run_eager(*arguments)  # PyTorch's own operators serve every transform of torch.func
    return _run_op(*arguments)


def _transformed(arguments: Sequence[Any]) -> bool:
    """Whether torch.func or forward-mode AD has a hand on a tensor; cheap where neither is at work."""
    if forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(t is not None and wrapped(t) for t in (*arguments[0], *arguments[1:10]))


def _run_op(*arguments: Any) -> EnsembleTensors:
    taps, tensors, options = arguments[0], arguments[1:10], arguments[10:]
    every = (*tensors, *taps)
    asks = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in every)
    if _below_autograd is None or torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, every)):
        results = _OP(list(taps), *tensors, *options, asks)
    elif asks:
        results = _record(options, *every)
    else:
        with _below_autograd():
            results = _DIRECT(taps, *tensors, *options, False)
    return (*results[:4],) if options[3] else (results[0], results[1], None, None)


def _run_eager(*arguments: Any) -> EnsembleTensors:
    a, b, c, d = ensemble(*arguments)[0]
    assert a is not None and b is not None
    return a, b, c, d


def _second_derivative(ctx: Any, *_: Tensor) -> None:
    raise_second_derivative(NAME)


def _fallback_forward(*arguments: Any) -> tuple[Tensor, ...]:
    if arguments[3].device.type == "cpu":
        native.warn_missing_once(NAME)
    return eager_forward(*arguments)


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
        Implementation("eager", _run_eager, lambda device: None),
    )


_register()
_OP = torch.ops.levi_fast.layerwise_ensemble.default
_DIRECT: Any = getattr(_OP, "_op", _OP)  # what OpOverload's own call hands over to
_BACKWARD_OP = torch.ops.levi_fast.layerwise_ensemble_backward.default
