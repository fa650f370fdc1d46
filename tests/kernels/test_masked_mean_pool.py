"""masked_mean_pool's numbers: against fp64, for every backend, dtype, mask dtype, stride and awkward size."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from levi_fast.functional import masked_mean_pool, masked_mean_pool_into
from levi_fast.kernels import native, use_backend

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MASKS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS]
LAYOUTS = ["contiguous", "transposed", "every second", "expanded batch", "expanded time", "offset"]


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers (but for expanded layouts) with other strides; gaps are filled with NaN."""
    batch, length, width = values.shape
    if layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        wide = values.new_full((2 * batch, 2 * length, 2 * width), torch.nan)
        wide[::2, ::2, ::2] = values
        return wide[::2, ::2, ::2]
    if layout == "expanded batch" and batch:
        return values[:1].expand(batch, -1, -1)
    if layout == "expanded time" and length:
        return values[:, :1].expand(-1, length, -1)
    if layout == "offset":
        wide = values.new_full((batch, length + 1, width + 3), torch.nan)
        wide[:, 1:, 3:] = values
        return wide[:, 1:, 3:]
    return values


def exact(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """The contract in fp64."""
    keep = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask != 0
    total = torch.where(keep[..., None], hidden.double(), 0.0).sum(1)
    return total / keep.sum(1, keepdim=True).clamp(min=1)


def same_dtype_pytorch(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """What PyTorch makes of it in the input's own dtype: the yardstick for rounding errors."""
    keep = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask != 0
    clean = hidden.masked_fill(~keep[..., None], 0)
    return clean.sum(1) / keep.sum(1, keepdim=True).clamp(min=1).to(hidden.dtype)


@pytest.mark.parametrize("served_by", [pytest.param("cpp", marks=pytest.mark.native), "eager"])
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_mean_is_right_for_any_shape_stride_mask_and_dtype(served_by: str, data: st.DataObject) -> None:
    batch = data.draw(st.integers(0, 5), "batch")
    length = data.draw(st.sampled_from([0, 1, 2, 3, 7, 8, 9, 16, 63, 64, 65, 70, 130]), "length")
    width = data.draw(st.sampled_from([0, 1, 3, 8, 15, 16, 17, 31, 64, 100, 384, 1025]), "width")
    dtype = data.draw(st.sampled_from(FLOATS), "dtype")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    mask_dtype = data.draw(st.sampled_from([None, *MASKS]), "mask dtype")
    keep_rate = data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), "keep rate")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16), "seed"))

    hidden = lay_out(torch.randn(batch, length, width, generator=generator).to(dtype), layout)
    mask = None
    if mask_dtype is not None:
        keep = torch.rand(batch, length, generator=generator) < keep_rate
        mask = keep.to(mask_dtype) * 3 if mask_dtype != torch.bool else keep
        if data.draw(st.booleans(), "mask strided"):
            mask = mask.t().contiguous().t()
    with use_backend(served_by):
        out = masked_mean_pool(hidden, mask)
    assert out.shape == (batch, width)
    assert out.dtype == dtype
    wanted = exact(hidden, mask)
    error = (out.double() - wanted).abs()
    allowed = 2 * (same_dtype_pytorch(hidden, mask).double() - wanted).abs().amax() if out.numel() else 0.0
    # Where PyTorch happens to be exact, one rounding of the result and one of the sum still count as right.
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    allowed = allowed + torch.finfo(dtype).eps * wanted.abs() + unit * exact(hidden.abs(), mask)
    assert (error <= allowed + torch.finfo(dtype).tiny).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [5, 64, 1000])
