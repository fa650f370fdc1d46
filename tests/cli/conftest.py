"""Small files in every shape that the command line reads, and the command line itself."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from levi_fast.cli import main

GOOD, BAD = ["good", "great", "fine", "lovely", "happy"], ["bad", "poor", "dull", "awful", "sad"]
FILLER = ["the", "film", "was", "very", "story", "plot", "long", "music"]


def review(positive: bool, rng: random.Random) -> str:
    words = rng.choices(FILLER, k=rng.randint(3, 9)) + rng.choices(GOOD if positive else BAD, k=2)
    rng.shuffle(words)
    return " ".join(words)


@pytest.fixture
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    """``make_rows(count, seed)``: rows with text, label, stars (a number), price, colour and tags (a list)."""

    def make(count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
        rng = random.Random(seed)
        rows = []
        for place in range(count):
            positive = place % 2 == 0
            rows.append(
                {
                    "text": review(positive, rng),
                    "label": "pos" if positive else "neg",
                    "stars": round((4.0 if positive else 1.5) + rng.random(), 2),
                    "price": rng.randint(1, 50),
                    "colour": "red" if positive else rng.choice(["blue", "green"]),
                    "tags": ["liked"] * positive + ["cheap"] * rng.randint(0, 1),
                }
            )
        return rows

    return make


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, list[dict[str, Any]]], str]:
    """``write_rows(name, rows)``: the rows as .csv, .tsv or .jsonl in the test's folder; returns the path."""

    def write(name: str, rows: list[dict[str, Any]]) -> str:
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            return str(path)
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(
                {key: "|".join(cell) if isinstance(cell, list) else cell for key, cell in row.items()} for row in rows
            )
        return str(path)

    return write


@pytest.fixture
def levi_fast(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``levi_fast(*arguments)``: run the command line in this process; returns (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def train_arguments(
    tmp_path: Path,
    tiny_bert_dir: str,
    make_rows: Callable[..., list[dict[str, Any]]],
    write_rows: Callable[[str, list[dict[str, Any]]], str],
) -> list[str]:
    """Arguments of a training run that works in a second; tests add to it, later options win."""
    files = {
        name: write_rows(f"{name}.csv", make_rows(seed=seed)) for seed, name in enumerate(("train", "test", "new"))
    }
    return [
        *("train", "--train", files["train"], "--test", files["test"], "--ood", f"new={files['new']}"),
        *("--text-column", "text", "--label-column", "label", "--backbone", tiny_bert_dir),
        *("--epochs", "3", "--hidden-width", "8", "--output", str(tmp_path / "model")),
    ]


@pytest.fixture
def compared(
    levi_fast: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> Callable[[str], tuple[dict[str, Any], str]]:
    """Run ``levi-fast compare`` on a YAML text, into ``tmp_path / "compared"``: comparison.json, and stderr."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("statsmodels")

    def run(text: str) -> tuple[dict[str, Any], str]:
        (tmp_path / "compare.yaml").write_text(text, encoding="utf-8")
        status, _, err = levi_fast("compare", str(tmp_path / "compare.yaml"), "--output", str(tmp_path / "compared"))
        assert status == 0, err
        return json.loads((tmp_path / "compared" / "comparison.json").read_text(encoding="utf-8")), err

    return run
