"""Amazon Reviews: predict a review's star rating from its text, with whole product categories out of distribution.

Reads the JSON Lines files of either release, plain or gzipped, one category each:

- 2018 (Ni, Li, McAuley, *Justifying Recommendations using Distantly-Labeled Reviews and Fine-Grained Aspects*, EMNLP
  2019): ``Books.json.gz`` or its 5-core ``Books_5.json.gz``, with ``overall``, ``summary``, ``reviewText``,
  ``reviewerID``, ``asin``;
- 2023 (Hou et al., *Bridging Language and Items for Retrieval and Recommendation*, arXiv 2403.03952):
  ``Books.jsonl`` or ``Books.jsonl.gz``, with ``rating``, ``title``, ``text``, ``user_id``, ``parent_asin``.

See :func:`load_amazon`.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
import math
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from levi_fast.data.tables import Table, short
from levi_fast.errors import DataError

_FILE = re.compile(r"(?P<category>.+?)(_5)?\.(json|jsonl)(\.gz)?")
_METADATA = "meta_"  # meta_Books.json.gz describes products
# Shares of the reviewers: training, then validation; the rest is for testing.
_TRAIN_SHARE, _VALIDATION_SHARE = 0.7, 0.1
_FIELDS = {"overall": ("summary", "reviewText", "reviewerID"), "rating": ("title", "text", "user_id")}
"""What holds the rating -> what holds title, text and reviewer, in the same release."""


@dataclass(frozen=True)
class _Review:
    title: str
    text: str
    rating: float
    reviewer: str


@dataclass
class _Sample:
    """At most ``size`` of the reviews that are offered, each set of that size equally likely; memory is for those."""

    size: int
    kept: list[tuple[int, tuple[int, int], _Review]] = field(default_factory=list)

    def offer(self, draw: int, place: tuple[int, int], review: _Review) -> None:
        """Keep the review if its ``draw``, a random number, is among the smallest; ``place`` is file and line."""
        entry = (-draw, place, review)
        if len(self.kept) < self.size:
            heapq.heappush(self.kept, entry)
        elif entry[0] > self.kept[0][0]:
            heapq.heapreplace(self.kept, entry)

    def table(self, name: str) -> Table:
        reviews = [review for _, _, review in sorted(self.kept, key=lambda entry: entry[1])]
        cells: dict[str, list[Any]] = {
            "title": [review.title for review in reviews],
            "text": [review.text for review in reviews],
            "rating": [review.rating for review in reviews],
        }
        return Table(name, len(reviews), cells)


def load_amazon(
    data: str | Path,
    train_categories: Sequence[str] = (),
    seed: int = 0,
    *,
    max_train: int = 20_000,
    max_eval: int = 2_000,
) -> dict[str, Table]:
    """Draw training, validation and test reviews of some categories, and an OOD set of each of the others.

    Reviewers, not reviews, are dealt out to training (70 %), validation (10 %) and test (20 %); an OOD set has the
    reviews of another category by reviewers who are not dealt out to training. So every set has new reviewers, and
    the category alone tells OOD from ID. Files are read line by line, and only what is drawn is kept.

    Reviews without any text, and those rated outside 1 to 5, are left out, with a warning that counts them.

    Args:
        data: a folder with one file per category, or one file. ``meta_*`` files are passed over.
        train_categories: file names without ``_5`` and extensions, such as "Books"; may be empty where there is but
            one.
        seed: deals out the reviewers and draws the reviews.
        max_train: how many training reviews are drawn; all if there are fewer.
        max_eval: likewise of every other set.

    Returns:
        by split, "train", "validation", "test" and "ood CATEGORY": tables with ``title``, ``text`` and ``rating``, in
        the order of files and lines.

    Raises:
        DataError: no such file, an unknown category, a line that is not a review (names file and line), or a set
            without a review.
    """
    for name, value in (("max_train", max_train), ("max_eval", max_eval)):
        if value < 1:
            raise DataError(f"{name}: expected at least 1, got {value}")
    files = find_categories(data)
    training = _training_categories(train_categories, files, str(data))
    samples = {"train": _Sample(max_train), "validation": _Sample(max_eval), "test": _Sample(max_eval)}
    left_out = 0
    for number, (category, path) in enumerate(files.items()):
        if category not in training:
            samples[f"ood {category}"] = _Sample(max_eval)
        for line, review in _reviews(path):
            if not (review.title or review.text) or not 1 <= review.rating <= 5:
                left_out += 1
                continue
            share = _random(seed, "reviewer", review.reviewer) / 2**64
            group = "train" if share < _TRAIN_SHARE else "validation"
            if share >= _TRAIN_SHARE + _VALIDATION_SHARE:
                group = "test"
            if category not in training:
                if group == "train":
                    continue
                group = f"ood {category}"
            samples[group].offer(_random(seed, category, str(line)), (number, line), review)
    if left_out:
        warnings.warn(f"{left_out} reviews without text, or rated outside 1 to 5, were left out", stacklevel=2)
    tables = {split: sample.table(f"amazon {split}") for split, sample in samples.items()}
    for split, table in tables.items():
        if not table.num_rows:
            raise DataError(f"{data}: no review is left for the {split} set (training: {', '.join(training)})")
    return tables


def find_categories(data: str | Path) -> dict[str, Path]:
    """The review files by category, in alphabetical order.

    Raises:
        DataError: no such folder or file, none that holds reviews, or a category in two files.
    """
    place = Path(data)
    if not place.exists():
        raise DataError(f"{data}: no such file or folder; expected Amazon reviews, such as Books.json.gz")
    found: dict[str, Path] = {}
    for path in [place] if place.is_file() else sorted(place.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match is None or path.name.startswith(_METADATA) or not path.is_file():
            continue
        category = match["category"]
        if category in found:
            raise DataError(f"{data}: {found[category].name} and {path.name} are both of category {category!r}")
        found[category] = path
    if not found:
        listed = ", ".join(sorted(path.name for path in place.iterdir())[:8]) if place.is_dir() else place.name
        raise DataError(
            f"{data}: expected files such as Books.json.gz or Books.jsonl, one per category; found {listed or 'none'}"
        )
    return dict(sorted(found.items()))


def _training_categories(asked: Sequence[str], files: Mapping[str, Path], data: str) -> list[str]:
    known = ", ".join(files)
    if not asked and len(files) > 1:
        raise DataError(
            f"train_categories (--split): expected the categories to train on, separated by commas, of {known}"
        )
    for category in asked:
        if category not in files:
            raise DataError(f"train_categories (--split): {data} has no category {category!r}; it has {known}")
    return [category for category in files if category in asked or not asked]


def _reviews(path: Path) -> Iterator[tuple[int, _Review]]:
    """Line number and review, line by line; blank lines are passed over."""
    line = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        try:
            for line, raw in enumerate(lines, start=1):
                if raw.strip():
                    yield line, _parse(raw, path, line)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}, line {line + 1}: not readable as gzip: {error}") from error


def _parse(raw: bytes, path: Path, line: int) -> _Review:
    where = f"{path}, line {line}"
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8 text, got byte 0x{raw[error.start]:02x}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: expected a review as JSON: {error.msg} (column {error.colno})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a review as a JSON object, got {short(row)}")
    named = next((name for name in _FIELDS if name in row), None)
    if named is None:
        raise DataError(
            f"{where}: expected 'overall' (the release of 2018) or 'rating' (2023), found {', '.join(map(repr, row))}"
        )
    title, text, reviewer = _FIELDS[named]
    rating = row[named]
    if isinstance(rating, bool) or not isinstance(rating, int | float) or not math.isfinite(rating):
        raise DataError(f"{where}: {named!r}: expected a number of stars, got {short(rating)}")
    if not isinstance(row.get(reviewer), str) or not row[reviewer]:
        raise DataError(f"{where}: {reviewer!r}: expected the reviewer, got {short(row.get(reviewer))}")
    # many reviews of 2018 have no reviewText, or no summary
    texts = []
    for name in (title, text):
        value = row.get(name)
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {name!r}: expected text, got {short(value)}")
        texts.append((value or "").strip())
    return _Review(texts[0], texts[1], float(rating), row[reviewer])


def _random(seed: int, kind: str, key: str) -> int:
    """64 bits that depend on the arguments alone: the same reviewer, or line, draws the same in any set of files."""
    digest = hashlib.blake2b(f"{seed}\0{kind}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
