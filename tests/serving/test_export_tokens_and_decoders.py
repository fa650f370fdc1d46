"""Whole exports of models that answer for every token, and of models that tap a decoder beside an encoder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from levi_fast import LeviConfig, LeviModel, get_levi_model
from levi_fast.export import export_model
from levi_fast.export.artefact import as_model_taps
from levi_fast.export.inputs import head_inputs, model_inputs
from levi_fast.export.modules import ServingModel
from levi_fast.export.tracing import trace
from levi_fast.kernels import native

Build = Callable[..., LeviModel]
Serve = Callable[..., Tensor]
TASK = {"type": "text", "vocab_size": 40, "embedding_dim": 8, "view_width": 6}
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="AOTInductor needs a C++ compiler"
)


def t5(whole: bool = False) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration, T5Model

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
    config = T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)
    return (T5ForConditionalGeneration if whole else T5Model)(config)


def bart() -> nn.Module:
    from transformers import BartConfig, BartModel

    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartModel(BartConfig(vocab_size=50, d_model=16, max_position_embeddings=64, **layers, **heads))


BACKBONES: dict[str, Callable[[], nn.Module]] = {"t5": t5, "t5 with a head": lambda: t5(True), "bart": bart}


@pytest.fixture
def decoder_model() -> Build:
    """``decoder_model(name, **config)``: LEVI on a small encoder-decoder with random weights, blended."""

    def build(name: str, **config: Any) -> LeviModel:
        torch.manual_seed(3)
        settings = {"num_labels": 3, "hidden_width": 8, "task_model": TASK, "blend": 0.25, **config}
        return get_levi_model(BACKBONES[name]().eval(), LeviConfig(**settings)).eval()

    return build


def padded(model: LeviModel, batch: int, length: int) -> dict[str, Tensor]:
    """Inputs of another shape than any that was traced or verified with, padded on the right, the left and not."""
    generator = torch.Generator().manual_seed(batch)
    given = {spec.name: spec.example({"batch": batch, "sequence": length}, seed=7) for spec in model_inputs(model)}
    place, kept = torch.arange(length), torch.randint(1, length, (batch, 1), generator=generator)
    mask = (place < kept).long()
    mask[1], mask[2] = (place >= length // 2).long(), 1
    return {**given, "attention_mask": mask}


def served_as_the_model_answers(
    model: LeviModel, serve: Serve, folder: Path, kind: str, *, head_only: bool = False, ops: str = "plain"
) -> dict[str, Any]:
    """Export, run the file where there is no levi_fast, compare; the manifest."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    file = folder / ("m.onnx" if kind == "onnx" else "m.pt2")
    written = export_model(model, file, format=kind, head_only=head_only, ops=ops)
    assert written.largest_difference is not None and written.largest_difference < 1e-5
    given = padded(model, 4, 13)
    if head_only:
        sizes = {"batch": 4, "sequence": 13}
        given = {spec.name: given.get(spec.name, spec.example(sizes)) for spec in head_inputs(model)}
    asked = {name: as_model_taps(model, value) if name == "taps" else value for name, value in given.items()}
    with torch.no_grad():
        wanted = model(**asked).logits
    library = folder / native.LIBRARY_NAME if ops == "fused" else None
    found = serve(kind, file, library, given)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    return json.loads(written.manifest.read_text())


@pytest.mark.parametrize("head_only", [False, True])
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_every_token_is_answered(text_model: Build, serve: Serve, tmp_path: Path, kind: str, head_only: bool) -> None:
    model = text_model(pooling="token", num_labels=5)
    manifest = served_as_the_model_answers(model, serve, tmp_path, kind, head_only=head_only)
    assert manifest["outputs"][0]["shape"] == ["batch", "sequence", 5]
    shapes = {one["name"]: one["shape"] for one in manifest["inputs"]}
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch", "sequence"]
    assert shapes.get("taps") == ([3, "batch", "sequence", 16] if head_only else None)


