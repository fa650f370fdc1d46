"""Tests and calibration against what they must give."""

from __future__ import annotations

import numpy as np
import pytest

from levi_fast.report.statistics import (
    examples_interval,
    examples_p_value,
    expected_calibration_error,
    holm,
    mean_and_sd,
    seeds_p_value,
)


def test_mean_and_sd() -> None:
    assert mean_and_sd([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert mean_and_sd([5.0]) == (5.0, None)


def test_seeds_p_value_is_the_paired_t_tests() -> None:
    # by hand: differences 1, 2, 3: t = 2 / (1 / sqrt(3)) = 3.4641, two degrees of freedom
    assert seeds_p_value([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0742, abs=1e-4)
    assert seeds_p_value([1.0], [2.0]) is None
    assert seeds_p_value([1.0, 2.0], [2.0, 3.0]) is None


def test_examples_are_paired() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(400)  # what the examples have in common is far more than what the methods differ by
    one, other = hard + 0.01 + 0.02 * rng.random(400), hard
    low, high = examples_interval(one, other, root=False)
    assert 0.015 < low < 0.02 < high < 0.025
    assert examples_p_value(one, other) == pytest.approx(1 / 2001, rel=1.1)
    low, high = examples_interval(one**2, other**2, root=True)
    assert low < float(np.sqrt((one**2).mean()) - np.sqrt((other**2).mean())) < high


def test_no_difference_is_found_where_there_is_none() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 2, 500).astype(float), rng.integers(0, 2, 500).astype(float)
    found = examples_p_value(one, other)
    assert found is not None and found > 0.05
    assert examples_p_value(one, one) is None


def test_holm() -> None:
    pytest.importorskip("statsmodels")
    assert holm([0.01, None, 0.04, 0.03]) == [pytest.approx(0.03), None, pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([None]) == [None]


def test_expected_calibration_error() -> None:
    # confidence 0.75 on four rows of which two are right: a gap of 0.25
    logits = np.log(np.array([[0.75, 0.25]] * 4))
    assert expected_calibration_error(logits, np.array([0, 0, 1, 1])) == pytest.approx(0.25)
    assert expected_calibration_error(logits, np.array([0, 0, 0, 1])) == pytest.approx(0.0, abs=1e-12)
    mixed = np.log(np.array([[0.75, 0.25]] * 4 + [[0.1, 0.9]] * 4))
    assert expected_calibration_error(mixed, np.array([0, 0, 1, 1, 1, 1, 1, 1])) == pytest.approx((0.25 + 0.1) / 2)
