"""Fits recover what made the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from levi_fast.bench.fits import growth_fits

SIZES = [1, 4, 16, 64, 256, 1024, 4096]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(exponent: float) -> None:
    found = growth_fits(SIZES, [3.0 * size**exponent for size in SIZES])
    assert found["exponent"] == pytest.approx(exponent, abs=1e-3)
    assert found["exponent_stderr"] == pytest.approx(0.0, abs=1e-3)
    assert found["exponent_over"] == [64, 256, 1024, 4096]


def test_small_sizes_have_no_part_in_the_exponent() -> None:
    """Below 64 the cost does not grow at all: over all sizes the exponent would be far below 1."""
    assert growth_fits(SIZES, [max(64.0, size) for size in SIZES])["exponent"] == pytest.approx(1.0, abs=1e-3)


def test_the_standard_error_is_that_of_the_noise() -> None:
    """The exponent is within four standard errors of the truth, and the errors are about as large as it is off."""
    rng = np.random.default_rng(0)
    sizes = [2**power for power in range(12)]
    off, errors = [], []
    for _ in range(200):
        times = [size**0.8 * np.exp(rng.normal(0, 0.05)) for size in sizes]
        found = growth_fits(sizes, times)
        off.append(found["exponent"] - 0.8)
        errors.append(found["exponent_stderr"])
    assert np.std(off) == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=0.25)


def test_fixed_cost_and_cost_per_unit() -> None:
    found = growth_fits(SIZES, [50.0 + 0.25 * size for size in SIZES])
    assert (found["fixed"], found["per_unit"]) == pytest.approx((50.0, 0.25), rel=1e-3)
    assert found["linear_fit_worst"] == pytest.approx(0.0, abs=1e-3)
    assert growth_fits(SIZES, [float(size) ** 2 for size in SIZES])["linear_fit_worst"] > 0.3


def test_two_sizes_have_no_standard_error() -> None:
    found = growth_fits([10, 100], [1.0, 10.0])
    assert found["exponent"] == pytest.approx(1.0) and found["exponent_stderr"] is None


@pytest.mark.parametrize(
    ("sizes", "times"),
    [([1], [1.0]), ([2, 1], [1.0, 2.0]), ([1, 2], [1.0, 0.0]), ([0, 2], [1.0, 1.0]), ([1, 2], [1.0])],
)
def test_what_cannot_be_fitted_is_named(sizes: list[float], times: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending sizes and times above 0"):
        growth_fits(sizes, times)
