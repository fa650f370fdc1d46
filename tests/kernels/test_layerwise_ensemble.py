"""The ensemble and loss ops: numbers and gradients against fp64, op contract, isolation, repeatability."""

from __future__ import annotations

import copy
import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.library import opcheck

import levi_fast
from levi_fast import functional, reference
from levi_fast.kernels import native

ensemble_op = importlib.import_module("levi_fast.kernels.layerwise_ensemble")
NATIVE = native.load().loaded
ISAS = list(native.load().build_info.isa_supported()) if NATIVE else []
needs_native = pytest.mark.skipif(not NATIVE, reason="the native library is not built")

CASES = st.fixed_dictionaries(
    {
        "widths": st.one_of(
            st.integers(1, 4).flatmap(lambda n: st.sampled_from([1, 16, 33, 130]).map(lambda w: [w] * n)),
            st.lists(st.sampled_from([1, 3, 16, 33, 64, 200]), min_size=1, max_size=4),
        ),
        "view_width": st.sampled_from([0, 1, 7, 32, 130]),
        "outputs": st.sampled_from([1, 2, 5, 17, 40]),
        "hidden_width": st.sampled_from([None, 1, 5, 16, 48, 64, 130]),
        "batch": st.sampled_from([0, 1, 2, 5, 31, 64, 150]),
        "mix": st.sampled_from(["mean", "learned"]),
        "activation": st.sampled_from(["gelu", "relu", "silu", "tanh"]),
        "normalize": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "zeroed_view": st.booleans(),
        "dropped": st.booleans(),
        "padded": st.booleans(),
        "stacked": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def build(case):
    """The model, its inputs and the masks, all in the case's dtype."""
    torch.manual_seed(case["seed"])
    options = {name: case[name] for name in ("hidden_width", "mix", "activation", "normalize")}
    model = reference.LayerwiseEnsemble(case["widths"], case["view_width"], case["outputs"], **options)
    if model.mix_logits is not None:
        torch.nn.init.normal_(model.mix_logits)
    model = model.to(case["dtype"])
    extra = 3 if case["padded"] else 0  # rows that are no neighbours
    taps = [torch.randn(case["batch"], w + extra).to(case["dtype"])[:, :w] for w in case["widths"]]
    view = torch.randn(case["batch"], case["view_width"]).to(case["dtype"]) if case["view_width"] else None
    view_keep = torch.rand(case["batch"]) > 0.4 if case["dropped"] and view is not None else None
    hidden_keep = None
    if case["dropped"] and case["hidden_width"]:
        hidden_keep = torch.rand(len(taps), case["batch"], case["hidden_width"]) > 0.3
    return model, taps, view, view_keep, hidden_keep


def run(model, taps, view, view_keep, hidden_keep, case, call):
    """Outputs and the gradients of every input and parameter."""
    dtype = model.bias.dtype
    taps = [tap.to(dtype).detach().requires_grad_() for tap in taps]
    view = None if view is None else view.to(dtype).detach().requires_grad_()
    layout = [torch.stack(taps)] if case["stacked"] and len(set(case["widths"])) == 1 else taps
    mix = None if model.mix_logits is None else model.mix_logits.softmax(0)
    activation = ensemble_op.ACTIVATION_NAMES.index(case["activation"])
    outputs = call(layout, view, view_keep, model.tap_weight, model.view_weight, model.bias, model.output_weight,
                   model.output_bias, mix, hidden_keep, activation, case["normalize"],
                   0.3 if hidden_keep is not None else 0.0, case["zeroed_view"])  # fmt: skip
    outputs = [output for output in outputs if output is not None]
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(o.shape, generator=generator).to(case["dtype"]).to(dtype) for o in outputs]
    inputs = [*taps, *([] if view is None else [view]), *model.parameters()]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def compare(case):
    model, *inputs = build(case)
    exact = run(copy.deepcopy(model).double(), *inputs, case, ensemble_op._run_eager)
    eager = run(model, *inputs, case, ensemble_op._run_eager)
    ours = run(model, *inputs, case, ensemble_op._run_op)
    again = run(model, *inputs, case, ensemble_op._run_op)
    for position, (truth, plain, fast, repeated) in enumerate(zip(exact, eager, ours, again, strict=True)):
        assert fast.dtype == plain.dtype and fast.shape == plain.shape
        assert torch.equal(fast, repeated), position
        # Twice the same-dtype error, and the rounding of the result and of what softmax's gradient cancels.
        allowed = 2 * (plain.double() - truth).norm() + 16 * torch.finfo(fast.dtype).eps * truth.norm() + 1e-6
        assert (fast.double() - truth).norm() <= allowed, position


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=40, deadline=None)
@given(case=CASES)
def test_numbers_and_gradients_on_every_instruction_set(isa, case):
    native.set_cpu_isa(isa)
    try:
        compare(case)
    finally:
        native.set_cpu_isa("auto")


