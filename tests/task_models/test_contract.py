"""What every task model owes: shapes, finite outputs, specs that rebuild it, learning, compile, autocast."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from levi_fast.task_models import TASK_MODELS, TextTaskModel, build_task_model, view_width_of

Inputs = dict[str, Tensor]


def text_inputs(batch: int) -> Inputs:
    mask = torch.arange(9).expand(batch, 9) < torch.randint(1, 10, (batch, 1))
    return {"input_ids": torch.randint(1, 40, (batch, 9)), "attention_mask": mask.long()}


def tabular_inputs(batch: int) -> Inputs:
    return {"numeric": torch.randn(batch, 3), "categorical": torch.randint(0, 4, (batch, 2))}


def recommendation_inputs(batch: int) -> Inputs:
    return {
        "history_features": torch.randint(0, 2, (batch, 6, 5)).float(),
        "history_ratings": torch.randint(1, 11, (batch, 6)) / 2,
        "history_mask": torch.randint(0, 2, (batch, 6)),
        "target_features": torch.randint(0, 2, (batch, 5)).float(),
    }


def image_inputs(batch: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 3, 12, 16)}


TEXT = {"vocab_size": 40, "embedding_dim": 16, "view_width": 12}
TABULAR = {"num_numeric": 3, "cardinalities": [4, 6], "view_width": 7}
CASES: dict[str, tuple[dict[str, Any], Callable[[int], Inputs]]] = {
    "text-pooled": ({"type": "text", **TEXT}, text_inputs),
    "text-transformer": ({"type": "text", **TEXT, "encoder": "transformer", "num_heads": 2}, text_inputs),
    "tabular": ({"type": "tabular", **TABULAR}, tabular_inputs),
    "table-both": (
        {"type": "table", "text": TEXT, "tabular": TABULAR},
        lambda batch: text_inputs(batch) | tabular_inputs(batch),
    ),
    "table-text": ({"type": "table", "text": TEXT}, text_inputs),
    "table-tabular": ({"type": "table", "tabular": TABULAR}, tabular_inputs),
    "recommendation": (
        {"type": "recommendation", "num_features": 5, "view_width": 12},
        recommendation_inputs,
    ),
    "image": ({"type": "image", "widths": [8, 16], "view_width": 12}, image_inputs),
}
every_model = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_every_registered_type_is_covered() -> None:
    assert {spec["type"] for spec, _ in CASES.values()} == set(TASK_MODELS)


@every_model
def test_output_shape_and_dtype(name: str) -> None:
    spec, inputs = CASES[name]
    model = build_task_model(spec)
    for batch in (0, 1, 5):
        view = model(**inputs(batch))
        assert view.shape == (batch, view_width_of(model))
        assert view.dtype == torch.float32
        assert view.isfinite().all()


@every_model
def test_spec_survives_json_and_rebuilds_the_architecture(name: str) -> None:
    spec, inputs = CASES[name]
    model = build_task_model(spec).eval()
    written = json.loads(json.dumps(model.spec))
    assert written == model.spec
    again = build_task_model(written).eval()
    assert type(again) is type(model)
    assert again.spec == model.spec
    again.load_state_dict(model.state_dict())
    batch = inputs(4)
    assert torch.equal(again(**batch), model(**batch))


@every_model
def test_spec_is_a_copy(name: str) -> None:
    model = build_task_model(CASES[name][0])
    before = copy.deepcopy(model.spec)
    model.spec.clear()
    assert model.spec == before


@every_model
def test_same_seed_same_weights_and_deepcopy(name: str) -> None:
    spec, inputs = CASES[name]
    torch.manual_seed(3)
    first = build_task_model(spec).eval()
    torch.manual_seed(3)
    second = build_task_model(spec).eval()
    batch = inputs(4)
    expected = first(**batch)
    assert torch.equal(second(**batch), expected)
    duplicate = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.add_(1.0)
    assert torch.equal(first(**batch), expected)
    assert duplicate.spec == first.spec


@every_model
def test_rows_do_not_influence_each_other(name: str) -> None:
    spec, inputs = CASES[name]
    model = build_task_model(spec).eval()
    batch = inputs(4)
    whole = model(**batch)
    for row in range(4):
        alone = model(**{key: value[row : row + 1] for key, value in batch.items()})
        torch.testing.assert_close(alone[0], whole[row], rtol=1e-5, atol=1e-6)


@every_model
def test_bfloat16_autocast_stays_close(name: str) -> None:
    spec, inputs = CASES[name]
    model = build_task_model(spec).eval()
    batch = inputs(8)
    exact = model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(**batch)
    assert (rough.float() - exact).norm() <= 0.03 * exact.norm()


@every_model
def test_bfloat16_weights_run_and_train(name: str) -> None:
    spec, inputs = CASES[name]
    model = build_task_model(spec).to(torch.bfloat16)
    view = model(**inputs(4))
    assert view.dtype == torch.bfloat16
    view.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_model
def test_every_parameter_is_used(name: str) -> None:
    """Distributed training stops at parameters without a gradient, so every one must take part."""
    spec, inputs = CASES[name]
    model = build_task_model(spec)
    model(**inputs(8)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@every_model
def test_compiles_without_graph_breaks(name: str) -> None:
    spec, inputs = CASES[name]
    model = build_task_model(spec).eval()
    batch = inputs(4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch), model(**batch), rtol=1e-5, atol=1e-6)


def fit(model: nn.Module, inputs: Inputs, target: Tensor, steps: int = 250, rate: float = 5e-3) -> float:
    """Train ``model`` and a linear layer on one batch; return the final mean squared error in eval mode."""
    head = nn.Linear(view_width_of(model), 1)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        (head(model(**inputs)).squeeze(1) - target).square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float((head(model(**inputs)).squeeze(1) - target).square().mean())


def targets_for(name: str, inputs: Inputs) -> Tensor:
    """Something a useful model must be able to read from its inputs, of variance near 1."""
    if "input_ids" in inputs:
        real = inputs["attention_mask"] != 0
        target = (((inputs["input_ids"] < 20) & real).sum(1) / real.sum(1)) * 4
        return target + (inputs["numeric"][:, 0] if "numeric" in inputs else 0.0)
    if "numeric" in inputs:
        return inputs["numeric"][:, 1] * (inputs["categorical"][:, 0] - 1.5)
    if "pixel_values" in inputs:
        columns = torch.arange(16) % 2 * 2.0 - 1.0
        stripes = torch.arange(len(inputs["pixel_values"])) % 2 * 2.0 - 1.0
        inputs["pixel_values"] = inputs["pixel_values"] * 0.3 + stripes[:, None, None, None] * columns
        return stripes  # the phase of vertical stripes: invisible to the mean brightness
    raise AssertionError(name)


@pytest.mark.parametrize("name", [name for name in CASES if name != "recommendation"])
def test_learns_a_small_problem(name: str) -> None:
    spec, inputs = CASES[name]
    spec = copy.deepcopy(spec) | {"dropout": 0.0}
    if spec["type"] == "table":
        del spec["dropout"]
        for part in ("text", "tabular"):
            if part in spec:
                spec[part] = spec[part] | {"dropout": 0.0}
    for text in (spec, spec.get("text", {})):
        if "vocab_size" in text:
            text["token_dropout"] = 0.0
    batch = inputs(48)
    target = targets_for(name, batch)
    assert fit(build_task_model(spec), batch, target) < 0.02 * float(target.var())


def test_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"type: expected one of text, tabular.*got 'txt'"):
        build_task_model({"type": "txt"})
    with pytest.raises(ValueError, match=r"expected a 'type'.*got keys \['vocab_size'\]"):
        build_task_model({"vocab_size": 3})
    with pytest.raises(ValueError, match="pass the module itself"):
        build_task_model({"type": "custom"})
    with pytest.raises(TypeError, match="expected a mapping"):
        build_task_model("text")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "text", "vocab": 3}, r"text: unknown argument 'vocab'; known are vocab_size"),
        ({"type": "text"}, "text: argument 'vocab_size' is missing"),
        ({"type": "table", "text": {"vocab": 3}}, r"table's text part: unknown argument 'vocab'"),
        ({"type": "table", "tabular": {}}, "table's tabular part: argument 'num_numeric' is missing"),
        ({"type": "table", "text": {"type": "image", "vocab_size": 3}}, "expected a spec of type 'text'"),
        ({"type": "table"}, "at least one part"),
        ({"type": "text", "vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        (
            {"type": "text", "vocab_size": 9, "encoder": "lstm"},
            "encoder: expected one of pooled, transformer",
        ),
        ({"type": "text", "vocab_size": 9, "encoder": "transformer", "num_heads": 5}, "num_heads: .*divisor"),
        ({"type": "text", "vocab_size": 9, "token_dropout": 1.0}, r"token_dropout: .*\[0, 1\)"),
        ({"type": "text", "vocab_size": 9, "view_width": True}, "view_width: expected an integer"),
        ({"type": "tabular", "num_numeric": 0}, "at least one column"),
        ({"type": "tabular", "num_numeric": 1, "cardinalities": [3, 0]}, r"cardinalities\[1\]"),
        ({"type": "recommendation", "num_features": 5, "shrinkage": 0}, "shrinkage: expected a number > 0"),
        ({"type": "recommendation", "num_features": 5, "rating_mean": float("nan")}, "rating_mean: .*finite"),
        ({"type": "image", "widths": [8, 9]}, r"widths\[1\]: expected a multiple of 8"),
        ({"type": "image", "widths": []}, "widths: expected at least one stage"),
    ],
)
def test_bad_specs_are_named(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task_model(spec)


def test_view_width_of_a_module_without_one() -> None:
    with pytest.raises(ValueError, match=r"integer view_width.*got Linear with view_width=None"):
        view_width_of(nn.Linear(2, 2))
    assert view_width_of(TextTaskModel(vocab_size=4, view_width=9)) == 9
