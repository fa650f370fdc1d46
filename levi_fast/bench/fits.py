"""How a cost grows with a size: the exponent over large sizes, and a fixed cost with a cost per unit over all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LEAST_SIZES = 3  # with two, a line goes through both and has no error


def growth_fits(sizes: Sequence[float], medians: Sequence[float]) -> dict[str, Any]:
    """Fit times over sizes.

    Args:
        sizes: ascending, above 0; at least two.
        medians: the time at each, any unit, above 0.

    Returns:
        ``exponent`` and its ``exponent_stderr`` (None of two sizes): least squares of log time on log size over
        ``exponent_over``, the upper half of the sizes or the largest three; ``fixed`` and ``per_unit`` of
        ``fixed + per_unit * size`` over all sizes, by least squares of relative errors (else the largest times alone
        would decide); ``linear_fit_worst``, the largest relative error of that line, by which to judge it.

    Raises:
        ValueError: fewer than two sizes, not ascending, or numbers that are not above 0.
    """
    from scipy.stats import linregress

    x, y = np.asarray(sizes, dtype=float), np.asarray(medians, dtype=float)
    if len(x) != len(y) or len(x) < 2 or not (np.diff(x) > 0).all() or x[0] <= 0 or not (y > 0).all():
        raise ValueError(f"expected two or more ascending sizes and times above 0, got {[*sizes]}, {[*medians]}")
    count = min(len(x), max(-(-len(x) // 2), LEAST_SIZES))
    line = linregress(np.log(x[-count:]), np.log(y[-count:]))
    # lstsq on rows divided by the times: their residuals are relative
    design = np.stack([np.ones_like(x), x], axis=1) / y[:, None]
    (fixed, per_unit), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    return {
        "exponent": round(float(line.slope), 4),
        "exponent_stderr": round(float(line.stderr), 4) if count > 2 else None,
        "exponent_over": [float(size) for size in x[-count:]],
        "fixed": float(f"{fixed:.4g}"),
        "per_unit": float(f"{per_unit:.4g}"),
        "linear_fit_worst": round(float(np.abs(design @ (fixed, per_unit) - 1).max()), 3),
    }
