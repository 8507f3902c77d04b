"""Hypervolume against a count of cells, steerability against SciPy, fronts by their definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade.pareto import front, hypervolume, non_dominated, spearman, steerability
from hypothesis import given, settings
from hypothesis import strategies as st

SIDE = {1: 9, 2: 7, 3: 5, 4: 3}  # of the grids, so that the cells can be counted


@st.composite
def grids(draw: Any) -> tuple[list[list[int]], list[int]]:
    """Points on a grid, some below the reference, some equal, and the reference."""
    d = draw(st.integers(1, 4))
    row = st.lists(st.integers(-1, SIDE[d]), min_size=d, max_size=d)
    return draw(st.lists(row, max_size=7)), draw(
        st.lists(st.integers(0, 1), min_size=d, max_size=d)
    )


def counted(points: list[list[int]], reference: list[int]) -> int:
    """How many cells of the grid lie above the reference and below some point."""
    d = len(reference)
    return sum(
        any(all(r <= c < x for c, x, r in zip(cell, p, reference, strict=True)) for p in points)
        for cell in itertools.product(range(SIDE[d]), repeat=d)
    )


@settings(max_examples=100, deadline=None)
@given(grids())
def test_hypervolume_is_the_number_of_cells_of_a_grid(case: tuple[Any, Any]) -> None:
    points, reference = case
    assert hypervolume(points, reference) == pytest.approx(counted(points, reference), abs=1e-9)


def test_a_point_on_the_reference_counts_nothing() -> None:
    assert hypervolume([[1.0, 5.0], [5.0, 1.0]], [1.0, 1.0]) == 0
    assert hypervolume([[5.0, 0.5]], [1.0, 1.0]) == 0
    assert hypervolume([], [1.0, 1.0]) == 0
    assert hypervolume([[2.0, 3.0], [5.0, 0.5]], [1.0, 1.0]) == 2


def test_many_points_of_four_rewards_are_measured() -> None:
    """Those of a simplex, none of which dominates another."""
    each = [w for w in itertools.product(range(6), repeat=4) if sum(w) == 5]
    points = [[x + 1 for x in w] for w in each]
    cells = itertools.product(range(6), repeat=4)
    expected = sum(
        any(all(c < x for c, x in zip(cell, p, strict=True)) for p in points) for cell in cells
    )
    assert hypervolume(points, [0] * 4) == pytest.approx(expected)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list])
def test_arrays_and_tensors_are_points(kind: Any) -> None:
    assert hypervolume(kind([[2.0, 3.0], [3.0, 2.0]]), kind([1.0, 1.0])) == 3
    assert non_dominated(kind([[2.0, 3.0], [1.0, 3.0]])).tolist() == [True, False]


@settings(max_examples=100, deadline=None)
@given(grids())
def test_the_front_has_what_nothing_dominates(case: tuple[Any, Any]) -> None:
    points, reference = case
    kept = [
        not any(q != p and all(a >= b for a, b in zip(q, p, strict=True)) for q in points)
        for p in points
    ]
    assert non_dominated(points).tolist() == kept
    best = front(points).tolist()
    expected = {tuple(map(float, p)) for p, stays in zip(points, kept, strict=True) if stays}
    assert best == [[*p] for p in sorted(expected, reverse=True)]
    assert hypervolume(best, reference) == pytest.approx(hypervolume(points, reference))


def test_of_equal_points_all_or_none_are_dominated() -> None:
    points = [[1.0, 2.0], [1.0, 2.0], [0.0, 3.0], [0.0, 2.0], [1.0, 1.0]]
    assert non_dominated(points).tolist() == [True, True, True, False, False]
    assert front(points).tolist() == [[1.0, 2.0], [0.0, 3.0]]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_spearman_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = map(list, zip(*pairs, strict=True))
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert spearman(x, y) == 0
    else:
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_steerability_is_the_mean_of_the_objectives() -> None:
    weights = [[0.0, 1.0], [0.25, 0.75], [0.5, 0.5], [1.0, 0.0]]
    rewards = [[0.1, 4.0], [0.3, 4.0], [0.2, 3.0], [0.9, 3.5]]
    by_hand = (0.8 + spearman([4, 3, 2, 1], [4, 4, 3, 3.5])) / 2
    assert steerability(weights, rewards) == pytest.approx(by_hand)
    constant = [[x, 2.0] for x, _ in rewards]
    assert steerability(weights, constant) == pytest.approx(0.4)  # the second is not steered
    assert steerability(weights[:1], rewards[:1]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hypervolume([[1.0, math.nan]], [0, 0]), r"points\[0\]\[1\] is nan; .* finite"),
        (lambda: hypervolume([[1.0, math.inf]], [0, 0]), r"points\[0\]\[1\] is inf"),
        (lambda: hypervolume([[1.0]], [0, 0]), r"points\[0\] has 1 numbers; it must have 2"),
        (lambda: hypervolume([[1, 2]], [0, math.nan]), r"reference\[1\] is nan"),
        (lambda: hypervolume([[1, 2]], []), "reference is empty"),
        (lambda: hypervolume([[1, 2]], 0.0), r"reference is 0.0; it must be a list of numbers"),
        (lambda: hypervolume([1, 2], [0, 0]), r"points\[0\] is 1; it must be a list of numbers"),
        (lambda: hypervolume("ab", [0, 0]), "points is 'ab'; it must be a list of rows"),
        (lambda: front([[1, 2], [1]]), r"points\[1\] has 1 numbers; it must have 2"),
        (lambda: spearman([1, 2], [1]), "y has 1 numbers; it must have 2, as x"),
        (lambda: steerability([[1, 0]], [[1]]), r"rewards are \[1, 1\]; they must be \[1, 2\]"),
        (lambda: steerability([[True, 0]], [[1, 1]]), r"weights\[0\]\[0\] is True"),
    ],
)
def test_what_cannot_be_measured_is_named(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_the_module_is_imported_at_its_first_use() -> None:
    assert cf.pareto.hypervolume is hypervolume
    assert "pareto" in dir(cf)
