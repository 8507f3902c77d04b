"""Figures about texts, against numbers worked out by hand and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from crossfade import metrics


def test_sentiment_has_the_signs_that_a_reward_needs() -> None:
    good, bad, plain = metrics.sentiment(
        [
            "A wonderful, brilliant film. I loved it!",
            "Awful and boring. I hated it.",
            "It is a film.",
        ]
    )
    assert good > 0.7
    assert bad < -0.6
    assert plain == 0.0


def test_sentiment_of_nothing_is_nothing() -> None:
    assert metrics.sentiment([]) == []


def test_distinct_counts_word_pairs_over_all_texts() -> None:
    # a b, b a, a b | a b: two different pairs of four; case and spacing do not count
    assert metrics.distinct_n(["a b  a B", "A b"], 2) == 0.5
    assert metrics.distinct_n(["a a a"], 1) == pytest.approx(1 / 3)


def test_distinct_does_not_join_texts() -> None:
    assert metrics.distinct_n(["a b", "c d"], 2) == 1.0
    assert math.isnan(metrics.distinct_n(["a", "", "b"], 2))


def test_distinct_refuses_empty_grams() -> None:
    with pytest.raises(ValueError, match="n is 0"):
        metrics.distinct_n(["a"], 0)


def test_mean_interval_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 50)
    mean, half = metrics.mean_interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert half == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(50))


def test_mean_interval_of_one_and_of_none() -> None:
    mean, half = metrics.mean_interval([2.0])
    assert mean == 2.0
    assert math.isnan(half)
    with pytest.raises(ValueError, match="values is empty"):
        metrics.mean_interval([])


def test_perplexity_of_a_uniform_choice_is_its_size() -> None:
    assert metrics.perplexity(3 * math.log(1 / 8), 3) == pytest.approx(8.0)
    assert math.isnan(metrics.perplexity(0.0, 0))


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    assert metrics.perplexity(-2000.0, 2) == math.inf
    assert metrics.perplexity_interval([-2000.0, -1000.0], [2, 2])[0] > 1e300
    assert metrics.perplexity_interval([-2000.0, -2000.0], [2, 2])[0] == math.inf


def test_the_interval_of_a_perplexity_is_that_of_many_draws() -> None:
    """About 95 of 100 intervals hold the perplexity of endless texts, of lengths that matter."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(3, 40, (400, 64))
    logprobs = -sizes * (1.5 + 20 / sizes**1.5 * rng.random(sizes.shape))
    endless = math.exp(-logprobs.sum() / sizes.sum())
    held = 0
    for p, n in zip(logprobs.tolist(), sizes.tolist(), strict=True):
        found, half = metrics.perplexity_interval(p, n)
        assert found == pytest.approx(metrics.perplexity(sum(p), sum(n)))
        held += abs(found - endless) <= half
    assert 0.91 < held / 400 < 0.98


def test_the_interval_of_a_perplexity_by_hand() -> None:
    # log-probs a token: -2 and -4 of one token each, so the mean is -3, and its deviation is 1
    found, half = metrics.perplexity_interval([-2.0, -4.0], [1, 1])
    assert found == pytest.approx(math.exp(3))
    assert half == pytest.approx(1.96 * math.exp(3))
    assert metrics.perplexity_interval([-2.0, -2.0], [1, 1])[1] == 0


def test_the_interval_of_a_perplexity_of_one_and_of_none() -> None:
    found, half = metrics.perplexity_interval([-2.0], [2])
    assert found == pytest.approx(math.e)
    assert math.isnan(half)
    assert all(map(math.isnan, metrics.perplexity_interval([0.0, 0.0], [0, 0])))
    with pytest.raises(ValueError, match="tokens are of 1 texts; logprobs are of 2"):
        metrics.perplexity_interval([0.0, 0.0], [1])
