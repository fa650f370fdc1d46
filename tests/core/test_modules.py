"""The drop-in against the reference: same parameters, same numbers, same gradients."""

from __future__ import annotations

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import levi_fast
from levi_fast import functional, reference

SHAPES = st.fixed_dictionaries(
    {
        "widths": st.one_of(
            st.integers(1, 5).flatmap(lambda n: st.integers(1, 33).map(lambda w: [w] * n)),
            st.lists(st.integers(1, 33), min_size=1, max_size=5),
        ),
        "view_width": st.sampled_from([0, 1, 2, 7, 33]),
        "outputs": st.sampled_from([1, 2, 5, 19]),
        "hidden_width": st.sampled_from([None, 1, 3, 17, 64]),
        "batch": st.sampled_from([0, 1, 2, 5, 31]),
        "mix": st.sampled_from(["mean", "learned"]),
        "activation": st.sampled_from(["gelu", "relu", "silu", "tanh"]),
        "normalize": st.booleans(),
    }
)


def pair(case, dtype=torch.float64):
    torch.manual_seed(0)
    arguments = (case["widths"], case["view_width"], case["outputs"])
    options = {k: case[k] for k in ("hidden_width", "mix", "activation", "normalize")}
    spec = reference.LayerwiseEnsemble(*arguments, **options).to(dtype)
    if spec.mix_logits is not None:
        torch.nn.init.normal_(spec.mix_logits)
    fast = levi_fast.LayerwiseEnsemble(*arguments, **options).to(dtype)
    fast.load_state_dict(spec.state_dict())
    return spec, fast


def draw(case, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    taps = [torch.randn(case["batch"], w, generator=generator).to(dtype) for w in case["widths"]]
    view = (
        torch.randn(case["batch"], case["view_width"], generator=generator).to(dtype) if case["view_width"] else None
    )
    return taps, view


@settings(max_examples=120, deadline=None)
@given(case=SHAPES, train=st.booleans())
def test_outputs_and_gradients_equal_the_references(case, train):
    spec, fast = pair(case)
    taps, view = draw(case)
    results = []
    for model, layout in ((spec, taps), (fast, torch.stack(taps) if len(set(case["widths"])) == 1 else taps)):
        model.train(train)
        torch.manual_seed(5)  # view dropout draws the same examples
        own_view = None if view is None else view.clone().requires_grad_()
        output = model(layout, own_view, zeroed_view=True)
        sum((t * torch.linspace(-1, 1, max(t.numel(), 1))[: t.numel()].view_as(t)).sum() for t in output).backward()
        results.append((output, [p.grad for p in model.parameters()], None if own_view is None else own_view.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(case=SHAPES.filter(lambda case: case["view_width"] > 0))
def test_predictions_without_taps_equal_the_references(case):
    results = []
    for model in pair(case):
        view = draw(case)[1].requires_grad_()
        output = model.without_taps(view)
        sum(
            (t * torch.linspace(-1, 1, max(t.numel(), 1))[: t.numel()].view_as(t)).sum() for t in output[:2]
        ).backward()
        results.append((output[:2], [p.grad for p in model.parameters()], view.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_width", [None, 128])
def test_error_is_at_most_twice_the_references_in_the_same_dtype(dtype, hidden_width):
    case = {
        "widths": [96] * 4, "view_width": 33, "outputs": 3, "hidden_width": hidden_width, "batch": 17,
        "mix": "learned", "activation": "gelu", "normalize": True,
    }  # fmt: skip
    spec, fast = pair(case, dtype)
    taps, view = draw(case, dtype)
    exact = copy.deepcopy(spec).double().eval()([tap.double() for tap in taps], view.double())
    eager, ours = spec.eval()(taps, view), fast.eval()(torch.stack(taps), view)
    for name in ("logits", "layer_logits"):
        truth = getattr(exact, name)
        allowed = 2 * (getattr(eager, name).double() - truth).norm() + torch.finfo(dtype).eps * truth.norm()
        assert (getattr(ours, name).double() - truth).norm() <= allowed


def test_state_dict_fits_both_ways_and_copies_survive():
    case = {"widths": [8, 8], "view_width": 4, "outputs": 2, "hidden_width": 5, "batch": 3,
            "mix": "learned", "activation": "gelu", "normalize": True}  # fmt: skip
    spec, fast = pair(case, torch.float32)
    spec.load_state_dict(fast.state_dict())
    taps, view = draw(case, torch.float32)
    expected = fast.eval()(taps, view).logits
    for clone in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(clone(taps, view).logits, expected)
    assert isinstance(fast, reference.LayerwiseEnsemble) and repr(fast) == repr(spec)


@pytest.mark.parametrize("problem_type", reference.PROBLEM_TYPES)
@pytest.mark.parametrize("outputs", [1, 4])
def test_loss_over_all_layers_equals_the_references_loop(problem_type, outputs):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 6, outputs, generator=generator).requires_grad_()
    target = {
        "single_label_classification": torch.tensor([0, outputs - 1, -100, 0, 0, outputs - 1]),
        "multi_label_classification": torch.rand(6, outputs, generator=generator).round(),
        "regression": torch.randn(6, outputs, generator=generator),
    }[problem_type]
    ours = functional.layerwise_loss(logits, target, problem_type)
    (ours_grad,) = torch.autograd.grad(ours, logits)
    expected = reference.layerwise_loss(logits, target, problem_type)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours_grad, expected_grad)


def test_functional_names_the_argument_that_does_not_fit():
    _, fast = pair({"widths": [8, 8], "view_width": 4, "outputs": 2, "hidden_width": 5, "mix": "learned",
                    "activation": "gelu", "normalize": True})  # fmt: skip
    good = {
        "taps": torch.zeros(2, 3, 8).double(), "view": torch.zeros(3, 4).double(), "tap_weight": fast.tap_weight,
        "view_weight": fast.view_weight, "bias": fast.bias, "output_weight": fast.output_weight,
        "output_bias": fast.output_bias, "mix_weights": torch.ones(2).double(),
    }  # fmt: skip
    functional.layerwise_ensemble(**good)
    bad = {
        "tap_weight": fast.tap_weight[:-1], "view_weight": None, "bias": fast.bias[:1], "output_bias": None,
        "mix_weights": torch.ones(3), "view": torch.zeros(2, 4).double(), "view_keep": torch.ones(2).bool(),
        "activation": "swish", "output_weight": fast.output_weight[:, :, :4],
    }  # fmt: skip
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            functional.layerwise_ensemble(**{**good, name: value})
    loss_cases = [
        (torch.zeros(3, 2), torch.zeros(3).long(), "single_label_classification", "layer_logits"),
        (torch.zeros(2, 3, 2), torch.zeros(4).long(), "single_label_classification", "target"),
        (torch.zeros(2, 3, 2), torch.zeros(3), "single_label_classification", "target"),
        (torch.zeros(2, 3, 2), torch.zeros(3), "regression", "target"),
        (torch.zeros(2, 3, 2), torch.zeros(3), "ranking", "problem_type"),
    ]
    for logits, target, problem_type, name in loss_cases:
        with pytest.raises(ValueError, match=name):
            functional.layerwise_loss(logits, target, problem_type)
