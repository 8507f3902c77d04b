"""Who plays whom in a tournament, and who is placed where."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from crossfade.decoding.output import Match, Played
from crossfade.decoding.search.bracket import Bracket, mean_probs, shuffled
from scipy.stats import chisquare

SIZES = range(1, 18)


def by_rank(order: list[int], rank: list[int]) -> Played:
    """A tournament in which the slot of the lower rank wins every match."""
    bracket = Bracket(order)
    while not bracket.over:
        bracket.play([float(rank[a] < rank[b]) for a, b in bracket.pairs])
    return bracket.played()


def gone_in(played: Played) -> dict[int, int]:
    """The round in which each slot lost; the number of rounds for the winner."""
    found = {played.order[0]: len(played.rounds)}
    for i, matches in enumerate(played.rounds):
        for a, b, _, winner in matches:
            if b is not None:
                found[b if winner == a else a] = i
    return found


@pytest.mark.parametrize("n", SIZES)
def test_the_best_wins_whatever_the_order(n: int) -> None:
    for seed in range(60):
        rank = shuffled(n, seed, 1)
        played = by_rank(shuffled(n, seed, 0), rank)
        assert rank[played.order[0]] == 0
        assert sorted(played.order) == list(range(n))
        matches = [m for r in played.rounds for m in r if m.b is not None]
        assert len(matches) == n - 1
        assert len(played.rounds) == math.ceil(math.log2(n))
        for a, b, prob, winner in matches:
            assert winner == (a if prob == 1 else b)


@pytest.mark.parametrize("n", SIZES)
def test_who_goes_later_is_placed_higher_and_then_who_lost_to_the_better(n: int) -> None:
    for seed in range(30):
        played = by_rank(shuffled(n, seed, 0), shuffled(n, seed, 1))
        gone = gone_in(played)
        beaten = {
            (m.b if m.winner == m.a else m.a): m.winner
            for r in played.rounds
            for m in r
            if m.b is not None
        }
        place = {s: i for i, s in enumerate(played.order)}
        for x, y in itertools.pairwise(played.order):
            assert gone[x] >= gone[y]
            if gone[x] == gone[y]:
                assert place[beaten[x]] < place[beaten[y]]


@pytest.mark.parametrize("n", SIZES)
def test_a_match_has_the_earlier_one_first_and_byes_go_round(n: int) -> None:
    for seed in range(30):
        order = shuffled(n, seed, 0)
        at = {s: i for i, s in enumerate(order)}
        played = by_rank(order, shuffled(n, seed, 1))
        byes: Counter[int] = Counter()
        for matches in played.rounds:
            here = {s for m in matches for s in (m.a, m.b) if s is not None}
            for m in matches:
                assert m.b is None or at[m.a] < at[m.b]
            resting = [m for m in matches if m.b is None]
            assert len(resting) == len(here) % 2
            for m in resting:
                fewest = min(byes[s] for s in here)
                assert m.a == max((s for s in here if byes[s] == fewest), key=at.__getitem__)
                assert math.isnan(m.prob)
                assert m.winner == m.a
                byes[m.a] += 1


def test_five_rows() -> None:
    bracket = Bracket([3, 0, 4, 2, 1])
    assert bracket.pairs == [(3, 0), (4, 2)]
    bracket.play([0.5, float("nan")])  # The lower slot wins both.
    assert bracket.left == [0, 2, 1]
    assert bracket.pairs == [(0, 1)], "1 had a bye, so that 2 has one now"
    bracket.play([0.2])
    bracket.play([0.7])
    played = bracket.played()
    assert played.order == [2, 1, 0, 4, 3]
    assert played.rounds[0][:1] == [Match(3, 0, 0.5, 0)]
    assert played.rounds[2] == [Match(2, 1, 0.7, 2)]
    means = mean_probs(played)
    assert means[:2] == [pytest.approx((0.5 + 0.2) / 2), pytest.approx((0.8 + 0.3) / 2)]
    assert means[2] == pytest.approx(0.7), "NaN and a bye do not count"
    assert means[3] == 0.5
    assert math.isnan(means[4])


def test_orders_are_equally_likely() -> None:
    """Chi-square of all orders of four, and of the places of seventeen; the seeds are fixed."""
    orders = Counter(tuple(shuffled(4, seed, seed % 7)) for seed in range(4800))
    assert chisquare([orders[o] for o in itertools.permutations(range(4))]).pvalue > 0.01
    counts = Counter(at for seed in range(3400) for at in enumerate(shuffled(17, 5, seed)))
    # The counts of a row and of a column have fixed sums: 16 * 16 degrees of freedom are free.
    assert (
        chisquare([counts[i, s] for i in range(17) for s in range(17)], ddof=2 * 16).pvalue > 0.01
    )


def test_an_order_depends_on_seed_and_stream_alone() -> None:
    before = random.getstate()
    known = [shuffled(9, seed, stream) for seed in (0, 1, -1) for stream in (0, 1, 2**40)]
    assert random.getstate() == before, "the caller's generator is left alone"
    assert len({*map(tuple, known)}) == 9
    assert known[0] == [3, 6, 5, 0, 4, 7, 8, 1, 2], "in every version of Python"
