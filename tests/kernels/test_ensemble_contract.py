"""The native ensemble beyond its numbers: isolation, repeatability, fresh memory, far offsets, empty shapes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import levi_fast
from levi_fast import reference
from levi_fast.kernels import native

ensemble_op = importlib.import_module("levi_fast.kernels.layerwise_ensemble")
pytestmark = pytest.mark.native
FAST = [torch.float32, torch.bfloat16, torch.float16]


def model_and_inputs(
    layers: int, width: int, view_width: int, hidden: int | None, outputs: int, batch: int, dtype: torch.dtype
) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    model = levi_fast.LayerwiseEnsemble(
        [width] * layers, view_width, outputs, hidden_width=hidden, mix="learned", view_dropout=0.0
    ).to(dtype)
    return model, torch.randn(layers, batch, width).to(dtype), torch.randn(batch, view_width).to(dtype)


def everything(model: Any, taps: Tensor, view: Tensor) -> list[Tensor]:
    """Outputs (also with the view zeroed) and every gradient."""
    model.zero_grad()
    taps, view = taps.detach().requires_grad_(), view.detach().requires_grad_()
    outputs = [output for output in model(taps, view, zeroed_view=True) if output is not None]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    inputs = [taps, view, *model.parameters()]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, inputs, grads))


@pytest.mark.parametrize("dtype", FAST)
def test_the_same_bits_for_any_number_of_threads(restore_threads: None, dtype: torch.dtype) -> None:
    case = model_and_inputs(3, 200, 40, 130, 9, 300, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(everything(*case))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FAST)
def test_memory_of_an_earlier_step_shows_nowhere(dtype: torch.dtype) -> None:
    """Large results come from blocks that earlier ones gave back: filled with NaN here, all must be overwritten."""
    case = model_and_inputs(3, 256, 64, 128, 70, 200, dtype)
    first = everything(*case)
    kept = [t.clone() for t in first]
    native.release_kept()
    assert native.kept_bytes() == 0
    for tensor in first:
        tensor.fill_(torch.nan)
    del first, tensor
    assert native.kept_bytes() > 0  # some of them came back as blocks
    again = everything(*case)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_kept_memory_is_bounded_and_can_be_given_back() -> None:
    model, taps, view = model_and_inputs(2, 512, 8, 256, 4, 32, torch.float32)
    for batch in range(1, 40):
        model(taps[:, :batch], view[:batch]).logits.sum().backward()
        model.zero_grad()
    assert 0 < native.kept_bytes() <= 512 * 2**20
    native.release_kept()
    assert native.kept_bytes() == 0


@pytest.mark.slow
def test_fresh_heap_memory_shows_nowhere(run_python: Any) -> None:
    """The C library fills what it hands out (NaN in fp16, 3e38 elsewhere); small results live there."""
    done = run_python(
        """
import torch, levi_fast
from levi_fast import reference
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    shapes = [(1, 1, 1, 1, 1, 1), (2, 33, 7, 17, 3, 5), (3, 16, 4, 16, 40, 20)]
    for layers, width, view, hidden, outputs, batch in shapes:
        torch.manual_seed(0)
        models = [c([width] * layers, view, outputs, hidden_width=hidden, view_dropout=0.0).to(dtype)
                  for c in (reference.LayerwiseEnsemble, levi_fast.LayerwiseEnsemble)]
        models[1].load_state_dict(models[0].state_dict())
        taps, views = torch.randn(layers, batch, width).to(dtype), torch.randn(batch, view).to(dtype)
        target = torch.randint(outputs, (batch,))
        for model in models:
            y = model(taps, views).layer_logits
            levi_fast.functional.layerwise_loss(y, target, "single_label_classification").backward()
        for a, b in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(a.grad.float(), b.grad.float(), rtol=0.05, atol=0.05)
print("same")
""",
        MALLOC_PERTURB_="128",
    )
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("dtype", FAST)
def test_a_bad_example_leaves_the_gradients_of_the_others_alone(dtype: torch.dtype) -> None:
    model, taps, view = model_and_inputs(2, 64, 5, 32, 3, 40, dtype)
    clean = everything(model, taps, view)
    taps[1, 7] = torch.nan
    view[9] = torch.inf
    soiled = everything(model, taps, view)
    others = [b for b in range(40) if b not in (7, 9)]
    for position, rows in ((4, (slice(None), others)), (5, others)):  # the taps' and the view's gradients
        assert torch.equal(soiled[position][rows], clean[position][rows])
    assert soiled[4][1, 7].isnan().all()


def test_rows_and_layers_farther_apart_than_two_to_the_31_elements() -> None:
    far = 2**31 + 5
    # Untouched pages of an empty tensor cost no memory: only the rows themselves are written.
    taps = torch.empty(2 * far + 64, dtype=torch.bfloat16).as_strided((2, 2, 16), (far, far, 1))
    taps.copy_(torch.randn(2, 2, 16))
    model, _, view = model_and_inputs(2, 16, 4, 8, 3, 2, torch.bfloat16)
    for ours, wanted in zip(everything(model, taps, view), everything(model, taps.contiguous(), view), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """Rows expanded with stride 0: the index arithmetic of 2^31 elements in the memory of one row."""
    layers, batch, width = 2, 2**21 + 3, 512
    row = torch.randn(1, 1, width)
    taps = row.expand(layers, batch, width)
    assert taps.numel() > 2**31
    model, _, _ = model_and_inputs(layers, width, 0, None, 1, 1, torch.float32)
    output = model(taps)
    small = model(row.expand(layers, 1, width))
    assert torch.equal(output.layer_logits, small.layer_logits.expand(layers, batch, 1))
    output.layer_logits.backward(torch.full((layers, batch, 1), 1 / batch))
    large = model.tap_weight.grad
    model.zero_grad()
    small.layer_logits.sum().backward()
    torch.testing.assert_close(large, model.tap_weight.grad, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("widths", "view_width", "hidden", "outputs", "batch"),
    [([0, 0], 3, 4, 2, 5), ([0, 7], 3, None, 2, 5), ([4], 0, 3, 1, 0), ([4], 2, None, 1, 0), ([1], 1, 1, 1, 1)],
)
def test_empty_and_smallest_shapes(
    widths: list[int], view_width: int, hidden: int | None, outputs: int, batch: int
) -> None:
    torch.manual_seed(0)
    spec = reference.LayerwiseEnsemble(widths, view_width, outputs, hidden_width=hidden, view_dropout=0.0)
    fast = levi_fast.LayerwiseEnsemble(widths, view_width, outputs, hidden_width=hidden, view_dropout=0.0)
    fast.load_state_dict(spec.state_dict())
    taps = [torch.randn(batch, width) for width in widths]
    view = torch.randn(batch, view_width) if view_width else None
    for model in (spec, fast):
        output = model(taps, view)
        (output.logits.square().sum() + output.layer_logits.sum()).backward()
    torch.testing.assert_close(fast(taps, view), spec(taps, view))
    for ours, wanted in zip(fast.parameters(), spec.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if wanted.grad is None else wanted.grad)
