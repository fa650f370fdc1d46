"""``levi-fast train --backbone-training``: adapters or a whole backbone trained, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

Run = Callable[..., tuple[int, str, str]]

pytest.importorskip("peft")


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("method", ["levi", "linear-probe"])
def test_a_trained_backbone_is_saved_and_evaluates_to_the_same(
    levi_fast: Run, train_arguments: list[str], tmp_path: Path, training: str, method: str
) -> None:
    status, _, err = levi_fast(*train_arguments, "--backbone-training", training, "--method", method)
    assert status == 0, err
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    inside = [name for name in load_file(tmp_path / "model" / "model.safetensors") if name.startswith("backbone.")]
    assert inside and (training == "full" or all(".lora_" in name for name in inside))
    status, _, err = levi_fast(
        "evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "new.csv"),
        "--output", str(tmp_path / "again.json"),
    )  # fmt: skip
    assert status == 0, err
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == metrics["ood"]["new"]


def test_the_backbones_learning_rate_is_its_own(
    levi_fast: Run, train_arguments: list[str], tiny_bert_dir: str, tmp_path: Path
) -> None:
    base = load_file(Path(tiny_bert_dir) / "model.safetensors")
    moved = {}
    for rate in ("1e-6", "1e-3"):
        output = str(tmp_path / rate)
        more = ["--backbone-training", "full", "--backbone-learning-rate", rate, "--output", output]
        assert levi_fast(*train_arguments, *more)[0] == 0
        state = load_file(tmp_path / rate / "model.safetensors")
        name = "encoder.layer.0.attention.self.query.weight"
        moved[rate] = float((state[f"backbone.{name}"] - base[name]).abs().max())
    assert 0 < moved["1e-6"] < 1e-4 < moved["1e-3"]
    assert torch.isfinite(torch.tensor(list(moved.values()))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone-training", "half"], "--backbone-training: expected one of frozen, lora, full, got 'half'"),
        (["--backbone-learning-rate", "1e-4"], "--backbone-learning-rate: the backbone is frozen"),
        (["--backbone-training", "lora", "--cache", "c"], "--cache: keeps the taps of a frozen backbone"),
        (["--backbone-training", "full", "--method", "task-model"], "--method task-model has no backbone"),
        (["--backbone-training", "full", "--include-backbone"], "--include-backbone: a trained backbone (full)"),
        (["--backbone-training", "lora", "--backbone-dtype", "int8"], "--backbone-dtype int8: cannot be trained"),
        (["--backbone-training", "full", "--backbone-dtype", "int4"], "--backbone-dtype int4: cannot be trained"),
        (["--backbone-training", "full", "--backbone-learning-rate", "0"], "expected a positive number, got 0.0"),
    ],
)
def test_what_cannot_be_is_refused(
    levi_fast: Run, train_arguments: list[str], options: list[str], message: str
) -> None:
    status, _, err = levi_fast(*train_arguments, *options)
    assert status == 2 and message in err


def test_taps_of_a_decoder_from_the_command_line(
    levi_fast: Run, train_arguments: list[str], tiny_bert_dir: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, T5Config, T5Model

    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_dir)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    T5Model(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    more = ["--backbone", str(tmp_path / "t5"), "--backbone-layers", "encoder+decoder"]
    status, _, err = levi_fast(*train_arguments, *more)
    assert status == 0, err
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tap_layers"] == [0, 1, 2, 3]
    status, _, err = levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "new.csv"))
    assert status == 0, err
    more += ["--output", str(tmp_path / "cached"), "--cache", str(tmp_path / "cache")]
    status, _, err = levi_fast(*train_arguments, *more)
    assert status == 2 and "--cache: keeps the encoder's taps" in err
