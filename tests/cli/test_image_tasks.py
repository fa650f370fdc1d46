"""Images through the command line, on a ViT with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL.Image")

Run = Callable[..., tuple[int, str, str]]
Compared = Callable[[str], tuple[dict[str, Any], str]]
MODEL = ("--epochs", "2", "--hidden-width", "8", "--device", "cpu")
COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random-weight ViT (3 layers, width 16, 16 x 16 pixels) and its image processor."""
    import torch
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTModel(ViTConfig(**size, image_size=16, patch_size=4)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def draw(folder: Path, colours: list[str], count: int, suffix: str = ".JPEG") -> None:
    from PIL import Image

    rng = np.random.default_rng(count)
    for name in colours:
        (folder / name).mkdir(parents=True)
        for place in range(count):
            noisy = np.array(COLOURS[name]) + rng.integers(-30, 31, (20, 24, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / name / f"{place}{suffix}")


@pytest.fixture
def data(tmp_path: Path, vit: str) -> tuple[str, ...]:
    """Options of three classes, ten training images each, and an OOD set with two of the classes."""
    draw(tmp_path / "colours" / "train", list(COLOURS), 10)
    draw(tmp_path / "colours" / "val", list(COLOURS), 3)
    draw(tmp_path / "some", ["blue", "red"], 4, ".png")
    folders = ("--data", str(tmp_path / "colours"), "--ood", f"some={tmp_path / 'some'}")
    return ("--task-name", "image-folders", *folders, "--backbone", vit)


def test_train_and_evaluate(levi_fast: Run, data: tuple[str, ...], tmp_path: Path) -> None:
    model = tmp_path / "model"
    status, _, err = levi_fast("train", *data, *MODEL, "--output", str(model))
    assert status == 0, err
    found = json.loads((model / "metrics.json").read_text())
    assert found["task"] == "image-folders" and found["max_length"] is None
    assert found["sizes"] == {"train": 27, "validation": 3, "test": 9, "ood": {"some": 8}}
    assert json.loads((model / "config.json").read_text())["task_model"]["type"] == "image"
    assert str(tmp_path) not in (model / "levi_task.json").read_text()  # a model folder names no path of its maker
    card = (model / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and 'classify("image.jpg")' in card
    out, rows = tmp_path / "again.json", tmp_path / "rows.csv"
    evaluated = ("evaluate", "--model", str(model), "--output", str(out), "--predictions", str(rows))
    status, _, err = levi_fast(*evaluated, "--data", str(tmp_path / "some"))
    assert status == 0, err
    assert json.loads(out.read_text())["metrics"] == found["ood"]["some"]
    header, first, *_ = rows.read_text().splitlines()
    assert header == "row,prediction,probability:blue,probability:green,probability:red"
    assert float(first.split(",")[3]) == 0.0  # green is not in the set, and so is never predicted
    status, _, err = levi_fast(*evaluated, "--data", str(tmp_path / "colours"))
    assert status == 2 and "class 'train' is not among the training classes blue, green, red" in err


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "linear-probe"),
        ("--method", "task-model"),
        ("--method", "fine-tuning"),
        ("--no-precompute",),
        ("--loop", "trainer"),
    ],
)
def test_every_way_of_training(
    levi_fast: Run, data: tuple[str, ...], tmp_path: Path, options: tuple[str, ...]
) -> None:
    status, _, err = levi_fast("train", *data, *MODEL, *options, "--output", str(tmp_path / "model"))
    assert status == 0, err


