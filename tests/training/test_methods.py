"""Every method of ``--method``: it learns, trains what it should, and comes back from its folder as it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from levi_fast.backbones import load_backbone
from levi_fast.config import LeviConfig
from levi_fast.data.encoded import EncodedDataset
from levi_fast.errors import DataError
from levi_fast.heads import ConcatenatedHead, OutputEnsemble
from levi_fast.modeling import LeviModel
from levi_fast.report.tables import METHOD_TITLES
from levi_fast.training.feature_selection import relevance
from levi_fast.training.fit import TrainingOptions
from levi_fast.training.interpolation import ALPHAS
from levi_fast.training.methods import METHODS, canonical, find_method, method_config
from levi_fast.training.prediction import predict
from levi_fast.training.runs import MethodResult, Splits, TapBank, run_method

TEXT = {"type": "text", "vocab_size": 48, "embedding_dim": 8, "view_width": 8}
KINDS = {
    "classes": {"num_labels": 2, "problem_type": "single_label_classification"},
    "multi-label": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression", "target_mean": 10.0, "target_std": 2.0},
}


def dataset(kind: str, seed: int, count: int = 96) -> EncodedDataset:
    """Texts of one clear word, 10 or 11, among noise; every label follows from it."""
    g = torch.Generator().manual_seed(seed)
    side = torch.arange(count) % 2
    texts = []
    for place in side.tolist():
        noise = torch.randint(12, 40, (int(torch.randint(2, 5, (1,), generator=g)),), generator=g).tolist()
        texts.append([2, *noise, 10 + place, 10 + place, 3])
    labels: torch.Tensor = side
    if kind == "multi-label":
        labels = torch.stack([side, 1 - side, torch.ones_like(side)], dim=1).float()
    elif kind == "regression":
        labels = 8.0 + 4.0 * side.float()
    return EncodedDataset(f"seed {seed}", token_ids=texts, labels=labels)


def run(method: str, kind: str, backbone: torch.nn.Module, *, epochs: int = 15) -> tuple[MethodResult, Splits]:
    config = LeviConfig(task_model=TEXT, hidden_width=8, **KINDS[kind])
    splits = Splits(dataset(kind, 0), dataset(kind, 1, 32), dataset(kind, 2, 64), {"new": dataset(kind, 3, 32)})
    bank = TapBank.build(backbone, config, splits)
    rate = 1e-2 if find_method(method).trains_backbone else None
    options = TrainingOptions(epochs=epochs, batch_size=16, learning_rate=1e-2, backbone_learning_rate=rate)
    return run_method(method, config, splits, options, backbone=backbone, bank=bank), splits


@pytest.fixture
def backbone(tiny_bert_dir: str) -> torch.nn.Module:
    return load_backbone(tiny_bert_dir)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_learns_and_comes_back_as_it_was(
    backbone: torch.nn.Module, tiny_bert_dir: str, tmp_path: Path, method: str, kind: str
) -> None:
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    result, splits = run(method, kind, backbone)
    if kind == "regression":
        assert result.id["rmse"] < 1.6  # predicting the mean: 2.0
    else:
        assert result.id["accuracy" if kind == "classes" else "subset_accuracy"] > 0.75  # chance: 0.5
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    trained = {name for name, parameter in result.model.named_parameters() if parameter.requires_grad}
    inside = {name for name in trained if name.startswith("backbone.")}
    assert bool(inside) == METHODS[method].trains_backbone and trained - inside
    if "lora" in method:
        assert all(".lora_" in name for name in inside)
    result.model.save_pretrained(tmp_path / "model")
    again = LeviModel.from_pretrained(tmp_path / "model")
    assert splits.test is not None
    one, other = predict(result.model, splits.test).logits, predict(again, splits.test).logits
    np.testing.assert_array_equal(one, other)


def test_trained_parameters_are_those_of_the_method(backbone: torch.nn.Module) -> None:
    view = 48 * 8  # at least the embeddings of the task model
    sizes = {m: run(m, "classes", backbone, epochs=1)[0].model.num_parameters_by_part()[0] for m in METHODS}
    assert sizes["linear-probe"] == 16 * 2 + 2
    assert sizes["mlp-probe"] == 48 * 8 + 8 + 8 * 2 + 2
    assert sizes["taps-only"] == 3 * (16 * 8 + 8 + 8 * 2 + 2)
    assert sizes["head2toe"] < 48 * 2 + 2
    assert sizes["levi-last-tap"] > view + 16 * 8 and sizes["levi-last-tap"] < sizes["levi"]
    whole = sum(parameter.numel() for parameter in backbone.parameters())
    assert {sizes[m] for m in ("fine-tuning", "lp-ft", "wise-ft")} == {whole + sizes["linear-probe"]}
    assert sizes["levi-fine-tuned"] == whole + sizes["levi"]
    assert sizes["levi-lora"] - sizes["levi"] == sizes["lora"] - sizes["linear-probe"] < whole / 2
    assert sizes["output-ensemble"] == sizes["linear-probe"] + sizes["task-model"]


def test_every_method_has_a_title_and_a_source() -> None:
    assert set(METHOD_TITLES) == set(METHODS)
    assert all(method.source for method in METHODS.values())


def test_aliases_and_unknown_names() -> None:
    assert canonical("levi-no-view") == "taps-only"
    assert find_method("levi-no-view") is METHODS["taps-only"]
    with pytest.raises(DataError, match=r"expected one of levi, .*levi-lora, got 'magic'"):
        find_method("magic")


class TestHead2Toe:
    def test_relevance_finds_the_features_that_tell(self) -> None:
        g = torch.Generator().manual_seed(0)
        features = torch.randn(200, 30, generator=g)
        labels = (features[:, 3] - features[:, 17] > 0).long()
        config = LeviConfig(num_labels=2, problem_type="single_label_classification")
        assert set(relevance(features, labels, config).topk(2).indices.tolist()) == {3, 17}

    def test_selection_is_kept_with_the_model(self, backbone: torch.nn.Module, tmp_path: Path) -> None:
        result, _ = run("head2toe", "classes", backbone, epochs=1)
        selected = result.model.ensemble.selected
        assert selected is not None and selected.tolist() == sorted(set(selected.tolist()))
        assert selected.tolist() != list(range(len(selected)))
        result.model.save_pretrained(tmp_path)
        again: LeviModel = LeviModel.from_pretrained(tmp_path)
        assert torch.equal(again.ensemble.selected, selected)

    def test_needs_precomputed_taps(self, backbone: torch.nn.Module) -> None:
        splits = Splits(dataset("classes", 0), dataset("classes", 1))
        config = LeviConfig(task_model=TEXT, **KINDS["classes"])
        with pytest.raises(DataError, match="leave out --no-precompute"):
            run_method("head2toe", config, splits, TrainingOptions(epochs=1), backbone=backbone, bank=None)


class TestStartingFromAProbe:
    def test_lp_ft_starts_at_the_probe(self, backbone: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        from levi_fast.training import runs

        started: list[dict[str, torch.Tensor]] = []
        original = runs.fit

        def watched(model: LeviModel, *arguments: Any, **keywords: Any) -> Any:
            started.append({name: value.detach().clone() for name, value in model.ensemble.state_dict().items()})
            result = original(model, *arguments, **keywords)
            started.append({name: value.detach().clone() for name, value in model.ensemble.state_dict().items()})
            return result

        monkeypatch.setattr(runs, "fit", watched)
        run("lp-ft", "classes", backbone, epochs=2)
        _, after_probe, before_tuning, after_tuning = started
        assert all(torch.equal(after_probe[name], before_tuning[name]) for name in after_probe)
        assert any(not torch.equal(before_tuning[name], after_tuning[name]) for name in after_tuning)

    def test_wise_ft_lies_between_probe_and_fine_tuned(self, backbone: torch.nn.Module) -> None:
        tuned, _ = run("lp-ft", "classes", backbone, epochs=3)
        mixed, _ = run("wise-ft", "classes", backbone, epochs=3)
        alpha = mixed.choices["alpha"]
        assert alpha in ALPHAS
        name = "encoder.layer.0.attention.self.query.weight"
        start, end = backbone.state_dict()[name], tuned.model.state_dict()[f"backbone.{name}"]
        torch.testing.assert_close(mixed.model.state_dict()[f"backbone.{name}"], torch.lerp(start, end, alpha))


class TestOutputEnsemble:
    def test_is_the_mean_of_two_models_that_learn_apart(self) -> None:
        torch.manual_seed(0)
        head = OutputEnsemble([4], 3, 2, hidden_width=5)
        taps, view = torch.randn(1, 6, 4), torch.randn(6, 3)
        output = head(taps, view, zeroed_view=True)
        torch.testing.assert_close(output.logits, output.layer_logits.mean(0))
        torch.testing.assert_close(output.logits_without_view, head.probe(taps).logits)
        output.layer_logits[0].sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in head.task_head.parameters())
        assert head.probe.tap_weight.grad is not None and head.probe.tap_weight.grad.any()


def test_concatenated_head_reads_taps_of_unequal_width() -> None:
    head = ConcatenatedHead([4, 6], 3, selected=2, hidden_width=None)
    head.selected = torch.tensor([1, 7])
    taps = [torch.randn(5, 4), torch.randn(5, 6)]
    expected = head.features(taps)[:, [1, 7]] @ head.head.tap_weight + head.head.bias[0]
    torch.testing.assert_close(head(taps).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "stacked"}, "head: expected one of"),
        ({"selected_features": 3}, "selected_features: only with"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeviConfig(**fields)


def test_heads_refuse_what_they_cannot_read(backbone: torch.nn.Module) -> None:
    from levi_fast.modeling import get_levi_model

    with pytest.raises(ValueError, match="reads the taps alone"):
        get_levi_model(backbone, LeviConfig(head="concatenated", task_model=TEXT))
    with pytest.raises(ValueError, match="needs a task model"):
        get_levi_model(backbone, LeviConfig(head="output-ensemble"))
    with pytest.raises(ValueError, match="leaves it none"):
        get_levi_model(None, LeviConfig(head="output-ensemble", taps="none", task_model=TEXT))
    with pytest.raises(ValueError, match="selected_features: expected 1 to 48"):
        get_levi_model(backbone, LeviConfig(head="concatenated", selected_features=49))
    config = LeviConfig(task_model=TEXT)
    assert method_config("mlp-probe", config).task_model is None and config.task_model == TEXT
