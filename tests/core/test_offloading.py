"""Backbones that accelerate keeps in RAM or on disk until a layer runs: the same bits as the whole one in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModel, Trainer, TrainingArguments

from levi_fast import ActivationCache, DataError, LeviConfig, LeviModel, TapExtractor, get_levi_model, load_backbone
from levi_fast.fingerprints import fingerprint
from levi_fast.offloading import input_device, is_offloaded, is_placed
from levi_fast.sharding import shard_backbone

Build = Callable[..., nn.Module]
WAYS = ("cpu", "disk", "dispatched", "preloaded")


def offload(backbone: Any, way: str, folder: Path, layers: str = "encoder.layer") -> Any:
    """The backbone itself, its weights gone from it."""
    if way == "cpu":
        return cpu_offload(backbone, torch.device("cpu"))
    if way == "disk":
        return disk_offload(backbone, str(folder), torch.device("cpu"))
    if way == "preloaded":  # all weights of the whole stack come at once, when it starts
        return cpu_offload(backbone, torch.device("cpu"), preload_module_classes=["BertEncoder"])
    places = {name: "cpu" for name, _ in backbone.named_children()} if "." not in layers else {}
    for name, _ in backbone.named_modules():  # the second layer stays in memory
        if name.startswith(f"{layers}.") and name.count(".") == layers.count(".") + 1:
            places[name] = "cpu" if name.endswith(".1") else "disk"
    stack = layers.split(".")[0]
    places |= {name: "disk" for name, _ in backbone.named_children() if name != stack}
    return dispatch_model(backbone, places, main_device=torch.device("cpu"), offload_dir=str(folder))


def digest(backbone: nn.Module, last_tap: int = -1, layers: str | None = None) -> str:
    extractor = TapExtractor(backbone, [last_tap], layers=layers)
    return fingerprint(extractor.runner, extractor.blocks, extractor.layers[-1])


class Rows(Dataset):
    """Random tokens in three classes, a padding token at the end of each."""

    def __init__(self, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(2)
        self.ids = torch.randint(1, 30, (size, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = torch.tensor([1] * 7 + [0])
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": torch.tensor(index % 3)}


def batch(size: int = 6) -> dict[str, torch.Tensor]:
    rows = [Rows()[index] for index in range(size)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def model_of(backbone: nn.Module, **options: Any) -> LeviModel:
    torch.manual_seed(0)
    spec = {"type": "text", "vocab_size": 50, "embedding_dim": 8, "view_width": 6}
    return get_levi_model(backbone, LeviConfig(hidden_width=8, num_labels=3, task_model=spec, **options)).train()


def train(model: nn.Module, steps: int = 5) -> list[float]:
    torch.manual_seed(1)  # dropout, the view's too
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys() and not any(name.startswith("backbone") for name in left)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_training_ends_with_the_same_bits(build_backbone: Build, tmp_path: Path, way: str) -> None:
    whole, backbone = model_of(build_backbone("bert")), offload(build_backbone("bert"), way, tmp_path / "kept")
    assert is_placed(backbone) and is_offloaded(backbone) and not is_placed(build_backbone("bert"))
    model = model_of(backbone)
    assert model.config.backbone_fingerprint == whole.config.backbone_fingerprint
    assert model.config.backbone_dtype == "float32"
    expected = train(whole)
    assert train(model) == expected and expected[-1] < expected[0]
    assert_same_weights(model, whole)
    assert digest(backbone) == whole.config.backbone_fingerprint  # after forwards that ended at the last tap
    held = {name: p.is_meta for name, p in backbone.named_parameters() if ".layer.1." not in name}
    assert all(held.values()), "a forward left weights behind"


@pytest.mark.parametrize("name", ["bert", "t5_encoder", "gpt2", "llama", "vit", "convnext", "distilbert"])
@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_taps_and_fingerprints_of_every_architecture(
    build_backbone: Build, inputs_for: Callable[[str], Any], tmp_path: Path, name: str, way: str
) -> None:
    plain, backbone = build_backbone(name), offload(build_backbone(name), way, tmp_path)
    for last in (1, -1):
        assert digest(backbone, last) == digest(plain, last)
    taps, expected = TapExtractor(backbone)(**inputs_for(name)), TapExtractor(plain)(**inputs_for(name))
    assert all(torch.equal(one, other) for one, other in zip(taps, expected, strict=True))


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_tied_weights_count_once(build_backbone: Build, tmp_path: Path, way: str) -> None:
    plain, backbone = build_backbone("t5"), offload(build_backbone("t5"), way, tmp_path)
    expected = digest(plain, layers="encoder+decoder")  # both stacks share their embedding
    assert digest(backbone, layers="encoder+decoder") == expected


def test_bfloat16_on_disk(build_backbone: Build, tmp_path: Path) -> None:
    plain = build_backbone("llama").to(torch.bfloat16)
    backbone = offload(build_backbone("llama").to(torch.bfloat16), "disk", tmp_path)
    assert digest(backbone) == digest(plain) and digest(plain).startswith("llama:bfloat16:")
    one, other = model_of(plain), model_of(backbone)
    assert train(other) == train(one)
    assert other.config.backbone_dtype == "bfloat16"


def test_layers_above_the_last_tap_are_never_read(build_backbone: Build, tmp_path: Path) -> None:
    whole = model_of(build_backbone("bert"), taps=[0, 1])
    backbone = offload(build_backbone("bert"), "disk", tmp_path)
    above = [file for file in tmp_path.iterdir() if file.name.startswith(("encoder.layer.2.", "pooler."))]
    assert len(above) == 18
    for file in above:
        file.unlink()
    model = model_of(backbone, taps=[0, 1])
    assert train(model) == train(whole)
    with pytest.raises(ValueError, match=r"weight encoder\.layer\.2\..* cannot be read where accelerate keeps it"):
        model_of(backbone)


@pytest.mark.parametrize("places", ["disk", "mixed"])
def test_from_pretrained_with_a_device_map(tiny_bert_dir: str, tmp_path: Path, places: str) -> None:
    layers = {f"encoder.layer.{i}": "disk" if i else "cpu" for i in range(3)}
    device_map = {"": "disk"} if places == "disk" else {"embeddings": "cpu", **layers, "pooler": "disk"}
    backbone = AutoModel.from_pretrained(tiny_bert_dir, device_map=device_map, offload_folder=str(tmp_path / "kept"))
    assert is_offloaded(backbone)
    plain = load_backbone(tiny_bert_dir)
    model, whole = model_of(backbone), model_of(plain)
    assert model.config.backbone_fingerprint == whole.config.backbone_fingerprint
    assert model.config.backbone == whole.config.backbone == tiny_bert_dir
    assert train(model) == train(whole)
    # Saved with the one and loaded with the other, whichever it is.
    model.save_pretrained(tmp_path / "saved")
    expected = whole.eval()(**batch()).logits
    for given in (None, backbone):
        loaded = LeviModel.from_pretrained(tmp_path / "saved", backbone=given, device_map="cpu")
        assert torch.equal(loaded(**batch()).logits, expected)


def test_auto_without_a_gpu_is_a_plain_model(tiny_bert_dir: str) -> None:
    backbone = AutoModel.from_pretrained(tiny_bert_dir, device_map="auto")
    assert not is_placed(backbone)
    assert train(model_of(backbone)) == train(model_of(load_backbone(tiny_bert_dir)))


@pytest.mark.parametrize("way", ["cpu", "disk", "dispatched"])
def test_the_backbone_is_saved_with_the_model(
    tiny_bert_dir: str, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("levi_fast.offloading.SHARD_SIZE", "8KB")
    backbone = offload(load_backbone(tiny_bert_dir), way, tmp_path / "kept")
    model = model_of(backbone).eval()
    model.save_pretrained(tmp_path / "saved", include_backbone=True)
    assert len(list((tmp_path / "saved" / "backbone").glob("model-*.safetensors"))) > 1
    assert hasattr(backbone, "hf_device_map") == (way == "dispatched")
    loaded = LeviModel.from_pretrained(tmp_path / "saved")
    assert not is_placed(loaded.backbone)
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("way", ["disk", "dispatched"])
def test_trainer_leaves_an_offloaded_backbone_where_it_is(build_backbone: Build, tmp_path: Path, way: str) -> None:
    ended = {}
    for name in ("whole", way):
        plain = build_backbone("bert")
        backbone = plain if name == "whole" else offload(plain, way, tmp_path / "kept")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2,
            report_to=[], eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=3, disable_tqdm=True,
            use_cpu=True, seed=3, load_best_model_at_end=True,
        )  # fmt: skip
        trainer = Trainer(model_of(backbone), arguments, train_dataset=Rows(), eval_dataset=Rows(12))
        trainer.train()
        trainer.save_model(str(tmp_path / f"{name}-saved"))
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        ended[name] = trainer.model, losses
    assert ended[way][1] == ended["whole"][1] and len(ended[way][1]) == 2
    assert_same_weights(ended[way][0], ended["whole"][0])
    assert is_offloaded(ended[way][0].backbone)
    assert LeviModel.from_pretrained(tmp_path / f"{way}-saved", backbone=ended["whole"][0].backbone)


def test_data_parallel_leaves_it_alone(build_backbone: Build, tmp_path: Path) -> None:
    expected = train(model_of(build_backbone("bert")))
    model = model_of(offload(build_backbone("bert"), "cpu", tmp_path))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/met", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)  # refuses what is on the meta device unless told
        assert train(parallel) == expected
    finally:
        torch.distributed.destroy_process_group()


def test_moving_and_casting_concern_the_trained_part_alone(build_backbone: Build) -> None:
    model = model_of(offload(build_backbone("bert"), "cpu", Path()))
    backbone = model.backbone
    model.to(torch.float64).to("cpu").double()
    assert model.backbone is backbone and model.ensemble.bias.dtype == torch.float64
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert model(**batch()).logits.dtype == torch.float64


def test_a_cache_has_the_same_key_and_numbers(tiny_bert_dir: str, tmp_path: Path) -> None:
    texts = [{"input_ids": torch.tensor([2, 5 + row, 9, 3])} for row in range(20)]
    whole = ActivationCache.build(tmp_path / "whole", load_backbone(tiny_bert_dir), texts)
    backbone = offload(load_backbone(tiny_bert_dir), "disk", tmp_path / "kept")
    with pytest.raises(DataError, match="device: accelerate has placed this backbone; expected None"):
        ActivationCache.build(tmp_path / "cache", backbone, texts, device="cpu")
    cache = ActivationCache.build(tmp_path / "cache", backbone, texts)
    assert cache.manifest.key == whole.manifest.key
    assert torch.equal(cache["data"][torch.arange(20)], whole["data"][torch.arange(20)])
    assert cache.manifest.environment["device"] == "cpu"


def test_what_cannot_be_is_refused(build_backbone: Build, tmp_path: Path) -> None:
    for training in ("lora", "full"):
        with pytest.raises(ValueError, match=f"placed or offloaded can only be frozen.* '{training}'"):
            model_of(offload(build_backbone("bert"), "cpu", tmp_path), backbone_training=training)
    model = model_of(offload(build_backbone("bert"), "cpu", tmp_path))
    with pytest.raises(ValueError, match="accelerate has placed or offloaded this one"):
        shard_backbone(model)
    backbone = build_backbone("bert").to("meta")
    with pytest.raises(ValueError, match="on the meta device, without data"):
        model_of(backbone)
    assert input_device(backbone) == torch.device("meta")
