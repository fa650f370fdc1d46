"""masked_mean_pool as a PyTorch op: opcheck, compilation, export, modes, and the same errors on every path."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from levi_fast import kernels
from levi_fast.functional import masked_mean_pool
from levi_fast.kernels import native, use_backend
from levi_fast.kernels.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]
FORWARD = torch.ops.levi_fast.masked_mean_pool.default
BACKWARD = torch.ops.levi_fast.masked_mean_pool_backward.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 3, 4, dtype=dtype)
    for mask in (None, torch.tensor([[1, 0, 1], [0, 0, 0]])):
        torch.library.opcheck(FORWARD, (hidden, mask))
        torch.library.opcheck(FORWARD, (hidden.clone().requires_grad_(), mask))
        torch.library.opcheck(BACKWARD, (hidden[:, 0], mask, 3))
    torch.library.opcheck(FORWARD, (hidden.transpose(1, 2), torch.ones(2, 4, dtype=torch.bool)))
    torch.library.opcheck(FORWARD, (hidden[:, :0], None))


BAD = [
    ((torch.ones(2, 3), None), r"hidden must have 3 dimensions [B, T, D], got shape [2, 3]"),
    (
        (torch.ones(2, 3, 4, dtype=torch.int64), None),
        "hidden must be float32, bfloat16, float16 or float64, got int64",
    ),
    (
        (torch.ones(2, 3, 4, dtype=torch.complex64), None),
        "hidden must be float32, bfloat16, float16 or float64, got complex64",
    ),
    (
        (torch.ones(2, 3, 4).to(torch.float8_e5m2), None),
        "hidden must be float32, bfloat16, float16 or float64, got float8_e5m2",
    ),
    (
        (torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.complex64)),
        "mask must be bool, integer or real floating-point, got complex64",
    ),
    ((torch.ones(2, 3, 4), torch.ones(2, 4)), "mask must have shape [B, T] = [2, 3], got [2, 4]"),
    ((torch.ones(2, 3, 4), torch.ones(3, 3)), "mask must have shape [B, T] = [2, 3], got [3, 3]"),
    ((torch.ones(2, 3, 4), torch.ones(2, 3, 1)), "mask must have shape [B, T] = [2, 3], got [2, 3, 1]"),
]


def native_op(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return FORWARD(hidden, mask)


def eager_twin(hidden: Tensor, mask: Tensor | None) -> Tensor:
    with use_backend("eager"):
        return masked_mean_pool(hidden, mask)


def meta(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return masked_mean_pool(hidden.to("meta"), None if mask is None else mask.to("meta"))


def fake(hidden: Tensor, mask: Tensor | None) -> Tensor:
    with FakeTensorMode() as mode:
        return masked_mean_pool(mode.from_tensor(hidden), None if mask is None else mode.from_tensor(mask))


@pytest.mark.parametrize("path", [masked_mean_pool, native_op, eager_twin, meta, fake])
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gives_the_same_error_on_every_path(
    path: Callable[..., Tensor], arguments: tuple[Tensor, Tensor | None], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape('masked_mean_pool: ' + message)}$"):
        path(*arguments)


def test_bad_gradient_gives_the_same_error_on_every_path() -> None:
    grad, mask = torch.ones(2, 4), torch.ones(2, 3)
    for bad, message in [
        ((grad[0], None, 3), "grad must have 2 dimensions [B, D], got shape [4]"),
        ((grad, None, -1), "length must be at least 0, got -1"),
        ((grad.long(), None, 3), "grad must be float32, bfloat16, float16 or float64, got int64"),
        ((grad, mask, 4), "mask must have shape [B, T] = [2, 4], got [2, 3]"),
    ]:
        for device in ("cpu", "meta"):
            moved = [value.to(device) if isinstance(value, Tensor) else value for value in bad]
            with pytest.raises(RuntimeError, match=f"^{re.escape('masked_mean_pool_backward: ' + message)}$"):
                BACKWARD(*moved)


def test_a_mask_on_another_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="mask must be on the device of the other input, meta, got cpu"):
        masked_mean_pool(torch.ones(2, 3, 4, device="meta"), torch.ones(2, 3))


class Pooled(torch.nn.Module):
    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return masked_mean_pool(hidden * 2, mask)


def test_compiles_whole_with_gradients(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(Pooled(), fullgraph=True, dynamic=True, backend="aot_eager")
    with use_backend(backend):
        for batch, length in [(2, 3), (4, 7), (5, 1)]:
            hidden = torch.randn(batch, length, 8, requires_grad=True)
            mask = torch.rand(batch, length) < 0.7
            out = compiled(hidden, mask)
            torch.testing.assert_close(out, Pooled()(hidden, mask))
            (got,) = torch.autograd.grad(out.sum(), hidden)
            (wanted,) = torch.autograd.grad(Pooled()(hidden, mask).sum(), hidden)
            torch.testing.assert_close(got, wanted)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    compiled = torch.compile(Pooled(), fullgraph=True)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    mask = torch.rand(3, 5) < 0.7
    out = compiled(hidden, mask)
    torch.testing.assert_close(out, Pooled()(hidden, mask))
    out.sum().backward()
    assert hidden.grad is not None


def test_compiled_code_follows_a_change_of_backend() -> None:
    torch.compiler.reset()
    seen: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.append({str(node.target) for node in graph.graph.nodes if node.op == "call_function"})
        return graph

    compiled = torch.compile(Pooled(), fullgraph=True, backend=record)
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    automatic = compiled(hidden, mask)
    with use_backend("eager"):
        forced = compiled(hidden, mask)
    torch.testing.assert_close(automatic, forced)
    assert "levi_fast.masked_mean_pool.default" in seen[0]
    assert len(seen) == 2
    assert "levi_fast.masked_mean_pool.default" not in seen[1]


def test_exports_with_free_sizes() -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Pooled(), (torch.randn(3, 5, 4), torch.ones(3, 5)), dynamic_shapes=(free, free))
    assert "levi_fast.masked_mean_pool.default" in str(program.graph)
    hidden, mask = torch.randn(7, 9, 4), torch.rand(7, 9).round()
    torch.testing.assert_close(program.module()(hidden, mask), Pooled()(hidden, mask))


def test_autocast_leaves_the_dtype_alone(backend: str) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
        out = masked_mean_pool(hidden)
        assert out.dtype == torch.float32
    out.sum().backward()
    assert hidden.grad is not None


def test_inference_mode(backend: str) -> None:
    hidden = torch.randn(2, 3, 4)
    with torch.inference_mode(), use_backend(backend):
        inside = masked_mean_pool(torch.randn(2, 3, 4))
        assert inside.is_inference()
        torch.testing.assert_close(masked_mean_pool(hidden), hidden.mean(1))


def test_vmap_and_subclasses_take_the_ordinary_way() -> None:
    hidden = torch.randn(5, 2, 3, 4)
    torch.testing.assert_close(torch.func.vmap(masked_mean_pool)(hidden), hidden.mean(2))
    parameter = torch.nn.Parameter(torch.randn(2, 3, 4))
    masked_mean_pool(parameter).sum().backward()
    assert parameter.grad is not None


def test_schemas_agree_between_python_and_cpp() -> None:
    source = re.sub(r'"\n\s+"', "", (ROOT / "csrc" / "schemas.h").read_text())  # adjacent strings are one
    in_cpp = re.findall(r'^\s+"(\w+\(.*\) -> .*)",$', source, re.MULTILINE)
    assert tuple(in_cpp) == tuple(SCHEMAS.values())
    for name, text in SCHEMAS.items():
        assert str(getattr(torch.ops.levi_fast, name).default._schema) == f"levi_fast::{text}"
    info = native.load().build_info
    if info is not None:
        assert tuple(info.schemas) == tuple(SCHEMAS.values())
    assert set(kernels.backend_report()) == {name for name in SCHEMAS if not name.endswith("_backward")}