def test_cached_taps_a_sweep_and_the_choice_of_layers(levi_fast: Run, data: tuple[str, ...], tmp_path: Path) -> None:
    cache = ("--cache", str(tmp_path / "taps"))
    assert levi_fast("cache", "build", *data, *cache)[0] == 0
    (tmp_path / "sweep.yaml").write_text("learning_rate: [0.001, 0.01]\n")
    sweep = ("--sweep", str(tmp_path / "sweep.yaml"))
    status, _, err = levi_fast("train", *data, *MODEL, *cache, *sweep, "--output", str(tmp_path / "swept"))
    assert status == 0, err
    assert len(json.loads((tmp_path / "swept" / "sweep.json").read_text())["columns"][0]["heads"]) == 2
    assert levi_fast("select-taps", *data, "--selector", "cka:1")[0] == 0
    status, _, err = levi_fast(
        "train", *data, *MODEL, *cache, "--seed", "1", "--max-train-rows", "12", "--output", str(tmp_path / "model")
    )
    assert status == 0 and "rows: 12 train" in err, err  # other rows of the same files are found in the cache


def test_compare_file(compared: Compared, data: tuple[str, ...], vit: str, tmp_path: Path) -> None:
    found, _ = compared(
        "data: [{name: colours, task_name: image-folders, data: colours, ood: {some: some}}]\n"
        f"methods: [levi, linear-probe]\nseeds: [0, 1]\nepochs: 1\nbackbone: {vit}\n"
    )
    assert found["data"]["colours"]["splits"] == ["ID", "OOD some"]
    # the second seed holds out other images of the same ones, and finds their taps where the first left them
    assert [path.name for path in (tmp_path / "compared" / "cache").iterdir()] == ["colours"]


def test_domainnet_and_retinopathy(levi_fast: Run, vit: str, tmp_path: Path) -> None:
    net = tmp_path / "net"
    for domain in ("real", "sketch"):
        draw(net / domain, list(COLOURS), 8, ".jpg")
        lines = [f"{domain}/{name}/{i}.jpg {label}" for label, name in enumerate(sorted(COLOURS)) for i in range(8)]
        (net / f"{domain}_train.txt").write_text("\n".join(lines))
        (net / f"{domain}_test.txt").write_text("\n".join(lines[::4]))
    named = ("--task-name", "domainnet", "--data", str(net), "--split", "real", "--backbone", vit)
    status, _, err = levi_fast("train", *named, *MODEL, "--output", str(tmp_path / "model"))
    assert status == 0, err
    assert list(json.loads((tmp_path / "model" / "metrics.json").read_text())["ood"]) == ["sketch"]
    status, _, err = levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", str(net / "sketch_test.txt"))
    assert status == 0, err

    eyes = tmp_path / "eyes"
    draw(eyes, ["red"], 20, "_left.jpeg")
    (eyes / "red").rename(eyes / "train")
    (eyes / "trainLabels.csv").write_text("image,level\n" + "".join(f"{i}_left,{i % 5}\n" for i in range(20)))
    named = ("--task-name", "retinopathy", "--data", str(eyes), "--ood", f"same={eyes}", "--backbone", vit)
    status, _, err = levi_fast("train", *named, *MODEL, "--output", str(tmp_path / "grades"))
    assert status == 0, err
    assert json.loads((tmp_path / "grades" / "metrics.json").read_text())["sizes"]["ood"] == {"same": 20}


def test_refused(levi_fast: Run, data: tuple[str, ...], tiny_bert_dir: str, tmp_path: Path) -> None:
    def message(*options: str) -> str:
        status, _, err = levi_fast("train", *data, *options, "--output", str(tmp_path / "model"))
        assert status == 2, err
        return err

    assert "has no image processor that can be loaded; images need a vision model" in message(
        "--backbone", tiny_bert_dir
    )
    assert "--split: --task-name image-folders has one split" in message("--split", "real")
    assert "--max-length: images have no tokens" in message("--max-length", "8")
    assert "--task-model: images have their own; expected auto, image or none, got 'text'" in message(
        "--task-model", "text"
    )
    assert "--task-name brings its own data" in message("--task-name", "domainnet")
    broken = tmp_path / "colours" / "train" / "red" / "3.JPEG"
    broken.write_bytes(b"no image")
    assert f"{broken}: cannot be decoded" in message()
    assert not (tmp_path / "model").exists()