def small(dtype=torch.float32, **changes):
    case = {
        "widths": [9, 9], "view_width": 5, "outputs": 3, "hidden_width": 7, "batch": 4, "mix": "learned",
        "activation": "gelu", "normalize": True, "dtype": dtype, "zeroed_view": True, "dropped": True,
        "padded": False, "stacked": False, "seed": 1,
    }  # fmt: skip
    return {**case, **changes}


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_rows_than_one_block_holds(dtype):
    compare(small(dtype, widths=[300, 300], hidden_width=130, batch=301, stacked=True))


@needs_native
@pytest.mark.parametrize(
    "values", [(3, 1), (30, 1), (2**14, 256), (0, 0), (5, 0), "one step of bfloat16"], ids=lambda v: str(v)
)
def test_rows_far_from_zero_keep_their_variance(values):
    """A mean of squares less a squared mean would cancel; rows of one value have none at all."""
    if values == "one step of bfloat16":  # a millionth of the squared mean: less than the squares' sum is rounded by
        taps = (1032 + 8 * (torch.rand(2, 3, 2**16) < 1 / 64)).bfloat16()
    else:
        taps = (torch.randn(2, 6, 500) * values[1] + values[0]).bfloat16()
    width = taps.shape[2]
    weight = (torch.randn(2 * width, 8) / width**0.5).bfloat16().float()
    bias = torch.zeros(2, 8)

    def logits(dtype, run):
        tensors = [t.to(dtype) for t in (weight, bias)]
        return run([taps.to(dtype)], None, None, tensors[0], None, tensors[1], None, None, None, None, 0, True, 0.0,
                   False)[1]  # fmt: skip

    exact = logits(torch.float64, ensemble_op._run_eager)
    plain = (logits(torch.bfloat16, ensemble_op._run_eager).double() - exact).norm()
    ours = (logits(torch.bfloat16, ensemble_op._run_op).double() - exact).norm()
    assert ours <= 2 * plain + 1e-3 * exact.norm() + 1e-6


def test_gradcheck_of_the_eager_twin_in_fp64():
    case = small(torch.float64)
    model, taps, view, view_keep, hidden_keep = build(case)
    taps = [tap.requires_grad_() for tap in taps]
    mix = model.mix_logits.detach().softmax(0).requires_grad_()

    def call(*tensors):
        a, b, view, weight, view_weight, bias, output_weight, output_bias, mix = tensors
        return ensemble_op._run_op([a, b], view, view_keep, weight, view_weight, bias, output_weight, output_bias,
                                   mix, hidden_keep, 0, True, 0.3, True)  # fmt: skip

    inputs = (*taps, view.requires_grad_(), model.tap_weight, model.view_weight, model.bias, model.output_weight,
              model.output_bias, mix)  # fmt: skip
    if NATIVE:  # C++ declines fp64 and says so; the dispatcher above it picks the twin
        with pytest.raises(RuntimeError, match="not float64"):
            call(*inputs)

        def call(*tensors):
            a, b, view, weight, view_weight, bias, output_weight, output_bias, mix = tensors
            return ensemble_op.layerwise_ensemble([a, b], view, view_keep, weight, view_weight, bias, output_weight,
                                                  output_bias, mix, hidden_keep, 0, True, 0.3, True)  # fmt: skip

    assert torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("hidden_width", [7, None])
