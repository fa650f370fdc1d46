"""LeviModel: what it trains, what it saves, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from levi_fast import BackboneMismatchError, DataError, LeviConfig, LeviModel, get_levi_model
from levi_fast.reference import OBJECTIVES

TEXT_SPEC = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6}


def build(backbone, seed=0, **config) -> LeviModel:
    torch.manual_seed(seed)
    return get_levi_model(backbone, LeviConfig(**{"hidden_width": 8, "task_model": TEXT_SPEC, **config}))


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "vit", "gpt2", "llama", "swin"])
def test_only_the_small_parts_learn(build_backbone, inputs_for, name):
    backbone = build_backbone(name)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    image = "pixel_values" in inputs_for(name)
    model = build(backbone, task_model={"type": "image", "view_width": 6} if image else TEXT_SPEC)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([0, 1, 1])
    losses = []
    for _ in range(40):
        model.train()
        loss = model(**inputs_for(name), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(t, before[n]) for n, t in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert not backbone.training and model.ensemble.training and model.task_model.training


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_problem_types_follow_transformers(build_backbone, inputs_for, objective):
    cases = [
        (1, torch.tensor([0.5, 2.0, -1.0]), "regression"),
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (3, torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1]]), "multi_label_classification"),
    ]
    for num_labels, labels, problem_type in cases:
        model = build(build_backbone("bert"), num_labels=num_labels, objective=objective).eval()
        output = model(**inputs_for("bert"), labels=labels)
        assert model.config.problem_type == problem_type
        assert output.logits.shape == (3, num_labels) and output.layer_logits.shape == (3, 3, num_labels)
        output.loss.backward()


def test_regression_learns_in_standard_units_and_answers_in_the_labels(build_backbone, inputs_for):
    labels = torch.tensor([1000.0, 3000.0, 5000.0])
    model = build(build_backbone("bert"), num_labels=1, target_mean=3000.0, target_std=2000.0).eval()
    output = model(**inputs_for("bert"), labels=labels)
    assert (output.logits - 3000).abs().max() < 4000
    by_hand = ((output.layer_logits[..., 0] - labels) / 2000).square().mean()
    torch.testing.assert_close(output.loss, by_hand)


def test_precomputed_taps_give_the_same_numbers_without_running_the_backbone(build_backbone, inputs_for):
    for name, task in (("bert", TEXT_SPEC), ("swin", {"type": "image", "view_width": 6})):
        model, inputs = build(build_backbone(name), task_model=task).eval(), inputs_for(name)
        expected = model(**inputs).logits
        taps = model.extract_taps(**inputs)
        assert taps.shape == (3, sum(model.config.tap_widths))
        model.backbone.forward = None  # any use would fail
        assert torch.equal(model(**inputs, taps=taps).logits, expected)
    with pytest.raises(ValueError, match=r"taps: expected \[B, 80\]"):
        model(**inputs_for("swin"), taps=torch.zeros(3, 63))


def test_blend_is_applied_in_eval_mode_only(build_backbone, inputs_for):
    model, inputs = build(build_backbone("bert")).eval(), inputs_for("bert")
    plain = model(**inputs)
    torch.testing.assert_close(plain.logits, plain.logits_with_view)
    model.config.blend = 0.25
    blended = model(**inputs)
    torch.testing.assert_close(blended.logits, 0.75 * plain.logits_with_view + 0.25 * plain.logits_without_view)
    torch.testing.assert_close(blended.layer_logits.mean(0), blended.logits)
    assert model.train()(**inputs).logits_without_view is None


def test_the_view_has_a_loss_and_a_weight_of_its_own(build_backbone, inputs_for):
    inputs, labels = inputs_for("bert"), torch.tensor([0, 1, 0])
    model = build(build_backbone("bert"), view_dropout=0.0, view_loss=0.0).train()
    model.task_model.eval()  # drops no tokens
    plain = model(**inputs, labels=labels).loss
    view = model.task_model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).detach()
    alone = model.ensemble.without_taps(view)
    model.config.view_loss = 2.0
    with_own = model(**inputs, labels=labels)
    assert with_own.logits_without_taps is None  # an output of eval mode
    torch.testing.assert_close(with_own.loss, plain + 2.0 * model.loss(alone, labels), rtol=1e-4, atol=1e-5)
    output = model.eval()(**inputs)
    torch.testing.assert_close(output.logits, output.logits_with_view)
    torch.testing.assert_close(output.logits_without_taps, model.ensemble.without_taps(view).logits)
    model.config.blend, model.config.view_blend = 0.5, 0.25
    expected = 0.375 * (output.logits_with_view + output.logits_without_view) + 0.25 * output.logits_without_taps
    blended = model(**inputs)
    torch.testing.assert_close(blended.logits, expected)
    torch.testing.assert_close(blended.layer_logits.mean(0), blended.logits)


def test_a_config_from_before_the_view_had_a_weight_predicts_the_same_bits(build_backbone, inputs_for, tmp_path):
    model = build(build_backbone("bert"), view_loss=0.0, blend=0.5).eval()
    expected = model(**inputs_for("bert")).logits
    model.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({name: value for name, value in document.items() if name not in ("view_loss", "view_blend")})
    )
    loaded = LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"))
    assert loaded.config.view_blend == 0.0
    assert torch.equal(loaded(**inputs_for("bert")).logits, expected)


def test_a_model_without_view_and_one_without_backbone(build_backbone, inputs_for):
    taps_only = build(build_backbone("bert"), task_model=None).eval()
    assert taps_only.task_model is None and taps_only(**inputs_for("bert")).logits_without_view is None
    alone = build(None, taps="none").eval()
    output = alone(**inputs_for("bert"), labels=torch.tensor([0, 1, 0]))
    assert alone.backbone is None and output.layer_logits.shape == (1, 3, 2)
    assert alone.train()(**inputs_for("bert")).logits.isfinite().all()
    with pytest.raises(ValueError, match="'none' leaves the task model alone, and there is none"):
        build(None, taps="none", task_model=None)
    with pytest.raises(ValueError, match="backbone: expected a model or a name"):
        build(None)


def test_saved_folder_holds_the_trained_part_alone_and_predicts_bit_for_bit(build_backbone, inputs_for, tmp_path):
    build_backbone("bert").save_pretrained(tmp_path / "backbone")
    names = {0: "bad", 1: "good"}
    model = build(str(tmp_path / "backbone"), id2label=names, label2id={v: k for k, v in names.items()}, blend=0.25)
    model.save_pretrained(tmp_path / "models" / "one")
    assert sorted(p.name for p in (tmp_path / "models" / "one").iterdir()) == ["config.json", "model.safetensors"]
    saved = load_file(tmp_path / "models" / "one" / "model.safetensors")
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(saved) == trained and not any(n.startswith("backbone") for n in saved)
    text = (tmp_path / "models" / "one" / "config.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["backbone"] == "../../backbone"
    expected = model.eval()(**inputs_for("bert")).logits
    torch.save({k: v for k, v in inputs_for("bert").items()}, tmp_path / "inputs.pt")
    (tmp_path / "models").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "models")
    script = (
        "import sys, torch; from levi_fast import LeviModel; "
        "m = LeviModel.from_pretrained(sys.argv[1]); x = torch.load(sys.argv[2], weights_only=True); "
        "print(m.config.id2label[1], m(**x).logits.detach().numpy().tobytes().hex())"
    )
    arguments = [str(tmp_path / "models" / "one"), str(tmp_path / "inputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    label, digits = done.stdout.split()
    assert label == "good" and digits == expected.detach().numpy().tobytes().hex()


def test_loading_onto_another_backbone_names_both_fingerprints(build_backbone, tmp_path):
    model = build(build_backbone("bert"))
    model.save_pretrained(tmp_path)
    other = build_backbone("bert")
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight[0, 0] += 1
    theirs = build(other).config.backbone_fingerprint
    with pytest.raises(BackboneMismatchError) as caught:
        LeviModel.from_pretrained(tmp_path, backbone=other)
    assert model.config.backbone_fingerprint in str(caught.value) and theirs in str(caught.value)
    LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"))
    with pytest.raises(DataError, match="given as an object; pass backbone="):
        LeviModel.from_pretrained(tmp_path)


def test_loading_without_the_backbone_runs_on_taps(build_backbone, inputs_for, tmp_path):
    model, inputs = build(build_backbone("bert")).eval(), inputs_for("bert")
    model.save_pretrained(tmp_path)
    loaded = LeviModel.from_pretrained(tmp_path, load_backbone_weights=False)
    assert loaded.backbone is None
    taps = model.extract_taps(**inputs)
    assert torch.equal(loaded(**inputs, taps=taps).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="loaded without its backbone"):
        loaded(**inputs)


def test_users_own_task_model_round_trips(build_backbone, inputs_for, own_task_model, tmp_path):
    torch.manual_seed(0)
    model = get_levi_model(build_backbone("bert"), LeviConfig(hidden_width=8), task_model=own_task_model()).eval()
    assert model.config.view_width == 6 and model.config.task_model == {"type": "custom"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="user's own module; pass task_model="):
        LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"))
    loaded = LeviModel.from_pretrained(tmp_path, backbone=build_backbone("bert"), task_model=own_task_model())
    assert torch.equal(loaded(**inputs_for("bert")).logits, model(**inputs_for("bert")).logits)
    nameless = nn.Identity()
    with pytest.raises(ValueError, match="Identity has no view_width"):
        get_levi_model(build_backbone("bert"), LeviConfig(), task_model=nameless)


def test_state_dict_round_trips_strictly_without_the_backbone(build_backbone):
    model, other = build(build_backbone("bert")), build(build_backbone("bert"), seed=1)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    state = model.state_dict()
    assert torch.equal(other.ensemble.tap_weight, model.ensemble.tap_weight)
    del state["ensemble.bias"]
    with pytest.raises(RuntimeError, match=r"ensemble\.bias"):
        other.load_state_dict(state)
    wrapper = nn.ModuleDict({"inner": model})
    assert not any("backbone" in n for n in wrapper.state_dict())
    wrapper.load_state_dict(wrapper.state_dict())


def test_an_interrupted_save_leaves_the_old_one(build_backbone, tmp_path, monkeypatch):
    model = build(build_backbone("bert"))
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with torch.no_grad():
        model.ensemble.bias += 1
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_inputs_and_labels_that_nothing_takes_are_named(build_backbone, inputs_for):
    model, inputs = build(build_backbone("bert")), inputs_for("bert")
    with pytest.raises(ValueError, match=r"neither the backbone nor the task model takes \['numeric'\]"):
        model(**inputs, numeric=torch.zeros(3, 2))
    for labels, message in [
        (torch.zeros(3), "labels: expected .3, 2. for multi_label"),
        (torch.zeros(3, 2).long(), "labels: expected .3. int64 classes"),
        (torch.zeros(2).long(), "labels: expected .3. int64 classes"),
    ]:
        model.config.problem_type = None
        with pytest.raises(ValueError, match=message):
            model(**inputs, labels=labels)


def test_a_folder_that_is_no_model_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"expected config\.json in"):
        LeviModel.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"unexpected arguments \['quantize'\]"):
        LeviModel.from_pretrained(tmp_path, quantize=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "pooling: expected one of mean, cls, last, token, got 'max'"),
        ({"objective": "sum"}, "objective: expected one of per_layer, ensemble, both"),
        ({"view_dropout": 1.2}, r"view_dropout: expected a number in \[0, 1\]"),
        ({"blend": -0.1}, "blend"),
        ({"view_blend": 1.5}, r"view_blend: expected a number in \[0, 1\]"),
        ({"view_blend": 0.5, "head": "output-ensemble"}, "view_blend: only with head='layerwise'"),
        ({"view_loss": -1.0}, "view_loss: expected a number of at least 0"),
        ({"standalone_view": True, "view_loss": 0.5}, "view_loss: trains the ensemble to answer from the view"),
        ({"standalone_view": True, "head": "output-ensemble"}, "standalone_view: only with head='layerwise'"),
        ({"view_loss": float("nan")}, "view_loss: expected a number of at least 0"),
        ({"mix": "learned"}, "no gradient from objective='per_layer'"),
        ({"hidden_width": 0}, "hidden_width"),
        ({"target_std": 0.0}, "target_std"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"dropout": 0.1, "hidden_width": None}, "dropout"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LeviConfig(**options)


def test_trainable_parameters_are_counted(build_backbone, capsys):
    model = build(build_backbone("bert"))
    trained, total = model.num_parameters_by_part()
    assert trained == sum(t.numel() for t in model.state_dict().values())
    assert total == trained + sum(p.numel() for p in build_backbone("bert").parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(
        f"trainable params: {trained:,} || all params: {total:,} || trainable%: "
    )
