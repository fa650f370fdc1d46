"""Which backend serves which op on which device, and why the others do not.

Left alone, PyTorch's own dispatcher decides: a compiled kernel is registered for its device, the eager twin for every
device. This module adds what the dispatcher cannot do: report, and force one backend by name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "cpp", "triton", "cuda", "eager")
ENVIRONMENT_VARIABLE = "LEVI_FAST_BACKEND"
DEVICES = ("cpu", "cuda")  # ROCm calls itself cuda too; any other device is served by the eager twin

LIBRARY = torch.library.Library("levi_fast", "FRAGMENT")


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot serve; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend's way of computing one op.

    Attributes:
        backend: its name, one of :data:`BACKENDS` but "auto".
        run: the op, differentiable, with the op's public arguments.
        unavailable: why it cannot serve a device type, or None where it can.
    """

    backend: str
    run: Callable[..., Any]
    unavailable: Callable[[str], str | None]


@dataclass(frozen=True)
class OpReport:
    """Who serves an op on a device type, and for every other backend why it does not."""

    serves: str
    others: dict[str, str]


_ops: dict[str, dict[str, Implementation]] = {}
# Why each cannot serve each device type, asked once: Dynamo reads a dictionary, and could not trace the asking.
_reasons: dict[tuple[str, str, str], str | None] = {}


def _ask(op: str, implementation: Implementation) -> None:
    for device in DEVICES:
        _reasons[op, implementation.backend, device] = implementation.unavailable(device)


def register(op: str, *implementations: Implementation) -> None:
    """Make an op known, with its implementations from the most to the least preferred; "eager" comes last."""
    assert implementations[-1].backend == "eager", op
    _ops[op] = {implementation.backend: implementation for implementation in implementations}
    for implementation in implementations:
        _ask(op, implementation)


def add(op: str, implementation: Implementation) -> None:
    """Put another implementation of a known op right before its eager twin."""
    implementations = _ops[op]
    eager = implementations.pop("eager")
    implementations[implementation.backend] = implementation
    implementations["eager"] = eager
    _ask(op, implementation)


def _why_not(op: str, backend: str, device: str) -> str | None:
    implementation = _ops[op].get(backend)
    if implementation is None:
        return f"{op} has no {backend} implementation in this version of levi_fast"
    if device in DEVICES:
        return _reasons[op, backend, device]
    return implementation.unavailable(device)


def serving(op: str, device: str) -> str:
    """The backend that serves an op on a device type: the one asked for, else the first that can."""
    return requested_backend() or next(name for name in _ops[op] if _why_not(op, name, device) is None)


def backend_report() -> dict[str, dict[str, OpReport]]:
    """Who serves each op on each device type, and why the others do not.

    Returns:
        ``report[op][device]`` with ``.serves`` (a backend's name, the one asked for where one is) and ``.others``
        (every other backend, with the reason in words).

    Raises:
        BackendUnavailableError: if ``LEVI_FAST_BACKEND`` is not a backend's name.
    """
    wanted = requested_backend()
    report: dict[str, dict[str, OpReport]] = {}
    for op, implementations in _ops.items():
        report[op] = {}
        for device in DEVICES:
            able = [name for name in implementations if _why_not(op, name, device) is None]
            serves = able[0] if wanted is None else wanted if wanted in able else "none"
            others = {}
            for name in BACKENDS[1:]:
                if name != serves:
                    reason = _why_not(op, name, device)
                    first = f"{serves} comes first" if wanted is None else f"{wanted} was asked for"
                    others[name] = reason or first
            report[op][device] = OpReport(serves, others)
    return report


# The backend asked for, or None for "auto". One plain variable for the process: torch.compile guards on it and
# compiles anew when it changes, and autograd's own threads see the same value; a ContextVar offers neither.
_requested: str | None = None
_environment_read = False


def requested_backend() -> str | None:
    """The backend asked for by :func:`use_backend` or ``LEVI_FAST_BACKEND``; None where the choice is automatic."""
    if not _environment_read:
        _read_environment()
    return _requested


def _read_environment() -> None:
    global _environment_read, _requested
    name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip().lower() or "auto"
    _check(name, ENVIRONMENT_VARIABLE)
    _requested = None if name == "auto" else name
    _environment_read = True


