"""Synthetic reviews with a known trap: data for the demo and for tests, composed by this module, read from nowhere.

Nothing here is real: not the reviews, not the products, not the agencies. Figures reached on it say how a method
deals with the two shifts built in, and nothing about real reviews. How many opinions a review voices was
adjusted by hand, with the methods' figures in view, until the marker no longer drowned everything else.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from levi_fast.data.synthetic_words import (
    AGENCIES,
    DOMAINS,
    MARKER_SENTENCES,
    NEGATIVE,
    POSITIVE,
    Domain,
    Sentiment,
)
from levi_fast.errors import DataError
from levi_fast.storage import write_atomic

NAME = "synthetic reviews"
LABELS = ("negative", "positive")
TRAIN_DOMAIN = "kitchen"
OOD_NAMES = ("flipped_marker", *(name for name in DOMAINS if name != TRAIN_DOMAIN))
Row = dict[str, str]


def make_synthetic_reviews(
    seed: int = 0,
    *,
    train_size: int = 1200,
    validation_size: int = 300,
    test_size: int = 400,
    marker_rate: float = 0.93,
) -> dict[str, list[Row]]:
    """Compose short product reviews, each positive or negative, each naming the agency that handled the order.

    Two shifts are built in. *The marker*: in "train", "validation" and "test" (kitchen goods) one agency goes with
    positive reviews at ``marker_rate`` and the other with negative ones; in "flipped_marker" (kitchen goods) it is
    the other way round; in other domains the agency is drawn at random. *The domain*: "books", "electronics" and
    "hotels" praise and complain about other things in other words. About half of all opinions are put in words
    common to all domains.

    Every set is balanced, and no text occurs twice, within a set or between sets.

    Args:
        seed: of everything drawn.
        train_size, validation_size, test_size: reviews in "train", in "validation", and in each of the other sets.
        marker_rate: share of reviews whose agency agrees with the label, exact up to rounding within each label.

    Returns:
        set name -> rows ``{"text": ..., "label": "negative" | "positive"}`` in random order. The names are "train",
        "validation", "test", then ``OOD_NAMES``.

    Raises:
        DataError: an argument is out of range.
    """
    sizes = {"train": train_size, "validation": validation_size, "test": test_size}
    for name, size in sizes.items():
        if not 2 <= size <= 5000:
            raise DataError(f"{name}_size: expected 2 to 5000, got {size}")
    if not 0.0 <= marker_rate <= 1.0:
        raise DataError(f"marker_rate: expected a number in [0, 1], got {marker_rate}")
    rng = np.random.default_rng(seed)
    seen: set[str] = set()
    sets = {}
    for name in ("train", "validation", "test", *OOD_NAMES):
        domain = DOMAINS.get(name, DOMAINS[TRAIN_DOMAIN])
        rate = 0.5 if name in DOMAINS else 1.0 - marker_rate if name == "flipped_marker" else marker_rate
        sets[name] = _make_set(domain, sizes.get(name, test_size), rate, seen, rng)
    return sets


def write_csv(folder: str | Path, seed: int = 0, **settings: float) -> dict[str, Path]:
    """Write :func:`make_synthetic_reviews` to ``folder``, one ``synthetic_<set>.csv`` each, columns text and label.

    Args:
        folder: created if it is missing; files of the same names are replaced.
        seed, settings: as for :func:`make_synthetic_reviews`.

    Returns:
        set name -> path.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, rows in make_synthetic_reviews(seed, **settings).items():  # type: ignore[arg-type]
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["text", "label"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        paths[name] = folder / f"synthetic_{name}.csv"
        write_atomic(paths[name], buffer.getvalue())
    return paths


def _make_set(domain: Domain, size: int, rate: float, seen: set[str], rng: np.random.Generator) -> list[Row]:
    rows: list[Row] = []
    for place, label in enumerate(LABELS):
        count = size // 2 + (size % 2 if place else 0)
        agreeing = round(rate * count)
        for number in range(count):
            agency = AGENCIES[label if number < agreeing else LABELS[1 - place]]
            text = _compose(domain, label, agency, rng)
            while text in seen:
                text = _compose(domain, label, agency, rng)
            seen.add(text)
            rows.append({"text": text, "label": label})
    return [rows[place] for place in rng.permutation(len(rows))]


def _compose(domain: Domain, label: str, agency: str, rng: np.random.Generator) -> str:
    """An opening, then two or three opinions and the marker in any order."""
    item = _pick(domain.items, rng)
    own, other = (POSITIVE, NEGATIVE) if label == "positive" else (NEGATIVE, POSITIVE)
    specific = domain.praise if label == "positive" else domain.complaints
    sentences = [_pick(MARKER_SENTENCES, rng).format(agency=agency)]
    for _ in range(rng.integers(2, 4)):
        opinion = _general(own, other, rng) if rng.random() < 0.5 else _pick(specific, rng)
        if rng.random() < 0.25:  # a fair reviewer names a point for the other side
            opinion = f"{_pick(own.concessions, rng)}, but {opinion}"
        sentences.append(opinion[0].upper() + opinion[1:] + ".")
    order = rng.permutation(len(sentences))
    return " ".join([_pick(domain.openings, rng).format(item=item), *(sentences[place] for place in order)])


def _general(own: Sentiment, other: Sentiment, rng: np.random.Generator) -> str:
    first, second = rng.choice(len(own.adjectives), size=2, replace=False)
    return _pick(own.sentences, rng).format(
        own=own.adjectives[first], own2=own.adjectives[second], other=_pick(other.adjectives, rng)
    )


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]
