"""Streamed moments against NumPy on stored states, the sketch's error, and intervals' coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from crossfade.dynamics.moments import Moments, interval
from hypothesis import given, settings
from hypothesis import strategies as st


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def streamed(states: torch.Tensor, sizes: list[int], kept: int | None = None) -> Moments:
    moments = Moments(states.shape[1], kept)
    for part in states.split(sizes):
        moments.add(part)
    return moments


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5), st.integers(0, 99))
def test_moments_are_numpys_whatever_the_batches(sizes: list[int], width: int, seed: int) -> None:
    """The mean is far from 0, as it would be for a sum of squares less the square of a sum."""
    n = sum(sizes)
    states = normal(seed, n, width) * torch.arange(1, width + 1) + 1000.0
    got = streamed(states, sizes)
    assert got.n == n
    if n < 2:
        assert got.trace == 0.0
        return
    cov = np.atleast_2d(np.cov(states.numpy(), rowvar=False, bias=True))
    direction = normal(seed + 1, width)
    unit = (direction / direction.norm()).numpy()
    np.testing.assert_allclose(got.mean, states.mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(got.trace, np.trace(cov), rtol=1e-9)
    np.testing.assert_allclose(got.concentration, [np.linalg.eigvalsh(cov)[-1]] * 2, rtol=1e-9)
    np.testing.assert_allclose(got.variance_along(direction), unit @ cov @ unit, rtol=1e-8)
    product = np.square(cov).sum() * n**2
    np.testing.assert_allclose(got.scatter.inner(got.scatter), product, rtol=1e-8)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_a_sketch_says_how_far_off_it_is_at_most(decay: float) -> None:
    """Where states are wider than rows are kept, memory stays bounded and the truth is within."""
    states = normal(0, 200, 24) * (torch.arange(24) + 1.0) ** -decay
    got = streamed(states, [7] * 28 + [4], kept=6)
    cov = np.cov(states.numpy(), rowvar=False, bias=True)
    true = np.linalg.eigvalsh(cov)[-1]
    low, high = got.concentration
    assert len(got.scatter.rows) < 3 * 6
    assert low < high
    assert low <= true <= high
    assert high - low <= np.trace(cov) / 7
    assert got.variance_along(torch.ones(24).double()) >= np.full(24, 1) @ cov @ np.full(24, 1) / 24
    np.testing.assert_allclose(got.trace, np.trace(cov), rtol=1e-12)


@pytest.mark.parametrize(("width", "apart", "n"), [(3, 0.5, 30), (60, 2.0, 20)])
def test_intervals_cover_the_truth(width: int, apart: float, n: int) -> None:
    """95 % of them are to, of 200 up to chance; the plain distance is well above the truth."""
    truth = torch.zeros(width).double()
    truth[0] = apart
    hits, plain = 0, []
    for seed in range(200):
        samples = [
            streamed(normal(2 * seed + k, count, width) + k * truth, [count])
            for k, count in enumerate((n, n + 5))
        ]
        difference = samples[1].mean - samples[0].mean
        low, high = interval(difference, samples)
        hits += low <= apart <= high
        plain.append(float(difference.norm()))
    assert hits >= 181  # 190 are expected, and fewer than 181 by chance once in 400
    assert width < 60 or min(plain) > apart


def test_an_interval_of_pairs_is_that_of_their_differences() -> None:
    """What both responses share is no noise: an interval as of independent ones would be wider."""
    shared, own = 5 * normal(0, 40, 4), normal(1, 40, 4)
    chosen = shared + own + torch.tensor([1.0, 0, 0, 0])
    one, other = (streamed(x, [40]) for x in (chosen, shared))
    differences = streamed(chosen - shared, [40])
    low, high = interval(one.mean - other.mean, [differences])
    assert low < 1.0 < high
    as_independent = interval(one.mean - other.mean, [one, other])
    assert as_independent[1] - as_independent[0] > 2 * (high - low)


def test_one_state_says_nothing_of_its_spread() -> None:
    a, b = (streamed(normal(k, n, 3), [n]) for k, n in ((0, 1), (1, 9)))
    assert interval(a.mean - b.mean, [a, b]) == (0.0, math.inf)


def test_repeats_are_one_draw() -> None:
    """All states as often give the interval of once; a thousand copies of one are one draw."""
    states = normal(0, 12, 5) + 1.0
    once = streamed(states, [12])
    often = streamed(states.repeat(20, 1), [240])
    expected = interval(once.mean, [once])
    assert interval(often.mean, [often], [[20] * 12]) == pytest.approx(expected, rel=1e-9)
    assert interval(once.mean, [once], [[1] * 12]) == pytest.approx(expected, rel=1e-12)
    low, high = interval(often.mean, [often])
    assert high - low < 0.4 * (expected[1] - expected[0])
    same = streamed(states[:1].repeat(9, 1), [9])
    assert interval(same.mean, [same], [[9]]) == (0.0, math.inf)


def test_intervals_cover_the_truth_where_some_are_repeated() -> None:
    """95 % of 200 up to chance; counted as if all were draws, far fewer do."""
    times = torch.tensor([1] * 10 + [2] * 5 + [6] * 5 + [12] * 2)
    truth = torch.full((8,), 0.3).double()
    hits = plain = 0
    for seed in range(200):
        states = (normal(seed, len(times), 8) + truth).repeat_interleave(times, dim=0)
        moments = streamed(states, [len(states)])
        low, high = interval(moments.mean, [moments], [times.tolist()])
        hits += low <= float(truth.norm()) <= high
        low, high = interval(moments.mean, [moments])
        plain += low <= float(truth.norm()) <= high
    assert hits >= 181
    assert plain < 160
