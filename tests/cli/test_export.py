"""levi-fast export: what is beside the file, refusals, and that the file serves raw rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from levi_fast import LeviConfig, get_levi_model, load_backbone

Run = Callable[..., tuple[int, str, str]]


def test_export_of_a_trained_folder(levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    status, _, err = levi_fast(*train_arguments, "--max-length", "12")
    assert status == 0, err
    (tmp_path / "served").mkdir()
    model, file = str(tmp_path / "model"), tmp_path / "served" / "reviews.onnx"
    status, out, err = levi_fast("export", "--model", model, "--format", "onnx", "--output", str(file))
    assert status == 0, err
    assert "of the model's" in out + err
    manifest = json.loads((tmp_path / "served" / "reviews.json").read_text())
    assert manifest["labels"] == ["neg", "pos"] and manifest["most_tokens"] == 12

    # from a user's words to the label, as `evaluate` has it, with what is in the folder alone
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "served" / manifest["preprocessing"])
    rows = (tmp_path / "test.csv").read_text().splitlines()[1:]
    texts = [row.split(",")[0] for row in rows]
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="np")
    session = onnxruntime.InferenceSession(str(file))
    names = [one.name for one in session.get_inputs()]
    assert [one.shape for one in session.get_inputs()] == [["batch", "sequence"]] * 2
    logits = session.run(["logits"], {name: encoded[name].astype(np.int64) for name in names})[0]
    predictions = str(tmp_path / "predictions.csv")
    data = str(tmp_path / "test.csv")
    assert levi_fast("evaluate", "--model", model, "--data", data, "--predictions", predictions)[0] == 0
    wanted = [line.split(",")[1] for line in Path(predictions).read_text().splitlines()[1:]]
    assert [manifest["labels"][place] for place in logits.argmax(1)] == wanted

    status, _, err = levi_fast("export", "--model", model, "--format", "onnx", "--output", str(file))
    assert status == 2 and "exists" in err


def test_head_is_exported_without_the_backbone(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert levi_fast(*train_arguments)[0] == 0
    monkeypatch.setattr("levi_fast.saving.load_backbone", lambda *_, **__: pytest.fail("the backbone was loaded"))
    file = tmp_path / "head.pt2"
    status, _, err = levi_fast("export", "--model", str(tmp_path / "model"), "--head-only", "--output", str(file))
    assert status == 0, err
    logits = torch.export.load(str(file)).module()(
        torch.randn(3, 1, 16), torch.ones(1, 5, dtype=torch.int64), torch.ones(1, 5, dtype=torch.int64)
    )
    assert logits.shape == (1, 2)


def test_a_model_of_tokens_from_its_folder(levi_fast: Run, tiny_bert_dir: str, tmp_path: Path) -> None:
    spec = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6}
    names = {0: "OTHER", 1: "GOOD", 2: "BAD"}
    config = LeviConfig(pooling="token", hidden_width=8, task_model=spec, blend=0.25, id2label=names)
    torch.manual_seed(0)
    model = get_levi_model(load_backbone(tiny_bert_dir), config).eval()
    model.save_pretrained(tmp_path / "model", include_backbone=True)
    file = tmp_path / "tags.pt2"
    status, out, err = levi_fast("export", "--model", str(tmp_path / "model"), "--output", str(file))
    assert status == 0 and "of the model's" in out + err, err
    manifest = json.loads((tmp_path / "tags.json").read_text())
    assert manifest["labels"] == list(names.values()) and manifest["outputs"][0]["shape"] == ["batch", "sequence", 3]
    ids, mask = torch.randint(4, 40, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(torch.export.load(str(file)).module()(ids, mask), wanted, rtol=1e-5, atol=1e-6)


def test_refusals(levi_fast: Run, tmp_path: Path) -> None:
    status, _, err = levi_fast("export", "--model", str(tmp_path), "--output", str(tmp_path / "m.pt2"))
    assert status == 2 and "config.json" in err
