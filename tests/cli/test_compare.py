"""``levi-fast compare``: from a user's files to tables, tests and a page; killed, it goes on."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from levi_fast.training.comparison_file import read_comparison
from levi_fast.training.methods import METHODS as FOUND

pytest.importorskip("matplotlib")
pytest.importorskip("statsmodels")

Run = Callable[..., tuple[int, str, str]]
METHODS = ["levi", "linear-probe", "head2toe", "task-model"]


@pytest.fixture
def arguments(train_arguments: list[str], tmp_path: Path) -> list[str]:
    """Arguments of a small comparison; tests add to it."""
    kept = train_arguments[1 : train_arguments.index("--epochs")]
    more = ["--methods", ",".join(METHODS), "--seeds", "0-1", "--epochs", "2", "--output", str(tmp_path / "compared")]
    return ["compare", *kept, *more]


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return found


def test_tables_tests_and_predictions(levi_fast: Run, arguments: list[str], tmp_path: Path) -> None:
    status, out, err = levi_fast(*arguments)
    assert status == 0, err
    assert "8 of 8" in err and "LEVI" in out
    found = document(tmp_path / "compared")
    assert found["reference"] == "levi" and found["seeds"] == [0, 1]
    data = found["data"]["data"]
    assert data["splits"] == ["ID", "OOD new"] and data["metric"] == "accuracy"
    for method in METHODS:
        row = data["methods"][method]
        for split, stored in (("ID", "test"), ("OOD new", "ood new")):
            again = []
            for seed in (0, 1):
                cell = load_file(tmp_path / "compared" / "cells" / "data" / method / f"seed-{seed}.safetensors")
                right = cell[f"{stored}/logits"].argmax(axis=1) == cell[f"{stored}/labels"]
                again.append(float(np.mean(right)))
            assert row["scores"][split]["values"] == pytest.approx(again)
            assert row["scores"][split]["mean"] == pytest.approx(np.mean(again))
            assert 0 <= row["calibration"][split]["mean"] <= 1
        assert row["cost"]["trained_parameters"] > 0 and row["cost"]["peak_resident_bytes"] > 2**20
        assert ("tests" in row) == (method != "levi")
    layers = data["methods"]["levi"]["per_layer"]
    assert layers["layers"] == [0, 1, 2] and len(layers["scores"]["ood new"]) == 3
    assert data["methods"]["linear-probe"]["per_layer"] is None
    test = data["methods"]["task-model"]["tests"]["ID"]
    means = [1 - data["methods"][m]["scores"]["ID"]["mean"] for m in ("task-model", "levi")]
    assert test["difference"] == pytest.approx(means[0] - means[1])
    assert test["interval"][0] <= test["difference"] <= test["interval"][1] and test["examples"] == 40


def test_the_page_needs_nothing_else(levi_fast: Run, arguments: list[str], tmp_path: Path) -> None:
    assert levi_fast(*arguments)[0] == 0
    page = (tmp_path / "compared" / "comparison.html").read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\"' <>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "<script" not in page and "<img" not in page and "@import" not in page
    assert '<html lang="en">' in page and 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    charts = re.findall(r"<svg[^>]*>", page)
    assert len(charts) == 4 and all('role="img"' in tag and "aria-label=" in tag for tag in charts)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "#0102" not in page  # colours follow the page's scheme


def test_a_finished_cell_is_kept_and_a_missing_one_trained(
    levi_fast: Run, arguments: list[str], tmp_path: Path
) -> None:
    assert levi_fast(*arguments)[0] == 0
    cells = tmp_path / "compared" / "cells" / "data"
    before = {file: file.read_bytes() for file in cells.rglob("seed-*.json")}
    (cells / "levi" / "seed-1.json").unlink()
    status, _, err = levi_fast(*arguments)
    assert status == 0 and err.count(" of 8: ") == 1 and "8 of 8: data, seed 1, levi" in err
    for file, content in before.items():
        one, other = json.loads(content), json.loads(file.read_bytes())
        timed = ("seconds", "peak_resident_bytes") if file == cells / "levi" / "seed-1.json" else ()
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    status, _, err = levi_fast(*arguments)
    assert status == 0 and " of 8: " not in err


def test_changed_settings_are_named(levi_fast: Run, arguments: list[str], tmp_path: Path) -> None:
    assert levi_fast(*arguments)[0] == 0
    status, _, err = levi_fast(*arguments, "--taps", "last")
    assert status == 2 and "was trained with other settings: taps: None there, 'last' now" in err
    train = Path(arguments[arguments.index("--train") + 1])
    train.write_text(train.read_text(encoding="utf-8").replace("good", "bad"), encoding="utf-8")
    status, _, err = levi_fast(*arguments, "--seeds", "0-2")
    assert status == 2 and "rows are not in the cache" in err, err
    status, _, err = levi_fast(*arguments, "--methods", "levi,taps-only", "--cache", str(tmp_path / "fresh"))
    assert status == 2 and "was trained on other rows (train" in err


@pytest.mark.parametrize(("package", "methods"), [("peft", "levi,lora"), ("statsmodels", "levi")])
def test_a_missing_library_is_named_at_once(
    levi_fast: Run, arguments: list[str], monkeypatch: pytest.MonkeyPatch, package: str, methods: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more)
    )
    if package == "statsmodels":
        monkeypatch.setitem(sys.modules, "statsmodels.stats.multitest", None)
    status, _, err = levi_fast(*arguments, "--methods", methods)
    extra = "lora" if package == "peft" else "compare"
    assert status == 2 and f"pip install levi_fast[{extra}]" in err and "rows:" not in err


@pytest.mark.slow
def test_killed_it_goes_on(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "levi_fast", *arguments]
    cells = tmp_path / "compared" / "cells"
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while not list(cells.rglob("seed-*.json")):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait(30)
    finally:
        child.kill()
    kept = {file: file.read_bytes() for file in cells.rglob("seed-*.json")}
    assert kept and not (tmp_path / "compared" / "comparison.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" of 8: ") == 8 - len(kept)
    assert all(file.read_bytes() == content for file, content in kept.items())
    assert len(document(tmp_path / "compared")["data"]["data"]["methods"]) == 4


def test_yaml_with_regression_and_a_trained_backbone(
    levi_fast: Run, arguments: list[str], tmp_path: Path, tiny_bert_dir: str
) -> None:
    (tmp_path / "c.yaml").write_text(
        f"""