@pytest.mark.parametrize(
    "config",
    [
        {"task_model": {**TASK, "encoder": "transformer", "num_heads": 2}},
        {"task_model": None, "taps": [0, 2], "hidden_width": None},
        {"task_model": None, "head": "concatenated"},
        {"taps": "none"},
        {"num_labels": 1, "problem_type": "regression", "target_mean": 40.0, "target_std": 12.0},
    ],
    ids=str,
)
def test_every_configuration_by_token(text_model: Build, tmp_path: Path, config: dict[str, Any]) -> None:
    model = text_model(pooling="token", **config)
    for head_only in [False] if config.get("taps") == "none" else [False, True]:
        written = export_model(model, tmp_path / f"{head_only}.pt2", head_only=head_only)
        assert written.largest_difference is not None and written.largest_difference < 1e-5


@pytest.mark.native
def test_tokens_by_fused_ops(text_model: Build, serve: Serve, tmp_path: Path) -> None:
    if not native.load().loaded:
        pytest.skip(native.load().reason)
    served_as_the_model_answers(text_model(pooling="token"), serve, tmp_path, "pt2", ops="fused")


@pytest.mark.parametrize(
    ("name", "layers", "kind"),
    [
        ("t5", "encoder+decoder", "pt2"),
        pytest.param("bart", "decoder", "pt2", marks=pytest.mark.slow),
        pytest.param("t5 with a head", "decoder", "pt2", marks=pytest.mark.slow),
        pytest.param("bart", "encoder+decoder", "pt2", marks=pytest.mark.slow),
        ("bart", "encoder+decoder", "onnx"),
        pytest.param("t5", "encoder+decoder", "onnx", marks=pytest.mark.slow),
        pytest.param("t5", "decoder", "onnx", marks=pytest.mark.slow),
    ],
)
def test_taps_of_a_decoder(
    decoder_model: Build, serve: Serve, tmp_path: Path, name: str, layers: str, kind: str
) -> None:
    model = decoder_model(name, backbone_layers=layers)
    manifest = served_as_the_model_answers(model, serve, tmp_path, kind)
    assert [one["name"] for one in manifest["inputs"]] == ["input_ids", "attention_mask"]  # none of the decoder's


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["cls", "last"])
def test_other_poolings_of_a_decoder(decoder_model: Build, serve: Serve, tmp_path: Path, pooling: str) -> None:
    model = decoder_model("t5", backbone_layers="encoder+decoder", pooling=pooling)
    served_as_the_model_answers(model, serve, tmp_path, "pt2")


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    ("layers", "taps"), [("encoder+decoder", [0]), ("encoder+decoder", [0, 3]), ("decoder", [0])]
)
def test_nothing_above_the_last_tap_is_exported(
    decoder_model: Build, name: str, layers: str, taps: list[int]
) -> None:
    model = decoder_model(name, backbone_layers=layers, taps=taps, task_model=None)
    specs = model_inputs(model)
    program = trace(ServingModel(model, [spec.name for spec in specs], []).eval(), specs, 64, "plain")
    blocks = "block" if name == "t5" else "layers"
    kept = {stack: set() for stack in ("encoder", "decoder")}
    behind = {"t5": "final_layer_norm", "bart": "-"}[name]
    for weight in program.state_dict:
        parts = weight.split(".")
        if blocks in parts:
            # an encoder that is served alone has no name of its own
            stack = "decoder" if "decoder" in parts else "encoder"
            kept[stack].add(int(parts[parts.index(blocks) + 1]))
    whole = {0, 1}
    assert kept["encoder"] == ({0} if taps == [0] and layers != "decoder" else whole)
    assert kept["decoder"] == (set() if kept["encoder"] == {0} else {0, 1} if taps == [0, 3] else {0})
    assert not any(f"decoder.{behind}" in weight for weight in program.state_dict)
    with torch.no_grad():  # the model itself still has all of them
        assert model(**padded(model, 4, 6)).logits.shape == (4, 3)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("which", ["tokens", "decoder"])
def test_compiled(text_model: Build, decoder_model: Build, serve: Serve, tmp_path: Path, which: str) -> None:
    tokens = which == "tokens"
    model = text_model(pooling="token") if tokens else decoder_model("t5", backbone_layers="encoder+decoder")
    served_as_the_model_answers(model, serve, tmp_path, "aoti")
