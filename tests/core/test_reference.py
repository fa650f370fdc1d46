"""The reference says what the equations say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from levi_fast import reference
from levi_fast.reference import LayerwiseEnsemble


def ensemble(widths=(5, 7, 4), view_width=3, outputs=2, **options: Any) -> LayerwiseEnsemble:
    torch.manual_seed(0)
    return LayerwiseEnsemble(widths, view_width, outputs, **{"hidden_width": 6, **options}).double()


def draw(widths=(5, 7, 4), view_width=3, batch=4) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    taps = [torch.randn(batch, width, generator=generator).double() for width in widths]
    return taps, torch.randn(batch, view_width, generator=generator).double() if view_width else None


def by_concatenation(model: LayerwiseEnsemble, taps: list[torch.Tensor], view: torch.Tensor | None) -> torch.Tensor:
    """y_l computed as published: one weight on the concatenation of both parts."""
    results, start = [], 0
    for layer, tap in enumerate(taps):
        rows = model.tap_weight[start : start + tap.shape[1]]
        start += tap.shape[1]
        parts, blocks = [F.layer_norm(tap, tap.shape[1:]) if model.normalize else tap], [rows]
        if view is not None:
            parts.append(F.layer_norm(view, view.shape[1:]) if model.normalize else view)
            blocks.append(model.view_weight[:, layer])
        y = F.linear(torch.cat(parts, 1), torch.cat(blocks).T, model.bias[layer])
        if model.hidden_width is not None:
            act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[model.activation]
            y = F.linear(act(y), model.output_weight[:, layer], model.output_bias[layer])
        results.append(y)
    return torch.stack(results)


@pytest.mark.parametrize("view_width", [0, 3])
@pytest.mark.parametrize("hidden_width", [None, 6])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
def test_each_layer_is_one_linear_map_of_the_concatenation(view_width, hidden_width, normalize, activation):
    model = ensemble(view_width=view_width, hidden_width=hidden_width, normalize=normalize, activation=activation)
    taps, view = draw(view_width=view_width)
    output = model.eval()(taps, view)
    torch.testing.assert_close(output.layer_logits, by_concatenation(model, taps, view))
    torch.testing.assert_close(output.logits, output.layer_logits.mean(0))
    assert output.logits_without_view is None


def test_learned_mix_is_a_softmax_over_layers_and_is_trained():
    model = ensemble(mix="learned")
    taps, view = draw()
    torch.testing.assert_close(model.mix_weights(), torch.full((3,), 1 / 3).double())
    with torch.no_grad():
        model.mix_logits.copy_(torch.tensor([0.0, 1.0, -2.0]))
    output = model.eval()(taps, view)
    m = torch.tensor([0.0, 1.0, -2.0]).double().softmax(0)
    torch.testing.assert_close(output.logits, (m[:, None, None] * output.layer_logits).sum(0))
    output.logits.square().sum().backward()
    assert model.mix_logits.grad.abs().min() > 0


def test_zeroed_view_is_what_a_zero_view_gives_and_blend_interpolates():
    model = ensemble().eval()
    taps, view = draw()
    output = model(taps, view, zeroed_view=True)
    zero = model(taps, torch.zeros_like(view))
    torch.testing.assert_close(output.logits_without_view, zero.logits)
    torch.testing.assert_close(output.layer_logits_without_view, zero.layer_logits)
    mixed = reference.blend(output, 0.25)
    torch.testing.assert_close(mixed.logits, 0.75 * output.logits + 0.25 * zero.logits)
    torch.testing.assert_close(mixed.layer_logits, 0.75 * output.layer_logits + 0.25 * zero.layer_logits)
    assert reference.blend(output, 0.0) is output


@pytest.mark.parametrize("hidden_width", [8, None])
def test_without_taps_is_what_zero_taps_give(hidden_width):
    model = ensemble(hidden_width=hidden_width, view_dropout=0.9).train()
    taps, view = draw()
    alone = model.without_taps(view)  # no view is dropped
    zero = model.eval()([torch.zeros_like(tap) for tap in taps], view)
    torch.testing.assert_close(alone.logits, zero.logits)
    torch.testing.assert_close(alone.layer_logits, zero.layer_logits)
    with pytest.raises(ValueError, match=r"view: expected \[4, 3\]"):
        model.without_taps(view[:, :2])
    with pytest.raises(ValueError, match="view: expected None, as view_width is 0"):
        ensemble(view_width=0).without_taps(view)


def test_view_dropout_zeroes_whole_views_at_its_rate_and_only_in_training():
    model = ensemble(view_dropout=0.3)
    taps, view = draw(batch=4000)
    with_view, without = model.eval()(taps, view).logits, model(taps, torch.zeros_like(view)).logits
    trained = model.train()(taps, view).logits
    dropped = (trained == without).all(1)
    kept = (trained == with_view).all(1)
    assert bool((dropped ^ kept).all())  # every example has its whole view or none of it, and it is not rescaled
    assert abs(dropped.double().mean().item() - 0.3) < 0.03
    assert torch.equal(model.eval()(taps, view).logits, with_view)


def test_hidden_dropout_acts_in_training_only():
    model = ensemble(dropout=0.5, view_dropout=0.0)
    taps, view = draw()
    assert not torch.equal(model.train()(taps, view).logits, model(taps, view).logits)
    assert torch.equal(model.eval()(taps, view).logits, model(taps, view).logits)


@pytest.mark.parametrize("problem_type", reference.PROBLEM_TYPES)
def test_objectives_are_their_formulas(problem_type):
    model = ensemble(outputs=3).eval()
    taps, view = draw()
    output = model(taps, view)
    target, single = {
        "single_label_classification": (torch.tensor([0, 2, -100, 1]), F.cross_entropy),
        "multi_label_classification": (torch.eye(4, 3).double(), F.binary_cross_entropy_with_logits),
        "regression": (torch.randn(4, 3).double(), F.mse_loss),
    }[problem_type]
    target_like = target if problem_type == "single_label_classification" else target.float()
    per_layer = torch.stack([single(y.float(), target_like) for y in output.layer_logits]).mean()
    ensemble_loss = single(output.logits.float(), target_like)
    losses = {o: reference.objective_loss(output, target, problem_type, o) for o in reference.OBJECTIVES}
    torch.testing.assert_close(losses["per_layer"], per_layer)
    torch.testing.assert_close(losses["ensemble"], ensemble_loss)
    torch.testing.assert_close(losses["both"], (per_layer + ensemble_loss) / 2)


def test_gradients_are_right_by_finite_differences():
    model = ensemble(mix="learned").eval()
    taps, view = draw(batch=2)
    names = [name for name, _ in model.named_parameters()]

    def run(view, *parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (taps, view)).logits

    assert torch.autograd.gradcheck(
        run, (view.requires_grad_(), *[p.detach().requires_grad_() for p in model.parameters()])
    )


def test_a_bad_example_does_not_reach_the_others():
    model = ensemble(view_dropout=0.5)
    taps, view = draw()
    clean = model.eval()(taps, view, zeroed_view=True)
    for bad in (float("nan"), float("inf")):
        dirty_taps = [tap.clone() for tap in taps]
        dirty_taps[1][2], dirty_view = bad, view.clone()
        dirty_view[2] = bad
        dirty = model(dirty_taps, dirty_view, zeroed_view=True)
        for a, b in zip(clean, dirty, strict=True):
            torch.testing.assert_close(a[..., [0, 1, 3], :], b[..., [0, 1, 3], :], rtol=0, atol=0)


def test_a_dropped_view_is_gone_even_where_it_is_nan():
    model = ensemble(view_dropout=1.0).train()
    taps, view = draw()
    assert torch.isfinite(model(taps, torch.full_like(view, float("nan"))).logits).all()


def test_taps_of_width_zero_leave_the_view_alone():
    model = ensemble(widths=(0,), view_dropout=0.0)
    _, view = draw()
    output = model([torch.empty(4, 0).double()], view)
    assert output.logits.shape == (4, 2) and torch.isfinite(output.logits).all()


def test_initialisation_is_that_of_linear_layers():
    model = LayerwiseEnsemble([100, 300], 44, 2, hidden_width=64)
    first, second = model.tap_weight.split([100, 300])
    for block, fan_in in ((first, 144), (second, 344)):
        assert block.abs().max() <= fan_in**-0.5
        assert abs(block.std().item() * (3 * fan_in) ** 0.5 - 1) < 0.05
    assert model.view_weight[:, 1].abs().max() <= 344**-0.5 and model.output_weight.abs().max() <= 1 / 8


@pytest.mark.parametrize(
    ("arguments", "options", "names"),
    [
        (([], 3, 2), {}, "tap_widths"),
        (([4, -1], 3, 2), {}, "tap_widths"),
        (([0], 0, 2), {}, "tap_widths"),
        (([4], -3, 2), {}, "view_width"),
        (([4], 3, 0), {}, "num_outputs"),
        (([4], 3, 2), {"hidden_width": 0}, "hidden_width"),
        (([4], 3, 2), {"activation": "swish"}, "activation.*swish"),
        (([4], 3, 2), {"mix": "max"}, "mix"),
        (([4], 3, 2), {"dropout": 1.5}, "dropout"),
        (([4], 3, 2), {"view_dropout": -0.1}, "view_dropout"),
        (([4], 3, 2), {"dropout": 0.1, "hidden_width": None}, "dropout"),
    ],
)
def test_bad_arguments_are_named(arguments, options, names):
    with pytest.raises(ValueError, match=names):
        LayerwiseEnsemble(*arguments, **options)


def test_bad_inputs_are_named():
    model = ensemble().eval()
    taps, view = draw()
    cases = [
        (taps[:2], view, "taps: expected 3 layers"),
        ([taps[0], taps[1][:2], taps[2]], view, r"taps\[1\]: expected \[4, 7\]"),
        (taps, None, "view: expected"),
        (taps, view[:, :2], r"view: expected \[4, 3\]"),
        (torch.zeros(3, 4), view, r"taps: expected \[L, B, D\]"),
    ]
    for bad_taps, bad_view, message in cases:
        with pytest.raises(ValueError, match=message):
            model(bad_taps, bad_view)
    with pytest.raises(ValueError, match="view: expected None"):
        ensemble(view_width=0)(taps, view)
    with pytest.raises(ValueError, match="objective"):
        reference.objective_loss(model(taps, view), torch.zeros(4).long(), "single_label_classification", "sum")
    with pytest.raises(ValueError, match="problem_type"):
        reference.task_loss(torch.zeros(4, 2), torch.zeros(4), "ranking")