def _check(name: str, source: str) -> None:
    if name not in BACKENDS:
        raise BackendUnavailableError(f"{source} must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "auto":
        return
    reasons = []
    for op in _ops:
        for device in DEVICES:
            reason = _why_not(op, name, device)
            if reason is None:
                return
            if reason not in reasons:
                reasons.append(reason)
    raise BackendUnavailableError(f"{source} asks for {name!r}, which cannot serve: {'; '.join(reasons)}")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have every op served by one backend inside the ``with`` block, or raise.

    The choice holds for the whole process (all threads), and for calls made inside the block; a backward pass later
    uses the backend of its forward.

    Args:
        name: "auto" (the best there is), "eager" (plain PyTorch), "cpp", "triton" or "cuda".

    Raises:
        BackendUnavailableError: on entering, if the backend is unknown or can serve no op on any device; at an
            op's call, if it cannot serve that op on that tensor's device. The message gives the reason.
    """
    global _requested
    previous = requested_backend()
    _check(name, "use_backend")
    _requested = None if name == "auto" else name
    try:
        yield
    finally:
        _requested = previous


def forced(op: str, backend: str, tensor: Tensor) -> Callable[..., Any]:
    """The callable that serves ``op`` by ``backend`` on ``tensor``'s device.

    Raises:
        BackendUnavailableError: if it cannot.
    """
    reason = _why_not(op, backend, tensor.device.type)
    if reason is not None:
        raise BackendUnavailableError(f"{op} was asked of backend {backend!r}, which cannot serve it: {reason}")
    return _ops[op][backend].run


def refuse_transforms(op: str, backend: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError where torch.func's transforms or forward mode meet a compiled backend asked for by name.

    Asked for nothing, the ops go to plain PyTorch there, which serves every transform.
    """
    if backend == "eager" or torch.compiler.is_compiling():
        return
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if forward_ad._current_level >= 0 or any(t is not None and wrapped(t) for t in tensors):
        raise RuntimeError(
            f"{op}: the {backend} kernels do not serve torch.func's transforms or forward-mode derivatives; leave "
            "the backend to auto, or ask for eager"
        )


# Only torch.library uses this guard in public; where a torch has lost it, calls take the ordinary way.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", None)


def call(op: Callable[..., Tensor], tensor: Tensor, *others: Any) -> Tensor:
    """Call an op whose one differentiable input is ``tensor``, past autograd where no gradient is wanted.

    Gradients registered from Python put a Python function in front of the kernel at every call: about 12 µs, four
    times the call itself and more than pooling one sentence takes. Frozen activations need none of it.
    """
    if (
        _below_autograd is None
        or torch.compiler.is_compiling()
        or (tensor.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or not _plain(tensor)
    ):
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            # PyTorch would return a zero tangent in silence.
            raise RuntimeError(f"{op}: forward-mode derivatives are not implemented; use reverse mode")
        return op(tensor, *others)
    with _below_autograd():
        return op(tensor, *others)


def records_plainly(tensor: Tensor) -> bool:
    """Whether a call on ``tensor`` records a gradient and no compiler or transform has a hand on it."""
    return (
        not torch.compiler.is_compiling()
        and tensor.requires_grad
        and torch.is_grad_enabled()
        and forward_ad._current_level < 0
        and _plain(tensor)
    )


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor is no wrapper: subclasses and torch.func's wrapped tensors dispatch by themselves."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise RuntimeError with ``message()`` unless ``condition``; for symbolic shapes and under Dynamo too."""
    if torch.compiler.is_dynamo_compiling():
        if not condition:  # Dynamo takes no message closure in torch._check
            raise RuntimeError(message())
    else:
        torch._check(condition, message)


def define_ops(schemas: dict[str, str], *, native_loaded: bool) -> None:
    """Define the schemas from Python, unless the native library has done so."""
    if not native_loaded:
        for schema in schemas.values():
            LIBRARY.define(schema)


def raise_second_derivative(op: str) -> None:
    """What an op's backward op answers when it is itself differentiated."""
    raise RuntimeError(
        f"levi_fast::{op}: second derivatives are not implemented (the gradient was computed with create_graph=True "
        "and then differentiated); compute this part with plain PyTorch operators if you need them"
    )
