"""README's production section as a user runs it: its commands, word for word, on small files."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
GOOD, BAD = ["good", "great", "fine", "lovely", "happy"], ["bad", "poor", "dull", "awful", "sad"]


def commands() -> list[list[str]]:
    section = README.split("## To production")[1].split("\n## ")[0]
    block = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[0]
    return [shlex.split(line) for line in block.splitlines() if line.startswith("levi-fast ")]


def write_reviews(file: Path, seed: int) -> None:
    rng = random.Random(seed)
    rows = ["text,label"]
    for place in range(40):
        words = rng.choices(["the", "film", "was", "very", "story", "plot"], k=5) + rng.choices(
            GOOD if place % 2 else BAD, k=2
        )
        rows.append(f"{' '.join(words)},{'pos' if place % 2 else 'neg'}")
    file.write_text("\n".join(rows) + "\n")


@pytest.mark.slow
def test_from_training_to_a_served_model(tiny_bert_dir: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    for seed, name in enumerate(("train", "test", "new")):
        write_reviews(tmp_path / f"{name}.csv", seed)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = []
    for words in commands():
        extra = ["--backbone", tiny_bert_dir, "--epochs", "3", "--hidden-width", "8"] if words[1] == "train" else []
        done = subprocess.run(
            [sys.executable, "-m", "levi_fast", *words[1:], *extra],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stderr[-2000:])
        ran.append(words[1])
    assert ran == ["train", "evaluate", "export", "export"]

    from transformers import AutoTokenizer, pipeline

    import levi_fast  # noqa: F401  # makes transformers know LEVI

    texts = [line.split(",")[0] for line in (tmp_path / "new.csv").read_text().splitlines()[1:]]
    wanted = [line.split(",")[1] for line in (tmp_path / "predictions.csv").read_text().splitlines()[1:]]
    answers = pipeline("text-classification", model=str(tmp_path / "model"))(texts, truncation=True)
    assert [answer["label"] for answer in answers] == wanted
    served = tmp_path / "served"
    manifest = json.loads((served / "reviews.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(served / manifest["preprocessing"])
    batch = tokenizer(texts, truncation=True, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(str(served / "reviews.onnx"))
    logits = session.run(["logits"], {name: batch[name] for name in ("input_ids", "attention_mask")})[0]
    assert [manifest["labels"][place] for place in logits.argmax(1)] == wanted