def test_error_is_at_most_twice_pytorchs_in_the_same_dtype(backend: str, dtype: torch.dtype, length: int) -> None:
    torch.manual_seed(0)
    hidden = (torch.randn(8, length, 384) + 0.5).to(dtype)
    mask = torch.rand(8, length) < 0.7
    wanted = exact(hidden, mask)
    with use_backend(backend):
        ours = (masked_mean_pool(hidden, mask).double() - wanted).abs().max()
    assert ours <= 2 * (same_dtype_pytorch(hidden, mask).double() - wanted).abs().max()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_masked_values_never_reach_a_result(backend: str, dtype: torch.dtype, poison: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 70, 33).to(dtype)
    mask = torch.arange(70) < torch.tensor([70, 40, 0])[:, None]
    poisoned = hidden.masked_fill(~mask[..., None], poison)
    with use_backend(backend):
        clean = masked_mean_pool(hidden, mask)
        assert torch.equal(masked_mean_pool(poisoned, mask), clean)
        assert torch.equal(clean[2], torch.zeros(33, dtype=dtype))
        poisoned[0] = poison  # kept values of one example stay in that example
        out = masked_mean_pool(poisoned, mask)
        assert torch.equal(out[1:], clean[1:])
        assert not out[0].isfinite().any()
        # and so does an infinite gradient
        leaf = hidden.clone().requires_grad_()
        grad = torch.ones(3, 33, dtype=dtype)
        grad[1:] = poison
        (got,) = torch.autograd.grad(masked_mean_pool(leaf, mask), leaf, grad)
        assert got[0].isfinite().all()
        assert torch.equal(got[1, 40:], torch.zeros_like(got[1, 40:]))
        assert torch.equal(got[2], torch.zeros_like(got[2]))


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_both_zeros_of_a_float_mask_drop_and_nan_keeps(backend: str, value: float) -> None:
    hidden = torch.tensor([[[1.0], [2.0], [4.0]]])
    for dtype in FLOATS:
        mask = torch.tensor([[1.0, value, torch.nan]]).to(dtype)
        with use_backend(backend):
            assert masked_mean_pool(hidden, mask).item() == 2.5


@pytest.mark.native
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype, restore_isa: None) -> None:
    torch.manual_seed(0)
    info = native.load().build_info
    assert info is not None
    hidden = torch.randn(5, 150, 397).to(dtype)
    mask = torch.rand(5, 150) < 0.7
    results = []
    for isa in info.isa_supported():
        native.set_cpu_isa(isa)
        assert native.cpu_isa() == isa
        results.append(masked_mean_pool(hidden, mask))
    assert len(results) >= 1
    assert all(torch.equal(result, results[0]) for result in results)
    strided = lay_out(hidden, "every second")
    assert torch.equal(masked_mean_pool(strided, mask), results[0])


@pytest.mark.parametrize("shape", [(1, 3000, 200), (7, 300, 300)])
def test_same_bits_twice_and_for_any_number_of_threads(
    backend: str, shape: tuple[int, int, int], restore_threads: None
) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(shape, requires_grad=True)
    mask = torch.rand(shape[:2]) < 0.8
    outcomes = []
    for threads in (1, 1, 2, 5):
        torch.set_num_threads(threads)
        with use_backend(backend):
            out = masked_mean_pool(hidden, mask)
            outcomes.append((out.detach(), *torch.autograd.grad(out.square().sum(), hidden)))
    compared = outcomes[1:] if backend == "cpp" else outcomes[1:2]  # PyTorch's own sum may depend on its threads
    for out, grad in compared:
        assert torch.equal(out, outcomes[0][0])
        assert torch.equal(grad, outcomes[0][1])


@pytest.mark.native
def test_long_sums_keep_their_accuracy() -> None:
    torch.manual_seed(0)
    hidden = torch.rand(1, 300_000, 4) + 1
    wanted = exact(hidden, None)
    ours = (masked_mean_pool(hidden).double() - wanted).abs().max()
    pytorch = (hidden.mean(1).double() - wanted).abs().max()
    assert ours <= 2 * pytorch + torch.finfo(torch.float32).eps


@pytest.mark.native
def test_offsets_past_two_to_the_31_elements() -> None:
    far = 2**31 + 3
    # Untouched pages of an empty tensor cost no memory: only both ends are written.
    storage = torch.empty(far + 4096, dtype=torch.bfloat16)
    hidden = storage.as_strided((2, 4, 16), (far, 32, 1))
    hidden.copy_(torch.arange(128).reshape(2, 4, 16))
    mask_storage = torch.empty(far + 64, dtype=torch.uint8)
    mask = mask_storage.as_strided((2, 4), (far, 2))
    mask.copy_(torch.tensor([[1, 1, 0, 1], [0, 0, 1, 1]]))
    assert torch.equal(masked_mean_pool(hidden, mask).double(), exact(hidden, mask).bfloat16().double())


