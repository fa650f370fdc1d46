"""Real digits with two planted spurious features, one that pre-training shows and one that fine-tuning shows.

The images are scikit-learn's ``load_digits``: 1,797 handwritten digits of 8x8 pixels, part of its installation. What
is added to them is known to the pixel, so that an experiment can say which of the two a method was misled by. It
follows the argument of LEVI (Roh et al. 2024, arXiv 2402.04644, sections 1 to 3): pre-trained features carry one
spuriousness, fine-tuning data another, and a robust model leans on neither.

Every digit stands in the middle of a dark canvas of 12x12 pixels, two pixels from each side.

*The mark* is a block of 2x2 white pixels on the rim. The mark of class c is the c-th block on the way from the top
left corner to the right and then down: columns 2c and 2c + 1 of the first two rows for c < 6, the last two columns of
rows 2(c - 5) and 2(c - 5) + 1 for the others. Pre-training shows it, at the digit's own place for ``mark_rate`` of
the images. Fine-tuning never does: nothing in its data, validation data included, tells that a mark means nothing.

*The stripe* is one column of half-bright pixels from top to bottom, behind the digit: column c + 1 for class c.
Fine-tuning shows it, at the digit's own place for ``stripe_rate`` of the images. Pre-training never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from levi_fast.errors import DataError

NUM_CLASSES = 10
CANVAS, MARGIN, BLOCK = 12, 2, 2
STRIPE_LEVEL = 0.5
NONE = -1  # in place of a class: no mark, no stripe
OOD_NAMES = ("flipped_mark", "flipped_stripe", "both_random")
# Images of each part; no image is in two of them. The three OOD sets are three plantings of the images of "ood".
SIZES: Mapping[str, int] = {
    "pretrain": 650, "pretrain_test": 100, "train": 300, "validation": 150, "test": 250, "ood": 347
}  # fmt: skip
LEAST_SIZE = 10


@dataclass(frozen=True)
class DigitSet:
    """Images with what was planted in them.

    Attributes:
        images: float32 ``[N, 1, 12, 12]`` from 0 (dark) to 1.
        labels: int64 ``[N]``, the digits.
        marks, stripes: int64 ``[N]``, the classes at whose places they are; :data:`NONE` where there is none.
        rows: int64 ``[N]``, which images of ``load_digits`` these are.
    """

    images: np.ndarray
    labels: np.ndarray
    marks: np.ndarray
    stripes: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def make_digits(
    seed: int = 0, *, mark_rate: float = 0.95, stripe_rate: float = 0.9, sizes: Mapping[str, int] | None = None
) -> dict[str, DigitSet]:
    """Split the digits at random and plant the features.

    ===================  ==============================  ==============================
    set                  mark                            stripe
    ===================  ==============================  ==============================
    pretrain(_test)      the digit's at ``mark_rate``    none
    train, validation,   none                            the digit's at ``stripe_rate``
    test
    flipped_mark         always another digit's          the digit's at ``stripe_rate``
    flipped_stripe       none                            always another digit's
    both_random          any digit's, drawn evenly       any digit's, drawn evenly
    ===================  ==============================  ==============================

    Where a feature is not the digit's own, it is that of one of the nine others, drawn evenly.

    Args:
        seed: of everything drawn.
        mark_rate, stripe_rate: shares, exact up to rounding within each class.
        sizes: images per part, as :data:`SIZES`, which is the default.

    Returns:
        set name -> images; "pretrain", "pretrain_test", "train", "validation", "test", then :data:`OOD_NAMES`.

    Raises:
        DataError: a rate outside [0, 1], unknown parts, sizes below 10 or of more images than there are.
    """
    for name, rate in (("mark_rate", mark_rate), ("stripe_rate", stripe_rate)):
        if not 0.0 <= rate <= 1.0:
            raise DataError(f"{name}: expected a number in [0, 1], got {rate}")
    digits, labels = _load()
    wanted = dict(SIZES if sizes is None else sizes)
    if set(wanted) != set(SIZES):
        raise DataError(f"sizes: expected {', '.join(SIZES)}, got {', '.join(wanted)}")
    for name, size in wanted.items():
        if size < LEAST_SIZE:
            raise DataError(f"sizes: {name}: expected at least {LEAST_SIZE}, got {size}")
    if sum(wanted.values()) > len(labels):
        raise DataError(f"sizes: expected at most {len(labels)} images in all, got {sum(wanted.values())}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    ends = np.cumsum(list(wanted.values()))
    part = {name: order[end - wanted[name] : end] for name, end in zip(wanted, ends, strict=True)}

    def plant(rows: np.ndarray, mark: float | None, stripe: float | None) -> DigitSet:
        own = labels[rows]
        marks, stripes = (_classes(own, rate, rng) for rate in (mark, stripe))
        return DigitSet(draw(digits[rows], marks, stripes), own, marks, stripes, rows)

    ood = part["ood"]
    anything = _evenly(len(ood), rng), _evenly(len(ood), rng)
    return {
        "pretrain": plant(part["pretrain"], mark_rate, None),
        "pretrain_test": plant(part["pretrain_test"], mark_rate, None),
        **{name: plant(part[name], None, stripe_rate) for name in ("train", "validation", "test")},
        "flipped_mark": plant(ood, 0.0, stripe_rate),
        "flipped_stripe": plant(ood, None, 0.0),
        "both_random": DigitSet(draw(digits[ood], *anything), labels[ood], *anything, ood),
    }


def draw(digits: np.ndarray, marks: np.ndarray, stripes: np.ndarray) -> np.ndarray:
    """Digits on their canvas with what is planted.

    Args:
        digits: ``[N, 8, 8]`` from 0 to 1.
        marks, stripes: int64 ``[N]``, a class or :data:`NONE`.

    Returns:
        float32 ``[N, 1, 12, 12]``.
    """
    images = np.pad(digits, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))).astype(np.float32)
    for row in np.flatnonzero(stripes != NONE):
        column = images[row, :, stripes[row] + 1]
        np.maximum(column, STRIPE_LEVEL, out=column)
    for row in np.flatnonzero(marks != NONE):
        top, left = mark_place(int(marks[row]))
        images[row, top : top + BLOCK, left : left + BLOCK] = 1.0
    return images[:, None]


def mark_place(label: int) -> tuple[int, int]:
    """Row and column of the top left pixel of a class's mark."""
    along = CANVAS // BLOCK  # blocks from the top left corner to the top right one
    return (0, BLOCK * label) if label < along else (BLOCK * (label - along + 1), CANVAS - BLOCK)


def _classes(labels: np.ndarray, rate: float | None, rng: np.random.Generator) -> np.ndarray:
    """Classes that agree with the label at ``rate``; :data:`NONE` everywhere for None."""
    if rate is None:
        return np.full(len(labels), NONE, dtype=np.int64)
    others = (labels + rng.integers(1, NUM_CLASSES, size=len(labels))) % NUM_CLASSES
    agrees = np.zeros(len(labels), dtype=bool)
    for label in range(NUM_CLASSES):
        members = rng.permutation(np.flatnonzero(labels == label))
        agrees[members[: round(rate * len(members))]] = True
    return np.where(agrees, labels, others)


def _evenly(count: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, NUM_CLASSES, size=count)


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images float64 ``[1797, 8, 8]`` from 0 to 1, and int64 labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return found.images / 16.0, found.target.astype(np.int64)
