"""Sweep files: grids, lists, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from levi_fast.errors import DataError
from levi_fast.training.sweep_file import parse_sweep, read_sweep


def test_a_grid_is_every_combination() -> None:
    assert parse_sweep({"cross_fit": 0})[0].options() == {"cross_fit": 0}
    found = parse_sweep({"seed": [0, 1], "learning_rate": ["1e-3", 0.01], "view_dropout": 0.5})
    assert [c.name for c in found] == [
        "seed=0, learning_rate=0.001", "seed=0, learning_rate=0.01",
        "seed=1, learning_rate=0.001", "seed=1, learning_rate=0.01",
    ]  # fmt: skip
    assert found[3].options() == {"seed": 1, "learning_rate": 0.01} and found[3].model() == {"view_dropout": 0.5}
    assert found[3].label_column is None


def test_a_list_names_its_configurations(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "configurations:\n  - {name: plain}\n  - {hidden_width: 0, seed: 3}\n  - {name: stars, label_column: stars}\n"
    )
    plain, linear, stars = read_sweep(path)
    assert (plain.name, dict(plain.settings)) == ("plain", {})
    assert linear.name == "hidden_width=0, seed=3" and linear.model() == {"hidden_width": None}
    assert stars.label_column == "stars" and stars.options() == stars.model() == {}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (None, "expected settings with lists of values, or 'configurations' with a list, got nothing"),
        ([1], r"expected settings with lists of values.*got \[1\]"),
        ({"learning_rat": [0.1]}, "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        ({3: [0.1]}, "unknown setting 3; known are seed, learning_rate"),
        ({"seed": []}, "seed: expected at least one value, got an empty list"),
        ({"seed": [0, "one"]}, "seed: expected a whole number, got 'one'"),
        ({"seed": [True]}, "seed: expected a whole number, got True"),
        ({"seed": [1.5]}, "seed: expected a whole number, got 1.5"),
        ({"learning_rate": ["fast"]}, "learning_rate: expected a number, got 'fast'"),
        ({"normalize": [1]}, "normalize: expected true or false, got 1"),
        ({"objective": [None]}, "objective: expected a text, got nothing"),
        ({"seed": [0, 1, 0]}, "seed: 0 is listed twice"),
        ({"seed": list(range(50)), "epochs": list(range(1, 50))}, "2450 configurations; expected at most 1000"),
        ({"configurations": [], "seed": [1]}, "'configurations' stands alone, got seed beside it"),
        ({"configurations": []}, "configurations: expected a list with at least one, got an empty list"),
        ({"configurations": ["a"]}, "configuration 1: expected settings and a name, got 'a'"),
        ({"configurations": [{"name": "a"}, {"name": "a"}]}, "configuration 2: the name 'a' is configuration 1's"),
        ({"configurations": [{"seed": 1}, {"seed": 1}]}, "configuration 2: the name 'seed=1' is configuration 1's"),
        ({"configurations": [{"name": 3}]}, "configuration 1: name: expected a text, got 3"),
        ({"configurations": [{"sed": 3}]}, "configuration 1: unknown setting 'sed'; did you mean 'seed'?"),
    ],
)
def test_what_has_no_place_in_it_is_named(document: Any, message: str) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        parse_sweep(document)


def test_files_that_cannot_be_read_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--sweep: .*none.yaml cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    for content, message in (("seed: [0", "is not YAML"), ("!!python/object/apply:os.getcwd []", "is not YAML")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(DataError, match=rf"--sweep: .*bad.yaml {message}"):
            read_sweep(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("seed: []")
    with pytest.raises(DataError, match=r"--sweep: .*bad.yaml: seed: expected at least one value"):
        read_sweep(tmp_path / "bad.yaml")
