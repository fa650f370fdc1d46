"""``levi-fast select-taps``, and taps that the training data chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from levi_fast import LeviModel
from levi_fast.training import tap_selection

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data_arguments(train_arguments: list[str]) -> list[str]:
    return train_arguments[1 : train_arguments.index("--epochs")]


@pytest.mark.parametrize("label", ["label", "stars", "tags"])  # classes, numbers, several labels per row
def test_table_chart_and_scores(
    levi_fast: Run, data_arguments: list[str], make_rows: Callable[..., list[dict[str, Any]]],
    write_rows: Callable[[str, list[dict[str, Any]]], str], tmp_path: Path, label: str,
) -> None:  # fmt: skip
    rows = write_rows("rows.jsonl", make_rows())  # a CSV cell has no way to say that a row has no label at all
    data = ["--train", rows, *data_arguments[data_arguments.index("--text-column") :]]
    data = [*data, "--label-column", label, "--cache", str(tmp_path / "cache")]
    files = ["--scores", str(tmp_path / "scores.json"), "--chart", str(tmp_path / "chart.svg")]
    status, out, err = levi_fast("select-taps", *data, *files)
    assert status == 0, err
    found = {one["selector"]: one for one in json.loads((tmp_path / "scores.json").read_text())["selections"]}
    assert list(found) == ["cka:2", "gradnorm", "probe", "mix"]
    for selector, one in found.items():
        assert one["candidates"] == [0, 1, 2] and set(one["layers"]) <= {0, 1, 2} and one["layers"]
        assert all(len(values) == 3 for values in one["scores"].values())
        if selector != "mix":
            assert f"{selector}: --taps {','.join(map(str, one['layers']))}" in out
    assert len(found["cka:2"]["layers"]) == 2 and found["cka:2"]["scores"]["1 - CKA"][0] is None
    assert all(norm > 0 for norm in found["gradnorm"]["scores"]["gradient norm"])
    assert sum(found["mix"]["scores"]["mixing weight"]) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "chart.svg").read_text().count("<svg") == 1
    assert levi_fast("select-taps", *data, "--scores", str(tmp_path / "again.json"))[0] == 0
    assert (tmp_path / "again.json").read_text() == (tmp_path / "scores.json").read_text()


@pytest.mark.parametrize("cached", [False, True])
def test_train_resolves_and_remembers(
    levi_fast: Run, train_arguments: list[str], data_arguments: list[str], tmp_path: Path, cached: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # the first two layers: the model then ends below the cache's last layer, and must still know its backbone
    monkeypatch.setattr(tap_selection, "most_important", lambda importance, k: list(range(k)))
    more = ["--taps", "cka:2", *(["--cache", str(tmp_path / "cache")] if cached else [])]
    status, _, err = levi_fast(*train_arguments, *more)
    assert status == 0, err
    assert "taps: cka:2 chose layers 0, 1" in err
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["taps"] == config["tap_layers"] == config["tap_selection"]["layers"] == [0, 1]
    assert config["tap_selection"]["selector"] == "cka:2" and len(config["tap_selection"]["scores"]["1 - CKA"]) == 3
    model = LeviModel.from_pretrained(tmp_path / "model")
    assert model.config.tap_layers == [0, 1]
    test = data_arguments[data_arguments.index("--test") + 1]
    status, _, err = levi_fast("evaluate", "--model", str(tmp_path / "model"), "--data", test)
    assert status == 0, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--taps", "cka:9"], "k from 1 to 3"),
        (["--taps", "cka"], "whole number k"),
        (["--taps", "probe", "--no-precompute"], "leave out --no-precompute"),
        (["--taps", "best"], "got 'best'"),
    ],
)
def test_what_train_refuses(levi_fast: Run, train_arguments: list[str], arguments: list[str], message: str) -> None:
    status, _, err = levi_fast(*train_arguments, *arguments)
    assert status == 2 and message in err, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--selector", "last"], "--selector: expected cka:k, gradnorm, probe or mix, got 'last'"),
        (["--selector", "cka:0"], "whole number k"),
        (["--chart", "chart.gif"], "ending in .svg or .png"),
        (["--scores", "nowhere/scores.json"], "--scores: the folder of"),
    ],
)
def test_what_select_taps_refuses(
    levi_fast: Run, data_arguments: list[str], arguments: list[str], message: str
) -> None:
    status, _, err = levi_fast("select-taps", *data_arguments, *arguments)
    assert status == 2 and message in err, err
