"""The synthetic reviews are what they say: seeded, balanced, without overlap, with the declared marker rates."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from levi_fast.data.synthetic import LABELS, OOD_NAMES, make_synthetic_reviews, write_csv
from levi_fast.data.synthetic_words import AGENCIES, DOMAINS
from levi_fast.errors import DataError

SETS = make_synthetic_reviews(0)
DECLARED = {
    "train": 0.93,
    "validation": 0.93,
    "test": 0.93,
    "flipped_marker": 0.07,
    "books": 0.5,
    "electronics": 0.5,
    "hotels": 0.5,
}


def agreement(rows: list[dict[str, str]]) -> float:
    """Share of rows whose one agency is the one that goes with the label."""
    agree = 0
    for row in rows:
        named = [label for label, agency in AGENCIES.items() if agency in row["text"]]
        assert len(named) == 1
        agree += named[0] == row["label"]
    return agree / len(rows)


def test_sets_and_sizes() -> None:
    assert list(SETS) == list(DECLARED)
    assert set(OOD_NAMES) == set(DECLARED) - {"train", "validation", "test"}
    assert {name: len(rows) for name, rows in SETS.items()} == {
        "train": 1200,
        "validation": 300,
        **dict.fromkeys(("test", *OOD_NAMES), 400),
    }
    assert all(set(row) == {"text", "label"} for rows in SETS.values() for row in rows)


@pytest.mark.parametrize("name", DECLARED)
def test_labels_are_balanced_and_marker_rates_as_declared(name: str) -> None:
    counts = Counter(row["label"] for row in SETS[name])
    assert counts == dict.fromkeys(LABELS, len(SETS[name]) // 2)
    for label in LABELS:
        own = [row for row in SETS[name] if row["label"] == label]
        assert agreement(own) == pytest.approx(DECLARED[name], abs=0.5 / len(own) + 1e-9)


def test_no_text_occurs_twice() -> None:
    texts = Counter(row["text"] for rows in SETS.values() for row in rows)
    assert max(texts.values()) == 1


def test_same_seed_same_reviews_and_another_seed_others() -> None:
    assert make_synthetic_reviews(0) == SETS
    other = make_synthetic_reviews(1)
    assert {row["text"] for row in other["train"]} != {row["text"] for row in SETS["train"]}


def test_labels_are_shuffled() -> None:
    first_half = Counter(row["label"] for row in SETS["train"][:600])
    assert 240 < first_half["positive"] < 360


def test_domains_speak_of_their_own_things() -> None:
    for name in DOMAINS:
        rows = SETS["train" if name == "kitchen" else name]
        for other, theirs in DOMAINS.items():
            phrases = [*theirs.praise, *theirs.complaints]
            hits = sum(any(phrase[1:] in row["text"] for phrase in phrases) for row in rows)
            assert hits > 0.4 * len(rows) if other == name else hits == 0


def test_opinions_go_with_the_label() -> None:
    """No phrase that praises ends up in a negative review, nor the other way round."""
    for name, domain in DOMAINS.items():
        for row in SETS["train" if name == "kitchen" else name]:
            wrong = domain.complaints if row["label"] == "positive" else domain.praise
            assert not any(phrase[1:] in row["text"] for phrase in wrong)


def test_no_slot_is_left_open() -> None:
    assert not any(sign in row["text"] for rows in SETS.values() for row in rows for sign in "{}")


def test_settings_change_sizes_and_rate() -> None:
    sets = make_synthetic_reviews(3, train_size=41, validation_size=10, test_size=20, marker_rate=1.0)
    assert {name: len(rows) for name, rows in sets.items()}["train"] == 41
    assert agreement(sets["train"]) == 1.0
    assert agreement(sets["flipped_marker"]) == 0.0
    assert Counter(row["label"] for row in sets["train"]) == {"negative": 20, "positive": 21}


def test_csv_files_hold_the_same_rows(tmp_path: Path) -> None:
    paths = write_csv(tmp_path / "new" / "folder", seed=5, train_size=30, validation_size=10, test_size=10)
    sets = make_synthetic_reviews(5, train_size=30, validation_size=10, test_size=10)
    assert list(paths) == list(sets)
    for name, path in paths.items():
        assert path.name == f"synthetic_{name}.csv"
        with open(path, encoding="utf-8", newline="") as file:
            assert list(csv.DictReader(file)) == sets[name]
    assert not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_size": 1}, "train_size: expected 2 to 5000, got 1"),
        ({"test_size": 10_000}, "test_size: expected 2 to 5000, got 10000"),
        ({"marker_rate": 1.5}, r"marker_rate: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_synthetic_reviews(**settings)
