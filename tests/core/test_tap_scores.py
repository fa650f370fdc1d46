"""Scores of layers against closed forms and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levi_fast.selection import data_dependent, resolve_taps
from levi_fast.tap_scores import high_group, linear_cka, most_important, neighbour_importance, pareto_front

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [5, 400])  # by Gram matrices, by cross-products
class TestCka:
    def test_rotation_scale_and_shift_change_nothing(self, rows: int) -> None:
        x = RNG.normal(size=(rows, 8))
        rotation = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
        assert linear_cka(x, x) == pytest.approx(1)
        assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)

    def test_the_other_form(self, rows: int) -> None:
        """Kornblith et al.: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with centred Gram matrices."""
        x, y = RNG.normal(size=(rows, 8)), RNG.normal(size=(rows, 3))
        centre = np.eye(rows) - 1 / rows

        def hsic(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.trace(a @ a.T @ centre @ b @ b.T @ centre))

        assert linear_cka(x, y) == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))
        assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))


def test_cka_of_orthogonal_columns_and_of_a_constant_is_zero() -> None:
    orthogonal = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=float)
    assert linear_cka(orthogonal[:, :1], orthogonal[:, 1:]) == pytest.approx(0)
    assert linear_cka(orthogonal, np.ones((4, 2))) == 0
    with pytest.raises(ValueError, match="as many rows"):
        linear_cka(orthogonal, orthogonal[:3])


def test_the_layer_that_changes_most_is_the_most_important() -> None:
    x, y = RNG.normal(size=(200, 4)), RNG.normal(size=(200, 4))
    importance = neighbour_importance([x, 2 * x, y, -y])
    assert importance[0] is None and importance[1] == pytest.approx(0) and importance[3] == pytest.approx(0)
    assert importance[2] is not None and importance[2] > 0.8
    assert most_important(importance, 1) == [2]
    assert most_important([None, 0.1, 0.9, 0.1], 2) == [2, 3]
    assert most_important(importance, 4) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="k from 1 to 4"):
        most_important(importance, 5)


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=8))
def test_the_high_group_is_that_of_brute_force(values: list[int]) -> None:
    chosen = high_group(values)
    if len(set(values)) == 1:
        assert chosen == list(range(len(values)))
        return

    def cost(high: list[int]) -> float:
        low = [v for place, v in enumerate(values) if place not in high]
        return float(np.var(low) + np.var([values[place] for place in high]))

    best = min(
        cost(list(high))
        for size in range(1, len(values))
        for high in itertools.combinations(range(len(values)), size)
        if min(values[p] for p in high) >= max(v for p, v in enumerate(values) if p not in high)
    )
    assert cost(chosen) == pytest.approx(best)
    assert min(values[place] for place in chosen) >= max(v for p, v in enumerate(values) if p not in chosen)


def test_the_high_group_of_two_clusters() -> None:
    assert high_group([1, 9, 1.1, 8.9, 0.9]) == [1, 3]
    assert high_group([4.0]) == [0]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_pareto_front(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    assert front
    for place, (a, f) in enumerate(points):
        dominated = any(x >= a and y >= f and (x, y) != (a, f) for x, y in points)
        assert (place in front) != dominated


@pytest.mark.parametrize(("layers", "expected"), [(1, [0]), (2, [0]), (6, [1, 2, 3]), (10, [1, 2, 3, 4, 5, 6, 7])])
def test_mid_is_a_fifth_to_four_fifths_of_the_depth(layers: int, expected: list[int]) -> None:
    assert resolve_taps("mid", layers) == expected


def test_selectors_that_need_data_say_so() -> None:
    assert all(map(data_dependent, ("cka:2", "gradnorm", "probe")))
    assert not any(map(data_dependent, ("all", "mid", "even:2", [0], None)))
    with pytest.raises(ValueError, match="'probe' needs data"):
        resolve_taps("probe", 4)
    with pytest.raises(ValueError, match="whole number k"):
        resolve_taps("cka:x", 4)
