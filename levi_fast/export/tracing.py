"""torch.export of what is served, with dynamic batch and sequence, and nothing of this machine in it."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from levi_fast.errors import DataError
from levi_fast.export.inputs import BATCH, HISTORY, SEQUENCE, InputSpec, example_sizes
from levi_fast.kernels import use_backend

MAX_BATCH = 65536
MAX_HISTORY = 65536


def trace(module: nn.Module, inputs: Sequence[InputSpec], longest: int, ops: str) -> ExportedProgram:
    """Trace a module of :mod:`levi_fast.export.modules`.

    Args:
        module: in eval mode.
        inputs: its arguments.
        longest: most tokens of a text.
        ops: "fused" keeps the ops of ``torch.ops.levi_fast``; "plain" writes them out in PyTorch's own operators.

    Raises:
        DataError: if torch.export cannot follow the model; the message holds its cause.
    """
    sizes = example_sizes()
    bounds = {BATCH: MAX_BATCH, SEQUENCE: longest, HISTORY: MAX_HISTORY}
    sizes[SEQUENCE] = min(sizes[SEQUENCE], longest)
    dynamic = {name: Dim(name, min=1, max=bounds[name]) for name in bounds}
    shapes = [
        {axis: dynamic[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)} for spec in inputs
    ]
    arguments = tuple(spec.example(sizes) for spec in inputs)
    backend = use_backend("eager") if ops == "plain" else contextlib.nullcontext()
    with backend, torch.no_grad(), _quiet():
        try:
            program = torch.export.export(module, arguments, dynamic_shapes=_shapes(module, shapes), strict=False)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"export: torch.export cannot follow this model: {first}") from error
    _forget_this_machine(program)
    return program


def custom_ops(program: ExportedProgram) -> list[str]:
    """Names of the ops of this library that a program calls."""
    found = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return sorted(name for name in found if name.startswith("levi_fast."))


def _forget_this_machine(program: ExportedProgram) -> None:
    """Drop the stack traces, which hold this machine's paths and with them perhaps a user's name."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for name in ("stack_trace", "from_node", "source_fn_stack"):
                    node.meta.pop(name, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations between the libraries concerned
        yield


def run_all(program: Any, arguments: Sequence[Tensor]) -> Tensor:
    """Logits of a callable that may wrap them in a tuple."""
    result = program(*arguments)
    return result if isinstance(result, Tensor) else result[0]


def _shapes(module: nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """The dynamic shapes in the form of the forward's signature: ``taps`` by itself, ``*inputs`` as one tuple."""
    named = sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
    rest = shapes[named:]
    return (*shapes[:named], tuple(rest)) if rest else tuple(shapes[:named])
