"""Scores of layers and rules that pick some of them: plain functions of arrays, without a model or a data set."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two representations of the same examples (Kornblith et al. 2019, eq. 3).

    Args:
        x, y: ``[N, D_x]`` and ``[N, D_y]``; columns are centred here.

    Returns:
        from 0 to 1, and 1 for representations that differ by a rotation and a scale; 0 where one is constant.

    Raises:
        ValueError: another number of rows, or fewer than two.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(f"expected two matrices of as many rows, at least 2, got {x.shape} and {y.shape}")
    x, y = (one.astype(np.float64) - one.mean(axis=0, dtype=np.float64) for one in (x, y))
    if len(x) < x.shape[1] + y.shape[1]:  # the Gram matrices are smaller than the cross-products, and say the same
        gram_x, gram_y = x @ x.T, y @ y.T
        shared, own = np.vdot(gram_x, gram_y), np.linalg.norm(gram_x) * np.linalg.norm(gram_y)
    else:
        shared, own = np.linalg.norm(x.T @ y) ** 2, np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(shared / own) if own > 0 else 0.0


def neighbour_importance(layers: Sequence[np.ndarray]) -> list[float | None]:
    """``1 - CKA`` of every layer with the one before: how much it changes the representation (Ogawa et al.,
    Layer-wise LoRA). The first has none before it, and None.

    Args:
        layers: ``[N, D_l]`` each, in the order of depth.
    """
    changes = [1.0 - linear_cka(before, here) for before, here in itertools.pairwise(layers)]
    return [None, *changes]


def most_important(importance: Sequence[float | None], k: int) -> list[int]:
    """Places of the k largest values, ascending; None comes last, and of equal ones the deeper goes first.

    Raises:
        ValueError: k outside 1 to their number.
    """
    if not 1 <= k <= len(importance):
        raise ValueError(f"taps: cka:k needs k from 1 to {len(importance)}, the number of layers; got {k}")
    order = sorted(
        range(len(importance)), key=lambda i: (-1.0 if (one := importance[i]) is None else one, i), reverse=True
    )
    return sorted(order[:k])


def high_group(values: Sequence[float]) -> list[int]:
    """Places of the high group where two groups, split by a threshold, have the least sum of variances (Liu & Litman,
    IR-Tuning): it also says how many there are. All of them where all values are equal, or there is one alone.
    """
    order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
    ascending = np.asarray(values, dtype=np.float64)[order]
    if len(ascending) < 2 or ascending[0] == ascending[-1]:
        return list(range(len(ascending)))
    costs = [ascending[:cut].var() + ascending[cut:].var() for cut in range(1, len(ascending))]
    cut = 1 + int(np.argmin(costs))
    return sorted(int(place) for place in order[cut:])


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other dominates: at least as high everywhere, and higher somewhere.

    Ahad et al., LAET, keep such layers by accuracy and F1. Of equal points all are kept.
    """
    found = np.asarray(points, dtype=np.float64)
    at_least = (found[:, None] >= found[None]).all(axis=2)
    above = (found[:, None] > found[None]).any(axis=2)
    return [int(place) for place in np.flatnonzero(~(at_least & above).any(axis=0))]