# --- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(backend: str, masked: bool, layout: str) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]) if masked else None
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda h: masked_mean_pool(lay_out(h, layout), mask), (hidden,))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 5, 33), (4, 64, 1030), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_gradient_is_grad_over_count(backend: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    mask = torch.rand(shape[:2]) < 0.6
    grads = [torch.randn(shape[0], shape[2]).to(dtype), torch.ones((), dtype=dtype).expand(shape[0], shape[2])]
    for grad in grads:  # expanded: what .sum().backward() hands over
        with use_backend(backend):
            (got,) = torch.autograd.grad(masked_mean_pool(hidden, mask), hidden, grad)
        wide = grad.float() if dtype != torch.float64 else grad
        row = (wide / mask.sum(1, keepdim=True).clamp(min=1)).to(dtype)
        assert got.shape == shape
        assert got.dtype == dtype
        assert torch.equal(got, torch.where(mask[..., None], row[:, None], torch.zeros((), dtype=dtype)))


def test_large_gradient_written_around_the_cache_is_right(backend: str) -> None:
    hidden = torch.zeros(9, 2000, 1001, requires_grad=True)  # 72 MB, rows of no aligned length
    mask = torch.rand(9, 2000) < 0.5
    with use_backend(backend):
        masked_mean_pool(hidden, mask).sum().backward()
    row = 1 / mask.sum(1, keepdim=True).float()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, (mask * row)[..., None].expand_as(hidden))


def test_a_frozen_input_costs_no_graph(backend: str) -> None:
    hidden = torch.randn(2, 3, 4)
    with use_backend(backend):
        assert masked_mean_pool(hidden).grad_fn is None
        asking = hidden.clone().requires_grad_()
        assert masked_mean_pool(asking).grad_fn is not None
        with torch.no_grad():
            assert masked_mean_pool(asking).grad_fn is None


def test_second_derivatives_raise(backend: str) -> None:
    hidden = torch.randn(2, 3, 4, requires_grad=True)
    with use_backend(backend):
        (grad,) = torch.autograd.grad(masked_mean_pool(hidden).square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="masked_mean_pool: second derivatives are not implemented"):
            grad.sum().backward()


@pytest.mark.native
def test_forward_mode_raises_instead_of_giving_zeros() -> None:
    hidden = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented"):
        torch.func.jvp(masked_mean_pool, (hidden,), (hidden,))


@pytest.mark.native
def test_every_output_element_is_written(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The allocator fills what it hands out with 0xfe, so that a forgotten element cannot pass for a zero."""
    script = """
import torch
from levi_fast.functional import masked_mean_pool, masked_mean_pool_into
assert (torch.empty(5000, dtype=torch.uint8) == 0xFE).all(), "unfilled"
for shape in [(3, 5, 37), (2, 0, 1000), (4, 70, 1030), (300, 3, 5)]:
    hidden = torch.ones(shape, requires_grad=True)
    mask = torch.arange(shape[0] * shape[1]).reshape(shape[:2]) % 3
    mask[0] = 0
    out = masked_mean_pool(hidden, mask)
    assert torch.equal(out, (mask != 0).any(1)[:, None].expand_as(out).float()), shape
    (grad,) = torch.autograd.grad(out.sum(), hidden)
    count = (mask != 0).sum(1, keepdim=True).clamp(min=1)
    assert torch.equal(grad, ((mask != 0) / count)[..., None].expand(shape)), shape
print("all written")
"""
    done = run_python(script, MALLOC_PERTURB_="1")
    if "unfilled" in done.stderr:
        pytest.skip("this C library does not fill allocations (MALLOC_PERTURB_ is glibc's)")
    assert "all written" in done.stdout, done.stderr


@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_into_a_bank_writes_its_slice_alone(backend: str, normalize: bool) -> None:
    bank = torch.full((3, 4, 9), 7.0)
    hidden, mask = torch.randn(4, 6, 9), torch.rand(4, 6) > 0.3
    with use_backend(backend):
        given = masked_mean_pool_into(bank[1], hidden, mask, normalize=normalize)
    expected = masked_mean_pool(hidden, mask)
    expected = torch.nn.functional.layer_norm(expected, (9,)) if normalize else expected
    assert given.data_ptr() == bank[1].data_ptr()
    torch.testing.assert_close(bank[1], expected)
    assert torch.equal(bank[::2], torch.full((2, 4, 9), 7.0))
    with pytest.raises(ValueError, match=r"out: expected \[4, 9\], got \[4, 8\]"):
        masked_mean_pool_into(bank[0, :, :8], hidden)
