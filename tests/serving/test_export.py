"""Exported artefacts give the model's logits, in processes that do not know levi_fast."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from levi_fast import DataError, LeviConfig, LeviModel, get_levi_model
from levi_fast.export import export_model
from levi_fast.export.inputs import head_inputs, model_inputs
from levi_fast.export.modules import ServingModel
from levi_fast.export.tracing import custom_ops, trace
from levi_fast.kernels import native

Build = Callable[..., LeviModel]
Serve = Callable[..., torch.Tensor]


def batch_for(model: LeviModel, head_only: bool, batch: int, length: int) -> dict[str, torch.Tensor]:
    specs = head_inputs(model) if head_only else model_inputs(model)
    sizes = {"batch": batch, "sequence": length, "history": 4}
    return {spec.name: spec.example(sizes, seed=batch) for spec in specs}


def logits_of(model: LeviModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    given = dict(given)
    if "taps" in given and given["taps"].dim() == 3:
        given["taps"] = given["taps"].transpose(0, 1).flatten(1)
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("head_only", [False, True])
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_served_without_levi_fast(
    text_model: Build, serve: Serve, tmp_path: Path, kind: str, head_only: bool
) -> None:
    pytest.importorskip("onnxruntime" if kind == "onnx" else "torch")
    model = text_model(task_model="table")
    suffix = "onnx" if kind == "onnx" else "pt2"
    written = export_model(model, tmp_path / f"m.{suffix}", format=kind, head_only=head_only)
    assert written.largest_difference is not None and written.largest_difference < 1e-5
    given = batch_for(model, head_only, 4, 13)  # another shape than any it was traced or verified with
    found = serve(kind, written.file, None, given)
    torch.testing.assert_close(found, logits_of(model, given), rtol=1e-5, atol=1e-6)


@pytest.mark.native
def test_fused_ops_need_the_shared_library_alone(text_model: Build, serve: Serve, tmp_path: Path) -> None:
    if not native.load().loaded:
        pytest.skip(native.load().reason)
    model = text_model()
    written = export_model(model, tmp_path / "m.pt2", ops="fused")
    manifest = json.loads(written.manifest.read_text())
    assert manifest["library"] == "liblevi_fast.so"
    given = batch_for(model, False, 2, 6)
    found = serve("pt2", written.file, tmp_path / manifest["library"], given)
    torch.testing.assert_close(found, logits_of(model, given), rtol=1e-5, atol=1e-6)


def test_manifest_says_what_a_server_needs(text_model: Build, tmp_path: Path) -> None:
    model = text_model(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    written = export_model(model, tmp_path / "m.pt2")
    manifest = json.loads(written.manifest.read_text())
    assert manifest["labels"] == ["no", "yes"] and manifest["most_tokens"] == 64
    assert [one["name"] for one in manifest["inputs"]] == ["input_ids", "attention_mask"]
    assert manifest["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    assert manifest["sha256"] == hashlib.sha256(written.file.read_bytes()).hexdigest()
    assert not (tmp_path / "liblevi_fast.so").exists()


def test_layers_above_the_last_tap_are_not_exported(text_model: Build) -> None:
    sizes = {}
    for taps in ([0], "all"):
        model = text_model(taps=taps)
        names = [spec.name for spec in model_inputs(model)]
        program = trace(ServingModel(model, names, names).eval(), model_inputs(model), 64, "plain")
        assert custom_ops(program) == []
        sizes[str(taps)] = [name for name in program.state_dict if ".layer." in name]
        assert not any("pooler" in name for name in program.state_dict)
    assert {name.split(".layer.")[1][0] for name in sizes["[0]"]} == {"0"}
    assert {name.split(".layer.")[1][0] for name in sizes["all"]} == {"0", "1", "2"}
    with torch.no_grad():  # the model itself still has them all
        model(**batch_for(model, False, 2, 5))


@pytest.mark.parametrize(
    "config",
    [
        {"pooling": "cls"},
        {"pooling": "last"},
        {"hidden_width": None, "task_model": None},
        {"mix": "learned", "objective": "both", "normalize": False, "activation": "relu"},
        {"num_labels": 1, "problem_type": "regression", "target_mean": 40.0, "target_std": 12.0},
        {"blend": 0.0, "taps": [0, 2]},
        {"view_blend": 0.5},
        {"view_blend": 0.5, "standalone_view": True},
        {"view_blend": 0.0, "standalone_view": True},
        {"blend": 0.0, "view_blend": 0.5, "mix": "learned", "objective": "both"},
        {"taps": "none"},
        {"head": "concatenated", "task_model": None},
        {"backbone_training": "lora"},
    ],
    ids=str,
)
def test_every_configuration(text_model: Build, tmp_path: Path, config: dict[str, Any]) -> None:
    if config.get("backbone_training") == "lora":
        pytest.importorskip("peft")
    model = text_model(**config)
    for head_only in [False] if config.get("taps") == "none" else [False, True]:
        written = export_model(model, tmp_path / f"{head_only}.pt2", head_only=head_only)
        assert written.largest_difference is not None and written.largest_difference < 1e-5


def test_images(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4))
    config = LeviConfig(hidden_width=8, task_model={"type": "image", "view_width": 6, "widths": [8, 8]}, blend=0.25)
    model = get_levi_model(vit, config).eval()
    for kind, name in (("pt2", "m.pt2"), ("onnx", "m.onnx")):
        if kind == "onnx":
            pytest.importorskip("onnxruntime")
        (tmp_path / kind).mkdir()
        written = export_model(model, tmp_path / kind / name, format=kind)
        manifest = json.loads(written.manifest.read_text())
        assert manifest["inputs"] == [{"name": "pixel_values", "dtype": "float32", "shape": ["batch", 3, 16, 16]}]
        assert written.largest_difference is not None and written.largest_difference < 1e-5


def test_a_wrong_artefact_is_not_written(text_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    traced = ServingModel.forward
    monkeypatch.setattr(ServingModel, "forward", lambda self, *inputs: traced(self, *inputs) + 0.01)
    with pytest.raises(DataError, match=r"m\.pt2 differs from the model by 0\.0"):
        export_model(model, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_refusals_come_first(text_model: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = text_model()
    monkeypatch.setattr("levi_fast.export.artefact.trace", lambda *_: pytest.fail("work began"))
    (tmp_path / "there.pt2").touch()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("m.pt2", {"format": "tf"}, "--format: expected one of pt2, onnx, aoti, got 'tf'"),
        ("m.pt2", {"ops": "magic"}, "--ops: expected one of"),
        ("m.onnx", {"format": "onnx", "ops": "fused"}, "--ops: ONNX"),
        ("m.onnx", {}, r"--output: expected a file ending in \.pt2"),
        ("there.pt2/m.pt2", {}, "--output: .* is no folder"),
        ("there.pt2", {}, "--output: .* exists"),
    ]
    for name, options, message in cases:
        with pytest.raises(DataError, match=message):
            export_model(model, tmp_path / name, **options)
    model.config.backbone_dtype = "int8"
    with pytest.raises(DataError, match="int8"):
        export_model(model, tmp_path / "m.pt2")
    alone = text_model(taps="none")
    with pytest.raises(DataError, match="--head-only"):
        export_model(alone, tmp_path / "m.pt2", head_only=True)


def test_the_document_shows_the_recorded_latencies() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "serving.md").read_text(encoding="utf-8")
    for row in json.loads((root / "benchmarks" / "results" / "serving_cpu.json").read_text())["rows"]:
        medians = " | ".join(f"{value:,.0f}" for name, value in row["median_us"].items() if name != "model(...)")
        assert f"| {row['part']}, {row['batch']}, {row['tokens']} | {medians} |" in text
        assert max(row["largest_difference_from_reference"].values()) < 1e-5