data:
  - {{name: stars, train: train.csv, test: test.csv, ood: {{new: new.csv}}, text_column: text, label_column: stars}}
methods: [levi, wise-ft]
seeds: [3]
max_train_rows: 24
learning_rates: [0.01, 0.001]
backbone: {tiny_bert_dir}
epochs: 2
backbone_epochs: 1
backbone_learning_rates: [0.001]
""",
        encoding="utf-8",
    )
    status, _, err = levi_fast("compare", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "c"))
    assert status == 0, err
    data = document(tmp_path / "c")["data"]["stars"]
    assert data["metric"] == "rmse" and data["sizes"]["train"] == 24
    assert data["methods"]["wise-ft"]["chosen"][0]["choices"]["alpha"] in (0.25, 0.5, 0.75)
    assert data["methods"]["wise-ft"]["chosen"][0]["learning_rate"] == 0.001
    assert data["methods"]["levi"]["chosen"][0]["learning_rate"] in (0.01, 0.001)
    assert data["methods"]["levi"]["scores"]["ID"]["sd"] is None and data["methods"]["levi"]["calibration"] is None
    assert data["methods"]["wise-ft"]["tests"]["ID"]["p_seeds"] is None


def test_a_learning_rate_that_diverges_is_passed_over(levi_fast: Run, arguments: list[str], tmp_path: Path) -> None:
    files = "{name: a, train: train.csv, test: test.csv, text_column: text, label_column: label}"
    backbone = arguments[arguments.index("--backbone") + 1]
    for rates, ends in (("[1.0e+38, 0.01]", 0), ("[1.0e+38]", 2)):
        (tmp_path / "c.yaml").write_text(
            f"data: [{files}]\nmethods: [taps-only]\nseeds: 0\nepochs: 2\nlearning_rates: {rates}\n"
            f"backbone: {backbone}\n",
            encoding="utf-8",
        )
        status, _, err = levi_fast("compare", str(tmp_path / "c.yaml"), "--output", str(tmp_path / f"c{ends}"))
        assert status == ends, err
    assert document(tmp_path / "c0")["data"]["a"]["methods"]["taps-only"]["chosen"][0]["learning_rate"] == 0.01
    assert "a, seed 0, taps-only: training diverged" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("methods: [levi]", "data: is missing"),
        ("data: []\nmethods: [levi]", "data: expected at least one"),
        ("data: [{name: a, train: x.csv}]\nmethods: [magic]", "expected one of levi"),
        ("data: [{name: a, train: x.csv, colour: red}]\nmethods: [levi]", "data: a: colour: unknown"),
        ("data: [{name: a}]\nmethods: [levi]", "expected train: FILE"),
        ("data: [{name: ../a, train: x.csv}]\nmethods: [levi]", "expected a name that a folder can have"),
        ("data: [{name: a, train: x.csv}]\nmethods: [levi, levi]", "methods: levi is given twice"),
        ("data: [{name: a, train: x.csv}]\nmethods: [levi]\nseeds: many", "seeds: expected numbers"),
        ("data: [{name: a, train: x.csv}]\nmethods: [levi]\nepochs: 0", "epochs: expected a whole number"),
        (
            "data: [{name: a, train: x.csv}]\nmethods: [levi]\nstandalone_view: 1",
            "standalone_view: expected true or false",
        ),
        ("data: [{name: a, train: x.csv}]\nmethods: [levi]\ncross_fit: 1", "cross_fit: expected 0 or a whole"),
        ("data: [{name: a, train: x.csv}]\nmethods: [levi]\ncross_fit: true", "cross_fit: expected 0 or a whole"),
        ("data: [{name: a, train: x.csv}]\nmethods: [levi]\nlearning_rates: 1", "learning_rates: expected a list"),
        ("data: [{name: a, train: x.csv, label_column: l, text_column: t}]\nmethods: [levi]", "x.csv"),
    ],
)
def test_what_cannot_be_is_refused(levi_fast: Run, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8")
    status, _, err = levi_fast("compare", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "c"))
    assert status == 2 and message in err, err


def test_options_beside_a_file_and_folders_of_other_things(
    levi_fast: Run, arguments: list[str], tmp_path: Path
) -> None:
    status, _, err = levi_fast("compare", "c.yaml", "--seeds", "1", "--output", str(tmp_path / "c"))
    assert status == 2 and "--seeds: c.yaml says what is compared" in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    status, _, err = levi_fast(*arguments, "--output", str(tmp_path / "full"))
    assert status == 2 and "has other files" in err


@pytest.mark.parametrize("name", ["frozen", "all"])
def test_the_files_of_the_benchmarks_are_read(name: str) -> None:
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "evidence" / f"{name}.yaml"
    comparison = read_comparison(str(file))
    known = {method for method, kind in FOUND.items() if name == "all" or not kind.trains_backbone}
    if comparison.settings.get("standalone_view") is False:
        known.remove("levi-no-standalone")  # what "levi" is there
    assert sorted(comparison.methods) == sorted(known)


@pytest.mark.slow
def test_the_page_in_a_browser(levi_fast: Run, arguments: list[str], tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on PATH")
    assert levi_fast(*arguments)[0] == 0
    page = (tmp_path / "compared" / "comparison.html").as_uri()
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
        *("--disable-background-networking", "--disable-component-update"),
    ]
    for name, size in (("wide", "1280,2400"), ("phone", "500,2400")):
        shot, profile = tmp_path / f"{name}.png", tmp_path / f"profile-{name}"
        subprocess.run(
            [browser, *flags, f"--user-data-dir={profile}", f"--window-size={size}", f"--screenshot={shot}", page],
            check=True, capture_output=True, timeout=90,
        )  # fmt: skip
        from PIL import Image

        pixels = np.asarray(Image.open(shot).convert("L"))
        # something is drawn all the way down, and nothing but the tables' own boxes scrolls sideways
        assert all((band < 128).any() for band in np.array_split(pixels, 8)[:6])
