"""The digits with planted features: what is planted where, at which rates, and in which images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from levi_fast.data.digits import NONE, OOD_NAMES, SIZES, DigitSet, draw, make_digits, mark_place
from levi_fast.errors import DataError

ID_SETS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def sets() -> dict[str, DigitSet]:
    return make_digits(3)


def test_no_image_is_in_two_parts_and_all_are_used(sets: dict[str, DigitSet]) -> None:
    assert list(sets) == ["pretrain", "pretrain_test", *ID_SETS, *OOD_NAMES]
    parts = [name for name in sets if name not in OOD_NAMES]
    rows = np.concatenate([*(sets[name].rows for name in parts), sets["both_random"].rows])
    assert sorted(rows) == list(range(1797)) == sorted(set(rows))
    assert {name: len(sets[name]) for name in parts} == {k: v for k, v in SIZES.items() if k != "ood"}
    for name in OOD_NAMES:  # the same images, so that these sets differ by what is planted alone
        assert np.array_equal(sets[name].rows, sets["both_random"].rows) and len(sets[name]) == SIZES["ood"]


def test_the_digits_are_those_of_scikit_learn(sets: dict[str, DigitSet]) -> None:
    found = load_digits()
    for name in ("pretrain", "train"):
        own = sets[name]
        assert own.images.shape == (SIZES[name], 1, 12, 12) and own.images.dtype == np.float32
        assert np.array_equal(own.labels, found.target[own.rows])
    middle = sets["pretrain"].images[:, 0, 2:10, 2:10]
    assert np.array_equal(middle, (found.images[sets["pretrain"].rows] / 16).astype(np.float32))


def test_features_agree_with_the_label_as_stated(sets: dict[str, DigitSet]) -> None:
    for name, found in sets.items():
        mark = {"pretrain": 0.95, "pretrain_test": 0.95, "flipped_mark": 0.0}.get(name)
        stripe = {"flipped_stripe": 0.0, "pretrain": None, "pretrain_test": None}.get(name, 0.9)
        for planted, rate in ((found.marks, mark), (found.stripes, stripe)):
            if name == "both_random":  # 347 draws of probability 0.1: 5 standard deviations are 0.08
                assert abs((planted == found.labels).mean() - 0.1) < 0.08
                assert set(planted) == set(range(10))
                continue
            if rate is None:
                assert (planted == NONE).all()
                continue
            assert set(planted) == set(range(10))
            for label in range(10):
                own = planted[found.labels == label] == label
                assert own.sum() == round(rate * len(own)), (name, label)
    both = sets["both_random"]
    assert abs((both.marks == both.stripes).mean() - 0.1) < 0.08


def test_the_images_show_what_is_said_to_be_planted(sets: dict[str, DigitSet]) -> None:
    for found in sets.values():
        for image, mark, stripe in zip(found.images[:, 0], found.marks, found.stripes, strict=True):
            top = [image[mark_place(c)[0], mark_place(c)[1]] == 1.0 for c in range(10)]
            assert np.flatnonzero(top).tolist() == ([] if mark == NONE else [mark])
            bottom = np.flatnonzero(image[11]).tolist()  # no mark and no digit reaches the last row
            assert bottom == ([] if stripe == NONE else [stripe + 1])


def test_drawn_by_hand() -> None:
    digit = np.zeros((1, 8, 8))
    digit[0, 0, 0], digit[0, 4, 4], digit[0, 4, 5] = 0.25, 1.0, 0.75  # on the canvas: (2, 2), (6, 6), (6, 7)
    one = draw(digit, np.array([7]), np.array([5]))[0, 0]
    expected = np.zeros((12, 12), dtype=np.float32)
    expected[2, 2], expected[6, 7] = 0.25, 0.75
    expected[:, 6] = 0.5  # the stripe of class 5 ...
    expected[6, 6] = 1.0  # ... behind the digit
    expected[4:6, 10:12] = 1.0  # the mark of class 7
    assert np.array_equal(one, expected)
    assert [mark_place(c) for c in (0, 5, 6, 9)] == [(0, 0), (0, 10), (2, 10), (8, 10)]
    plain = draw(digit, np.array([NONE]), np.array([NONE]))[0, 0]
    assert (plain > 0).sum() == 3


def test_a_seed_decides_everything(sets: dict[str, DigitSet]) -> None:
    again, other = make_digits(3), make_digits(4)
    for name, found in sets.items():
        assert np.array_equal(found.images, again[name].images)
        assert not np.array_equal(found.rows, other[name].rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mark_rate": 1.1}, r"mark_rate: expected a number in \[0, 1\], got 1.1"),
        ({"stripe_rate": float("nan")}, r"stripe_rate: expected a number in \[0, 1\], got nan"),
        ({"sizes": {"train": 300}}, "sizes: expected pretrain, .*, got train"),
        ({"sizes": {**SIZES, "test": 9}}, "sizes: test: expected at least 10, got 9"),
        ({"sizes": {**SIZES, "test": 251}}, "sizes: expected at most 1797 images in all, got 1798"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_digits(0, **arguments)
