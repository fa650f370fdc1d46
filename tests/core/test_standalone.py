"""A standalone task model beside LEVI: it learns by itself, is weighed, and is saved with the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from levi_fast import LeviConfig, LeviModel, get_levi_model

Build = Callable[..., nn.Module]
TEXT = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6, "dropout": 0.0, "token_dropout": 0.0}
LABELS = torch.tensor([0, 1, 0])


def build(backbone: Any, own: nn.Module | None = None, **config: Any) -> LeviModel:
    torch.manual_seed(0)
    fields = {"hidden_width": 8, "task_model": TEXT, "view_dropout": 0.0, "standalone_view": True, **config}
    return get_levi_model(backbone, LeviConfig(**fields), own)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Own(nn.Module):
    """A task model of the user's own."""

    view_width = 6

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 6)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embedding(input_ids).mean(1)


@pytest.mark.parametrize("objective", ["per_layer", "ensemble", "both"])
def test_each_learns_as_it_would_by_itself(build_backbone: Build, inputs_for: Any, objective: str) -> None:
    inputs = inputs_for("bert")
    beside = build(build_backbone("bert"), objective=objective).train()
    without = build(build_backbone("bert"), objective=objective, standalone_view=False).train()
    loss = beside(**inputs, labels=LABELS).loss
    alone = without(**inputs, labels=LABELS).loss
    loss.backward()
    alone.backward()
    found, expected = gradients(beside), gradients(without)
    assert expected.keys() == {name for name in found if not name.startswith("standalone.")}
    for name, gradient in expected.items():  # from the same initial weights too
        assert torch.equal(found[name], gradient), name
    own = {name for name, _ in beside.named_parameters() if name.startswith("standalone.")}
    assert own == {name for name in found if name.startswith("standalone.")}
    # and it is the method task-model: a model without taps of the same weights has the same loss and gradients
    task_model = build(None, taps="none", objective="ensemble", standalone_view=False).train()
    task_model.load_state_dict(beside.standalone.state_dict())
    own_loss = task_model(**inputs, labels=LABELS).loss
    torch.testing.assert_close(loss, alone + own_loss)
    own_loss.backward()
    for name, gradient in gradients(task_model).items():
        torch.testing.assert_close(found[f"standalone.{name}"], gradient)


def test_its_prediction_is_weighed(build_backbone: Build, inputs_for: Any) -> None:
    inputs = inputs_for("bert")
    model = build(build_backbone("bert"), num_labels=3).eval()
    plain = model(**inputs)
    torch.testing.assert_close(plain.logits, plain.logits_with_view)
    model.config.blend, model.config.view_blend = 0.5, 0.25
    expected = 0.375 * (plain.logits_with_view + plain.logits_without_view) + 0.25 * plain.logits_without_taps
    blended = model(**inputs)
    torch.testing.assert_close(blended.logits, expected)
    torch.testing.assert_close(blended.layer_logits.mean(0), blended.logits)
    model.config.view_blend = 1.0
    view = model.standalone.task_model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
    own = model.standalone.ensemble([view[:, :0]], view)
    torch.testing.assert_close(model(**inputs).logits, own.logits)


def test_regression_comes_in_the_labels_units(build_backbone: Build, inputs_for: Any) -> None:
    fields = {"num_labels": 1, "problem_type": "regression", "target_mean": 40.0, "target_std": 12.0}
    model = build(build_backbone("bert"), **fields).eval()
    output = model(**inputs_for("bert"))
    raw = model.standalone({name: inputs_for("bert")[name] for name in ("input_ids", "attention_mask")}).logits
    torch.testing.assert_close(output.logits_without_taps, raw * 12 + 40)


def test_every_token_has_one(build_backbone: Build) -> None:
    model = build(build_backbone("bert"), pooling="token", num_labels=4, view_blend=0.5)
    ids = torch.randint(4, 44, (3, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 4}
    output = model.eval()(**batch)
    assert output.logits_without_taps.shape == output.logits.shape == (3, 7, 4)
    torch.testing.assert_close(output.logits, (output.logits_with_view + output.logits_without_taps) / 2)
    model.train()(**batch).loss.backward()
    with torch.no_grad():
        own = F.cross_entropy(output.logits_without_taps.flatten(0, 1), (ids % 4).flatten())
        both = model(**batch).loss
        alone = model.standalone
        model.standalone = None
        torch.testing.assert_close(both, model(**batch).loss + own)
        model.standalone = alone
    assert all(p.grad is not None for p in model.standalone.parameters())


def test_a_saved_model_has_it_and_loads_it(build_backbone: Build, inputs_for: Any, tmp_path: Path) -> None:
    model = build(build_backbone("bert"), view_blend=0.5).eval()
    expected = model(**inputs_for("bert")).logits
    model.save_pretrained(tmp_path)
    loaded = LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"))
    assert torch.equal(loaded(**inputs_for("bert")).logits, expected)
    assert loaded.standalone is not model.standalone
    half = LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.standalone.parameters()} == {torch.bfloat16}
    shared = loaded.config
    loaded.drop_standalone()
    assert shared.standalone_view and shared.view_blend == 0.5  # others may be built from it
    loaded.save_pretrained(tmp_path / "without")
    again = LeviModel.from_pretrained(tmp_path / "without", backbone=build_backbone("bert"))
    assert again.standalone is None and again.config.view_blend == 0.0
    assert torch.equal(again(**inputs_for("bert")).logits, model(**inputs_for("bert")).logits_with_view)


def test_a_config_from_before_there_was_one_has_none(build_backbone: Build, inputs_for: Any, tmp_path: Path) -> None:
    model = build(build_backbone("bert"), standalone_view=False, view_loss=0.5, view_blend=0.5).eval()
    expected = model(**inputs_for("bert")).logits
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document.pop("standalone_view", None)
    (tmp_path / "config.json").write_text(json.dumps(document))
    loaded = LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"))
    assert loaded.standalone is None and torch.equal(loaded(**inputs_for("bert")).logits, expected)


def test_a_module_of_the_users_own_is_copied(build_backbone: Build, inputs_for: Any, tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = build(build_backbone("bert"), Own(), task_model=None, view_blend=0.5)
    copied = model.standalone.task_model
    assert copied is not model.task_model
    assert torch.equal(copied.embedding.weight, model.task_model.embedding.weight)
    model(**inputs_for("bert"), labels=LABELS).loss.backward()
    with torch.no_grad():
        copied.embedding.weight.add_(1.0)
    expected = model.eval()(**inputs_for("bert")).logits
    model.save_pretrained(tmp_path)
    loaded = LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"), task_model=Own())
    assert torch.equal(loaded(**inputs_for("bert")).logits, expected)


def test_a_loss_of_other_making_leaves_it_untrained(build_backbone: Build, inputs_for: Any) -> None:
    model = build(build_backbone("bert"), objective="ensemble").train()
    with pytest.warns(UserWarning, match="leaves a standalone task model untrained"):
        model(**inputs_for("bert"))


@pytest.mark.parametrize("config", [{"task_model": None}, {"taps": "none"}], ids=str)
def test_it_needs_both_views(build_backbone: Build, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="standalone_view: stands beside an ensemble of taps and a task model"):
        build(build_backbone("bert"), **config)
