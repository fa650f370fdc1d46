"""Backbones that are not frozen: LoRA adapters, everything, and what was fine-tuned before and then frozen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from levi_fast import BackboneMismatchError, LeviConfig, LeviModel, get_levi_model, load_backbone
from levi_fast.errors import DataError
from levi_fast.kernels import use_backend

Build = Callable[..., nn.Module]
SPEC = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6, "dropout": 0.0, "token_dropout": 0.0}

pytest.importorskip("peft")


def batch(rows: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    mask = torch.ones(rows, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    ids = torch.randint(1, 50, (rows, 7), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}


def model_of(backbone: nn.Module, training: str, **fields: Any) -> LeviModel:
    torch.manual_seed(0)
    chosen = {"hidden_width": 8, "num_labels": 3, "view_dropout": 0.0, "task_model": SPEC, **fields}
    model = get_levi_model(backbone, LeviConfig(backbone_training=training, **chosen))
    with torch.no_grad():  # a fresh adapter's second factor is zero, and so the first one's gradient
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return model


def gradients(model: LeviModel, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch(), **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5_encoder", "distilbert"])
def test_adapters_are_trained_and_nothing_else_of_the_backbone(build_backbone: Build, kind: str) -> None:
    model = model_of(build_backbone(kind), "lora").train()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name in found if name.startswith("backbone.")}
    assert inside and all(".lora_" in name for name in inside)
    assert all(found[name].abs().max() > 0 for name in inside)


@pytest.mark.parametrize("taps", ["all", [0, 1]])
def test_a_whole_backbone_is_trained_as_far_as_the_last_tap(build_backbone: Build, taps: Any) -> None:
    model = model_of(build_backbone("bert"), "full", taps=taps).train()
    inside = {name for name in gradients(model) if name.startswith("backbone.")}
    assert any("embeddings" in name for name in inside) and any("layer.1." in name for name in inside)
    assert any("layer.2." in name for name in inside) == (taps == "all")
    above = [p for name, p in model.named_parameters() if "layer.2." in name]
    assert all(p.requires_grad == (taps == "all") for p in above)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_gradients_are_the_references(build_backbone: Build, training: str, pooling: str) -> None:
    model = model_of(build_backbone("bert"), training, pooling=pooling).eval()
    fast = gradients(model)
    with use_backend("eager"):
        eager = gradients(model)
    assert fast.keys() == eager.keys()
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_gradients_are_finite_differences(build_backbone: Build, training: str) -> None:
    model = model_of(build_backbone("bert"), training).double().eval()
    found = gradients(model)
    generator = torch.Generator().manual_seed(1)
    names = [name for name in found if name.startswith("backbone.") and found[name].abs().max() > 1e-6]
    for name in (names[0], names[len(names) // 2], names[-1]):
        parameter = dict(model.named_parameters())[name]
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                parameter += step * direction
                losses.append(model(**batch()).loss.double())
        with torch.no_grad():
            parameter += 1e-5 * direction
        # the loss is a float32 scalar, so a difference of it has few digits
        torch.testing.assert_close(
            (losses[0] - losses[1]) / 2e-5, (found[name] * direction).sum(), rtol=0.1, atol=0.02
        )


def test_dropout_in_a_trained_backbone_follows_the_mode(build_backbone: Build) -> None:
    for training in ("lora", "full"):
        model = model_of(build_backbone("bert", hidden_dropout_prob=0.5), training).train()
        assert not torch.equal(model(**batch()).logits, model(**batch()).logits)
        model.eval()
        assert torch.equal(model(**batch()).logits, model(**batch()).logits)
    frozen = model_of(build_backbone("bert", hidden_dropout_prob=0.5), "frozen").train()
    assert torch.equal(frozen(**batch()).logits, frozen(**batch()).logits)


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_what_is_trained_is_saved_and_loads(build_backbone: Build, tmp_path: Path, training: str, kind: str) -> None:
    torch.manual_seed(3)
    build_backbone(kind).save_pretrained(tmp_path / "base")
    model = model_of(load_backbone(str(tmp_path / "base")), training).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        inside = [name for name in file.keys() if name.startswith("backbone.")]  # noqa: SIM118
    assert inside and (training == "full" or all(".lora_" in name for name in inside))
    loaded = LeviModel.from_pretrained(tmp_path / "model")
    assert loaded.num_parameters_by_part() == model.num_parameters_by_part()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    other = build_backbone(kind)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(BackboneMismatchError):
        LeviModel.from_pretrained(tmp_path / "model", backbone=other)
    with pytest.raises(ValueError, match="load_backbone_weights: expected True"):
        LeviModel.from_pretrained(tmp_path / "model", load_backbone_weights=False)
    with pytest.raises(ValueError, match="include_backbone: expected a frozen backbone"):
        model.save_pretrained(tmp_path / "whole", include_backbone=True)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_gradient_checkpointing_changes_nothing(build_backbone: Build, training: str) -> None:
    for taps in ("all", [0, 1]):
        model = model_of(build_backbone("bert"), training, taps=taps).train()
        model.backbone.config.hidden_dropout_prob = 0.0
        for module in model.backbone.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        plain = gradients(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = gradients(model)
        model.gradient_checkpointing_disable()
        assert plain.keys() == checkpointed.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(gradient, checkpointed[name], msg=name)
    with pytest.raises(ValueError, match="gradient checkpointing: the backbone is frozen"):
        model_of(build_backbone("bert"), "frozen").gradient_checkpointing_enable()


def test_precomputed_taps_are_refused_while_a_backbone_is_trained(build_backbone: Build) -> None:
    model = model_of(build_backbone("bert"), "lora").eval()
    taps = model.extract_taps(**{k: v for k, v in batch().items() if k != "labels"}).detach()
    with pytest.raises(ValueError, match="taps: precomputed ones would leave the backbone as it is"):
        model.train()(**batch(), taps=taps)
    model.eval()
    torch.testing.assert_close(model(**batch(), taps=taps).logits, model(**batch()).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_training": "half"}, "backbone_training: expected one of frozen, lora, full, got 'half'"),
        ({"lora": {"r": 4}}, "lora: only with backbone_training='lora'"),
        ({"backbone_training": "lora", "lora": {"rank": 4}}, "lora: expected some of r, .*got 'rank'"),
        ({"backbone_training": "lora", "lora": {"r": 0}}, "lora: expected r >= 1"),
        ({"backbone_training": "lora", "lora": {"r": True}}, "lora: r: expected a number, got True"),
        ({"backbone_training": "lora", "lora": {"target_modules": "query"}}, "target_modules: expected a list"),
        ({"backbone_training": "full", "backbone_dtype": "int8"}, "an int8 backbone can only be 'frozen'"),
        ({"backbone_training": "full", "taps": "none"}, "taps='none' leaves no backbone to train"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeviConfig(**fields)


def test_a_backbone_that_cannot_take_adapters_is_refused(build_backbone: Build) -> None:
    with pytest.raises(ValueError, match=r"lora: .*name the backbone's linear layers in lora"):
        model_of(build_backbone("bert"), "lora", lora={"target_modules": ["nothing_of_this_name"]})
    backbone = build_backbone("bert")
    model_of(backbone, "lora")
    with pytest.raises(ValueError, match="it has LoRA adapters already"):
        model_of(backbone, "lora")


# --- fine-tuned first, then frozen ---------------------------------------------------------------------------------


def test_a_checkpoint_with_a_task_head_gives_its_base(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=32, num_hidden_layers=2
    )
    tuned = BertForSequenceClassification(config).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    model = model_of(load_backbone(str(tmp_path / "tuned")), "frozen").eval()
    twin = model_of(tuned.bert, "frozen").eval()
    assert torch.equal(model(**batch()).logits, twin(**batch()).logits)


def test_a_folder_of_peft_gives_its_base_with_the_adapters_merged(build_backbone: Build, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = build_backbone("bert")
    base.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(load_backbone(str(tmp_path / "base")), LoraConfig(r=4, target_modules=["query"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuned.save_pretrained(tmp_path / "tuned")
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    merged = load_backbone(str(tmp_path / "tuned"))
    assert not any("lora" in name for name, _ in merged.named_parameters())
    expected = tuned.eval()(**inputs).last_hidden_state
    torch.testing.assert_close(merged(**inputs).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base.eval()(**inputs).last_hidden_state, expected, atol=1e-3)
    model = model_of(merged, "frozen").eval()
    model.save_pretrained(tmp_path / "model")
    loaded = LeviModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    (tmp_path / "tuned" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(DataError, match="names no base_model_name_or_path"):
        load_backbone(str(tmp_path / "tuned"))
