"""A saved LEVI folder as a citizen of transformers: Auto classes, pipelines, a folder that carries its backbone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, ViTImageProcessor, pipeline

from levi_fast import DataError, LeviConfig, LeviModel, get_levi_model, load_backbone

NAMES = {0: "bad", 1: "good"}


def config(**options) -> LeviConfig:
    names = {"id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}}
    return LeviConfig(**{"hidden_width": 8, "problem_type": "single_label_classification", **names, **options})


@pytest.fixture
def text_folder(tiny_bert_dir, tmp_path):
    """A LEVI folder with tokenizer, beside its backbone."""
    shutil.copytree(tiny_bert_dir, tmp_path / "backbone")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_dir)
    spec = {"type": "text", "vocab_size": len(tokenizer), "embedding_dim": 8, "view_width": 6}
    torch.manual_seed(0)
    model = get_levi_model(str(tmp_path / "backbone"), config(task_model=spec, blend=0.25))
    model.save_pretrained(tmp_path / "levi")
    tokenizer.save_pretrained(tmp_path / "levi")
    return tmp_path / "levi"


ORDERS = {
    "levi_fast first": "import levi_fast; from transformers import {names}",
    "transformers first": "from transformers import {names}; import levi_fast",
    "LeviModel before the Auto classes": "from levi_fast import LeviModel; from transformers import {names}",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_find_a_folder_whichever_package_comes_first(text_folder, order):
    names = "AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForImageClassification"
    script = f"""
{ORDERS[order].format(names=names)}
folder = {str(text_folder)!r}
assert AutoConfig.from_pretrained(folder).model_type == "levi"
for auto in ({names.removeprefix("AutoConfig, ")}):
    model = auto.from_pretrained(folder)
    assert type(model).__name__ == "LeviModel" and model.config.id2label == {{0: "bad", 1: "good"}}, auto
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_levi_fast_loads_neither_torch_nor_transformers():
    script = "import levi_fast, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_text_classification_pipeline_answers_with_label_names(text_folder):
    classify = pipeline("text-classification", model=str(text_folder))
    texts = ["a good film", "a very dull story"]
    answers = classify(texts, truncation=True)
    model = LeviModel.from_pretrained(text_folder)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert answer["label"] == NAMES[int(expected.argmax())]
        assert answer["score"] == pytest.approx(float(expected.max()), rel=1e-5)
    everything = classify("a good film", top_k=None)
    assert {row["label"] for row in everything} == set(NAMES.values())


def test_image_classification_pipeline_answers_with_label_names(build_backbone, tmp_path):
    from PIL import Image

    build_backbone("vit").save_pretrained(tmp_path / "vit")
    torch.manual_seed(0)
    model = get_levi_model(str(tmp_path / "vit"), config(task_model={"type": "image", "view_width": 6}))
    model.save_pretrained(tmp_path / "levi")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "levi")
    answers = pipeline("image-classification", model=str(tmp_path / "levi"))(Image.new("RGB", (40, 30), "red"))
    assert {row["label"] for row in answers} == set(NAMES.values())
    assert sum(row["score"] for row in answers) == pytest.approx(1, abs=1e-5)


def test_a_folder_with_its_backbone_inside_needs_nothing_else(text_folder, tmp_path):
    model = LeviModel.from_pretrained(text_folder)
    batch = AutoTokenizer.from_pretrained(text_folder)(["a good film"], return_tensors="pt")
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["backbone"] == "./backbone"
    shutil.rmtree(tmp_path / "backbone")
    (tmp_path / "whole").rename(tmp_path / "elsewhere")
    again = LeviModel.from_pretrained(tmp_path / "elsewhere")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    again.save_pretrained(tmp_path / "elsewhere", include_backbone=True)  # over itself, file by file
    LeviModel.from_pretrained(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="backbone"):
        LeviModel.from_pretrained(text_folder)


def test_without_a_transformers_backbone_there_is_nothing_to_include(tiny_bert_dir, tmp_path):
    model = get_levi_model(None, config(taps="none", task_model={"type": "text", "vocab_size": 9, "view_width": 4}))
    with pytest.raises(ValueError, match="include_backbone: expected a transformers backbone, got NoneType"):
        model.save_pretrained(tmp_path, include_backbone=True)


def test_arguments_that_transformers_users_give(text_folder, tiny_bert_dir):
    model = LeviModel.from_pretrained(text_folder, dtype=torch.bfloat16, device_map="cpu", local_files_only=True)
    assert model.ensemble.bias.dtype == torch.bfloat16
    assert next(model.backbone.parameters()).dtype == torch.float32  # its fingerprint says so
    assert LeviModel.from_pretrained(text_folder, dtype="auto").ensemble.bias.dtype == torch.float32
    with pytest.raises(ValueError, match="dtype: expected a torch dtype, its name, or 'auto', got 'float33'"):
        LeviModel.from_pretrained(text_folder, dtype="float33")
    with pytest.raises(ValueError, match="device_map: expected one device, got 'auto'"):
        LeviModel.from_pretrained(text_folder, device_map="auto")
    with pytest.raises(TypeError, match=r"unexpected arguments \['colour'\]"):
        LeviModel.from_pretrained(text_folder, colour="red")
    given = LeviModel.from_pretrained(text_folder, backbone=load_backbone(tiny_bert_dir))  # the same weights
    assert given.config.backbone_fingerprint == model.config.backbone_fingerprint


def test_an_int8_backbone_is_named_not_included(tiny_bert_dir, tmp_path):
    spec = {"type": "text", "vocab_size": 9, "view_width": 4}
    model = get_levi_model(tiny_bert_dir, config(task_model=spec, backbone_dtype="int8"))
    with pytest.raises(ValueError, match="include_backbone: an int8 backbone is made anew on each load"):
        model.save_pretrained(tmp_path, include_backbone=True)
