"""Backbones in bfloat16 and int8: how far their taps are from float32's, and that a saved model finds them again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from levi_fast import BackboneMismatchError, DataError, LeviConfig, LeviModel, TapExtractor, get_levi_model
from levi_fast import load_backbone as load
from levi_fast.backbones import fingerprint
from levi_fast.quantization import backbone_dtype, quantize_int8


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


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="backbone_dtype: expected one of float32, bfloat16, int8, got 'int4'"):
        LeviConfig(backbone_dtype="int4")
    with pytest.raises(DataError, match="this backbone has none"):
        quantize_int8(nn.Sequential(nn.Conv1d(2, 2, 1)))
    assert backbone_dtype(nn.Linear(2, 2).double()) is None
