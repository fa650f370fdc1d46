"""Is one method better than another? Paired tests over seeds and over examples; calibration."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
CALIBRATION_BINS = 15


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation with n - 1 (None for one value)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def seeds_p_value(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Two-sided paired t-test over seeds; None for fewer than two, or where all differences are the same."""
    from scipy.stats import ttest_rel

    difference = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    if len(difference) < 2 or np.ptp(difference) == 0:
        return None
    return float(ttest_rel(one, other).pvalue)


def examples_interval(one: np.ndarray, other: np.ndarray, *, root: bool, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval, over examples, of the difference between two methods' mean losses.

    Args:
        one, other: losses of the same examples, ``[N]``.
        root: take the root of each mean first, as RMSE does.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    differences = np.empty(RESAMPLES)
    for place in range(RESAMPLES):
        rows = rng.integers(0, len(one), len(one))
        a, b = one[rows].mean(), other[rows].mean()
        differences[place] = np.sqrt(a) - np.sqrt(b) if root else a - b
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(differences, [tail, 100 - tail])
    return float(low), float(high)


def examples_p_value(one: np.ndarray, other: np.ndarray, seed: int = 0) -> float | None:
    """Two-sided paired permutation test over examples: each difference may as well have the other sign.

    Returns:
        None where no example differs; at least ``1 / (RESAMPLES + 1)``.
    """
    from scipy.stats import permutation_test

    difference = one - other
    difference = difference[difference != 0]  # the others change no permuted mean
    if len(difference) == 0:
        return None
    result = permutation_test(
        (difference,),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's correction for several comparisons; None, where there was no test, stays and does not count."""
    from statsmodels.stats.multitest import multipletests

    tested = [p for p in p_values if p is not None]
    if not tested:
        return list(p_values)
    corrected = iter(multipletests(tested, method="holm")[1])
    return [None if p is None else float(next(corrected)) for p in p_values]


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray) -> float:
    """ECE of Guo et al. (ICML 2017, equation 3): mean gap of confidence and accuracy over 15 bins of equal width.

    Args:
        logits: ``[N, C]``.
        labels: int ``[N]``.
    """
    confidence, right = _confidences(logits, labels)
    # bins are (m/15, (m + 1)/15], as in the paper
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    gap = np.bincount(place, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / count.sum())


def _confidences(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = logits.astype(np.float64)
    exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities.max(axis=1), (probabilities.argmax(axis=1) == labels).astype(np.float64)


def require_report_libraries() -> Any:
    """Import what tests and charts need.

    Raises:
        ImportError: naming the extra to install.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import matplotlib
            import statsmodels.stats.multitest
    except ImportError as error:
        raise ImportError(f"levi-fast compare needs {error.name}: pip install levi_fast[compare]") from error
    return matplotlib, statsmodels