def test_opcheck(hidden_width):
    case = small(hidden_width=hidden_width)
    model, taps, view, view_keep, hidden_keep = build(case)
    mix = model.mix_logits.detach().softmax(0).requires_grad_()
    opcheck(
        torch.ops.levi_fast.layerwise_ensemble.default,
        (taps, view.requires_grad_(), view_keep, model.tap_weight, model.view_weight, model.bias, model.output_weight,
         model.output_bias, mix, hidden_keep, 0, True, 0.3 if hidden_width else 0.0, True, True),
    )  # fmt: skip
    opcheck(
        torch.ops.levi_fast.layerwise_loss.default,
        (torch.randn(2, 4, 3).requires_grad_(), torch.tensor([0, 2, -100, 1]), 0, True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nan_in_one_example_reaches_no_other(dtype):
    case = small(dtype, batch=40, dropped=False, widths=[64, 64], hidden_width=32)
    _, taps, view, *_ = build(case)
    fast = levi_fast.LayerwiseEnsemble([64, 64], 5, 3, hidden_width=32, mix="learned").to(dtype).eval()
    clean = fast(taps, view)
    taps[1][7] = float("nan")
    view[9] = float("inf")
    soiled = fast(taps, view)
    others = [b for b in range(40) if b not in (7, 9)]
    assert torch.equal(soiled.layer_logits[:, others], clean.layer_logits[:, others])
    assert soiled.logits[7].isnan().all() and not soiled.logits[others].isnan().any()


def test_a_nan_in_a_dropped_view_reaches_nothing():
    fast = levi_fast.LayerwiseEnsemble([8], 4, 2, hidden_width=6, view_dropout=1.0)
    view = torch.full((3, 4), float("nan"), requires_grad=True)
    output = fast(torch.randn(1, 3, 8), view)
    output.logits.sum().backward()
    assert not output.logits.isnan().any() and torch.equal(view.grad, torch.zeros(3, 4))
    assert all(not p.grad.isnan().any() for p in fast.parameters())


def test_only_what_asks_gets_a_gradient_and_second_derivatives_say_so():
    fast = levi_fast.LayerwiseEnsemble([8, 8], 4, 2, hidden_width=6)
    taps, view = torch.randn(2, 3, 8), torch.randn(3, 4)
    for p in fast.parameters():
        p.requires_grad_(False)
    fast.output_weight.requires_grad_()
    fast(taps, view).logits.square().sum().backward()
    assert fast.output_weight.grad is not None and fast.tap_weight.grad is None
    fast.tap_weight.requires_grad_()
    loss = fast(taps, view).logits.square().sum()
    (grad,) = torch.autograd.grad(loss, fast.tap_weight, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_transforms_of_torch_func_work():
    fast = levi_fast.LayerwiseEnsemble([8, 8], 4, 2, hidden_width=6).eval()
    taps, views = torch.randn(2, 3, 8), torch.randn(5, 3, 4)
    mapped = torch.func.vmap(lambda view: fast(taps, view).logits)(views)
    torch.testing.assert_close(mapped, torch.stack([fast(taps, view).logits for view in views]))
    grad = torch.func.grad(lambda view: fast(taps, view).logits.square().sum())(views[0])
    own = views[0].clone().requires_grad_()
    fast(taps, own).logits.square().sum().backward()
    torch.testing.assert_close(grad, own.grad)


def test_autocast_returns_its_dtype_and_keeps_parameter_gradients_in_theirs():
    fast = levi_fast.LayerwiseEnsemble([8, 8], 4, 2, hidden_width=6, mix="learned")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fast(torch.randn(2, 3, 8), torch.randn(3, 4))
    assert output.logits.dtype == torch.bfloat16
    output.layer_logits.float().sum().backward()
    output = fast(torch.randn(2, 3, 8), torch.randn(3, 4))
    assert fast.tap_weight.grad.dtype == torch.float32


def test_compile_export_and_checkpointing_give_the_same():
    fast = levi_fast.LayerwiseEnsemble([8, 8], 4, 2, hidden_width=6).eval()
    taps, view = torch.randn(2, 3, 8), torch.randn(3, 4)
    expected = fast(taps, view).logits
    expected.sum().backward()
    grads = [p.grad.clone() for p in fast.parameters()]
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(fast, (taps, view)).module()
    checkpointed = torch.utils.checkpoint.checkpoint(fast, taps, view, use_reentrant=False)
    for output in (compiled(taps, view), checkpointed):
        fast.zero_grad()
        torch.testing.assert_close(output.logits, expected)
        output.logits.sum().backward()
        torch.testing.assert_close([p.grad for p in fast.parameters()], grads)
    torch.testing.assert_close(exported(taps, view).logits, expected)
    with torch.inference_mode():
        torch.testing.assert_close(fast(taps, view).logits, expected)


@pytest.mark.parametrize("problem_type", reference.PROBLEM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_in_every_dtype_against_fp64(problem_type, dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 9, 5)).to(dtype).requires_grad_()
    target = {
        "single_label_classification": torch.tensor([0, 4, -100, 1, 2, 3, -100, 0, 1]),
        "multi_label_classification": torch.rand(9, 5),
        "regression": torch.randn(9, 5),
    }[problem_type]
    loss = functional.layerwise_loss(logits, target, problem_type)
    (loss * 1024).backward()
    wide = logits.detach().double().requires_grad_()
    flat, labels = wide.reshape(27, 5), target.repeat(3, *[1] * (target.dim() - 1))
    truth = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
        "regression": torch.nn.functional.mse_loss,
    }[problem_type](flat, labels if labels.dtype == torch.int64 else labels.double())
    (truth * 1024).backward()
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)
