"""Backbones in bfloat16, int8 and int4: how far their taps are from float32's; a saved model finds them again."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from levi_fast import BackboneMismatchError, DataError, LeviConfig, LeviModel, TapExtractor, get_levi_model
from levi_fast import load_backbone as load
from levi_fast.fingerprints import fingerprint
from levi_fast.quantization import backbone_dtype, quantize_int4, quantize_int8


def digest(backbone: nn.Module) -> str:
    extractor = TapExtractor(backbone, "all")
    return fingerprint(extractor.runner, extractor.blocks, extractor.layers[-1])


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 0.0), ("bfloat16", 0.02), ("int8", 0.1)])
def test_taps_stay_close(tiny_bert_dir: str, dtype: str, bound: float) -> None:
    ids = torch.randint(4, 40, (8, 12), generator=torch.Generator().manual_seed(0))
    reference = TapExtractor(load(tiny_bert_dir), "all")(input_ids=ids)
    backbone = load(tiny_bert_dir, dtype=dtype)
    assert backbone_dtype(backbone) == dtype and not backbone.training
    taps = TapExtractor(backbone, "all")(input_ids=ids)
    assert isinstance(taps, torch.Tensor) and isinstance(reference, torch.Tensor)
    error = (taps.float() - reference).norm() / reference.norm()
    assert error <= bound and (error > 0) == (dtype != "float32")


def test_fingerprints_tell_the_bits_apart(tiny_bert_dir: str) -> None:
    found = {dtype: digest(load(tiny_bert_dir, dtype=dtype)) for dtype in ("float32", "bfloat16", "int8")}
    assert len(set(found.values())) == 3
    assert found["bfloat16"].startswith("bert:bfloat16:") and found["int8"].startswith("bert:float32+int8:")
    assert digest(load(tiny_bert_dir, dtype="int8")) == found["int8"]
    original = load(tiny_bert_dir)
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.get_parameter("encoder.layer.1.output.dense.weight").mul_(1.01)  # the same integers at another scale
    assert digest(quantize_int8(other)) != found["int8"] == digest(quantize_int8(original))
    assert digest(original) == found["float32"]  # quantising left it alone


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_saved_model_loads_its_backbone_with_the_same_bits(tiny_bert_dir: str, tmp_path: Path, dtype: str) -> None:
    ids = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    for given in (tiny_bert_dir, load(tiny_bert_dir, dtype=dtype)):  # by name, or an object that knows its name
        config = LeviConfig(num_labels=2, hidden_width=4, backbone_dtype=dtype if given == tiny_bert_dir else None)
        model = get_levi_model(given, config).eval()
        assert model.config.backbone_dtype == dtype
        model.save_pretrained(tmp_path)
        loaded = LeviModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(BackboneMismatchError):
        LeviModel.from_pretrained(tmp_path, backbone=load(tiny_bert_dir))


@pytest.fixture(scope="session")
def bert_for_int4(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random-weight BERT of width 32; int4 shares a scale among 32 weights of a row."""
    pytest.importorskip("torchao.prototype.quantization.int4")
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert-for-int4")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    return str(folder)


def test_int4_is_bfloat16_with_four_bits_a_weight(bert_for_int4: str) -> None:
    plain, backbone = load(bert_for_int4, dtype="bfloat16"), load(bert_for_int4, dtype="int4")
    assert backbone_dtype(backbone) == "int4" and not backbone.training
    weight = plain.get_parameter("encoder.layer.0.intermediate.dense.weight").float()  # [64, 32]: a scale a row
    kept = backbone.get_submodule("encoder.layer.0.intermediate.dense").weight
    assert kept.qdata.nbytes == weight.numel() // 2
    steps = (weight.amax(1) - weight.amin(1)) / 15
    with torch.no_grad():
        found = nn.functional.linear(torch.eye(32).bfloat16(), kept).float().T
    # Half a step, and what bfloat16 adds to scale and offset.
    assert ((found - weight).abs() <= 0.5 * steps[:, None] + 0.02 * weight.abs().amax()).all()
    assert (found - weight).abs().max() > 0.25 * steps.min()
    ids = torch.randint(4, 40, (8, 12), generator=torch.Generator().manual_seed(0))
    reference = TapExtractor(load(bert_for_int4), "all")(input_ids=ids)
    taps = TapExtractor(backbone, "all")(input_ids=ids)
    assert isinstance(taps, torch.Tensor) and isinstance(reference, torch.Tensor) and taps.dtype == torch.bfloat16
    assert 0 < (taps.float() - reference).norm() / reference.norm() < 0.1


def test_int4_is_told_by_its_source_not_by_how_this_cpu_packs_it(bert_for_int4: str) -> None:
    found = digest(load(bert_for_int4, dtype="int4"))
    assert found.startswith("bert:bfloat16+int4:")
    assert digest(load(bert_for_int4, dtype="int4")) == found != digest(load(bert_for_int4, dtype="bfloat16"))
    backbone = load(bert_for_int4, dtype="int4")
    layer = backbone.get_submodule("encoder.layer.0.output.dense")
    layer.weight.qdata.copy_(layer.weight.qdata.flip(0))  # another CPU's order
    assert digest(backbone) == found
    other = load(bert_for_int4, dtype="bfloat16")
    with torch.no_grad():
        other.get_parameter("encoder.layer.0.output.dense.weight")[3, 5] += 0.001
    assert digest(quantize_int4(other)) != found


def test_a_model_on_int4_trains_and_loads_again(bert_for_int4: str, tmp_path: Path) -> None:
    ids = torch.randint(4, 40, (6, 9), generator=torch.Generator().manual_seed(0))
    model = get_levi_model(bert_for_int4, LeviConfig(num_labels=2, hidden_width=4, backbone_dtype="int4"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=torch.arange(6) % 2).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(ValueError, match="include_backbone: an int4 backbone is made anew"):
        model.save_pretrained(tmp_path, include_backbone=True)
    model.eval().save_pretrained(tmp_path)
    loaded = LeviModel.from_pretrained(tmp_path)
    assert backbone_dtype(loaded.backbone) == "int4"
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    with pytest.raises(BackboneMismatchError):
        LeviModel.from_pretrained(tmp_path, backbone=load(bert_for_int4, dtype="bfloat16"))


def test_int4_that_cannot_be_is_refused(bert_for_int4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="width is a multiple of 32, and this backbone has none"):
        quantize_int4(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).bfloat16())
    with pytest.raises(ValueError, match="an int4 backbone can only be 'frozen'"):
        LeviConfig(backbone_dtype="int4", backbone_training="lora")
    monkeypatch.setitem(sys.modules, "torchao.prototype.quantization.int4", None)
    with pytest.raises(DataError, match=r"int4 needs torchao 0\.18 .*pip install levi_fast\[int4\]"):
        load(bert_for_int4, dtype="int4")


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone_dtype: expected one of float32, bfloat16, int8, int4, got 'int2'"):
        LeviConfig(backbone_dtype="int2")
    with pytest.raises(DataError, match="this backbone has none"):
        quantize_int8(nn.Sequential(nn.Conv1d(2, 2, 1)))
    assert backbone_dtype(nn.Linear(2, 2).double()) is None
