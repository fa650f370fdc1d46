"""What a trained model's folder holds: a model card, nothing of this machine, all that transformers needs."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

Run = Callable[..., tuple[int, str, str]]


def column(path: Path, name: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        return [row[name] for row in csv.DictReader(file)]


def test_model_card_and_pipeline(
    levi_fast: Run, train_arguments: list[str], tiny_bert_dir: str, tmp_path: Path
) -> None:
    from transformers import pipeline

    shutil.copytree(tiny_bert_dir, tmp_path / "backbone")
    status, _, err = levi_fast(*train_arguments, "--backbone", str(tmp_path / "backbone"), "--max-length", "12")
    assert status == 0, err
    folder = tmp_path / "model"
    metrics = json.loads((folder / "metrics.json").read_text())
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "levi_fast" and header["pipeline_tag"] == "text-classification"
    assert "base_model" not in header  # the hub knows no folder of ours
    assert (
        f"{100 * metrics['id']['accuracy']:.1f} %" in card
        and f"{100 * metrics['ood']['new']['accuracy']:.1f} %" in card
    )
    assert "\n# LEVI, on ../backbone\n\nA frozen backbone, read at several depths" in card
    by_more = metrics["blend_rows"] > metrics["sizes"]["validation"]
    assert ("rows, the blend on held-out training rows too." if by_more else "validation rows alone.") in card
    assert "- training rows: 36\n" in card and "- columns read: text\n" in card
    for file in folder.iterdir():  # whoever gets the folder learns nothing about the machine it was made on
        assert str(tmp_path).encode() not in file.read_bytes() and tiny_bert_dir.encode() not in file.read_bytes(), (
            file
        )
    assert metrics["backbone"] == "../backbone"

    # the pipeline cuts texts as training did, and agrees with evaluate
    data = str(tmp_path / "test.csv")
    status, _, err = levi_fast(
        *("evaluate", "--model", str(folder), "--data", data, "--predictions", str(tmp_path / "predictions.csv"))
    )
    assert status == 0, err
    texts = column(Path(data), "text")
    answers = pipeline("text-classification", model=str(folder))(texts, truncation=True)
    assert [answer["label"] for answer in answers] == column(tmp_path / "predictions.csv", "prediction")


def test_the_card_of_a_baseline_says_what_it_is(levi_fast: Run, train_arguments: list[str], tmp_path: Path) -> None:
    for method, words in (("linear-probe", "A baseline of LEVI: linear probe, last layer (Alain & Bengio 2016"),
                          ("fine-tuning", "A baseline of LEVI: full fine-tuning (Devlin et al. 2019")):  # fmt: skip
        folder = tmp_path / method
        more = ["--method", method, "--epochs", "1", "--output", str(folder)]
        status, _, err = levi_fast(*train_arguments, *more)
        assert status == 0, err
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert words in card
        assert ("frozen-backbone" in yaml.safe_load(card.split("---")[1])["tags"]) == (method == "linear-probe")


def test_backbone_in_the_folder(
    levi_fast: Run, train_arguments: list[str], tiny_bert_dir: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bert_dir, tmp_path / "backbone")
    status, _, err = levi_fast(*train_arguments, "--backbone", str(tmp_path / "backbone"), "--include-backbone")
    assert status == 0, err
    shutil.rmtree(tmp_path / "backbone")
    (tmp_path / "model").rename(tmp_path / "moved")
    status, _, err = levi_fast(
        *("evaluate", "--model", str(tmp_path / "moved"), "--data", str(tmp_path / "test.csv")),
        *("--output", str(tmp_path / "e.json")),
    )
    assert status == 0, err
    trained = json.loads((tmp_path / "moved" / "metrics.json").read_text())
    assert json.loads((tmp_path / "e.json").read_text())["metrics"] == trained["id"]
    status, _, err = levi_fast(
        *train_arguments, "--method", "task-model", "--include-backbone", "--output", str(tmp_path / "x")
    )
    assert status == 2 and "--include-backbone: --method task-model has no backbone" in err
