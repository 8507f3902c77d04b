"""How many tokens are guessed at a time: pure arithmetic."""

from __future__ import annotations

import itertools

import pytest
from crossfade import drafts
from crossfade.decoding.speculation.pace import (
    CHANCE,
    FIRST,
    KEPT,
    MODEL_CHANCE,
    SELDOM,
    SIZES,
    SOON,
    WORTH,
    Chances,
    Costs,
    Hope,
    best_size,
)


def measured(seconds: dict[int, float], rows: int = 1) -> Costs:
    costs = Costs("cpu", rows)
    for size, each in seconds.items():
        for _ in range(FIRST + 1):
            costs.measured(size, each)
    return costs


def test_costs_are_medians_of_the_last_rounds() -> None:
    costs = Costs("cpu", 1)
    for _ in range(FIRST):
        costs.measured(1, 100.0)  # what runs them is being prepared
    assert costs.of(1) == 1.0
    for seconds in (1.0, 2.0, 9.0):
        costs.measured(1, seconds)
    assert costs.of(1) == 2.0
    for _ in range(KEPT):
        costs.measured(1, 5.0)
    assert costs.of(1) == 5.0


def test_costs_of_sizes_that_were_not_measured() -> None:
    free = Costs("cpu", 2)
    assert [free.of(n) for n in (1, 2, 11)] == pytest.approx([1.0, 1.1, 2.0])
    assert Costs("cuda", 2).of(11) < free.of(11)
    assert Costs("mps", 2).of(11) == Costs("cuda", 2).of(11)
    of_others = measured({1: 2.0, 4: 3.2})  # A token more takes 0.2 of a step.
    assert of_others.of(2) == pytest.approx(2.4)
    assert of_others.of(16) == pytest.approx(8.0)
    no_plain = measured({4: 2.3}, rows=1)
    assert no_plain.of(1) == pytest.approx(2.0)
    cheaper = measured({1: 2.0, 4: 1.0})  # As noise may have it; a token costs nothing then.
    assert cheaper.of(8) == pytest.approx(2.0)


def test_sure_guesses_are_made_by_the_dozen_and_hopeless_ones_not_at_all() -> None:
    costs = measured({1: 1.0, 16: 1.75})
    sure, hopeless = [float(i) for i in range(16)], [0.0] * 16
    assert best_size([sure], costs) == SIZES[-1]
    assert best_size([hopeless], costs) == 1
    dear = measured({1: 1.0, 16: 1.75})
    dear.guesses.append(2.0)
    assert best_size([sure], dear) == 1, "guesses cost more than they yield"
    assert best_size([[0.0]], costs) == 1, "nothing to guess"
    assert best_size([sure[:4]], costs) == 4, "no longer than there are guesses"
    assert best_size([], costs) == 1


def test_a_row_that_is_sure_must_carry_the_others() -> None:
    sure, hopeless = [float(i) for i in range(16)], [0.0] * 16
    costs = measured({1: 1.0, 2: 1.2}, rows=4)
    for others in (1, 10, 100):
        size = best_size([sure, *[hopeless] * others], costs)
        drawn = 1 + others + sure[size - 1]
        each = [(1 + others + sure[n - 1]) / costs.of(n) for n in (1, *SIZES)]
        assert drawn / costs.of(size) == pytest.approx(max(each))
    assert best_size([sure, *[hopeless] * 100], costs) == 1


def test_where_no_row_takes_the_place_of_another_the_last_one_counts() -> None:
    sure, hopeless = [float(i) for i in range(16)], [0.0] * 16
    costs = measured({1: 1.0, 2: 1.2, 8: 2.0}, rows=4)
    assert best_size([sure, sure, hopeless], costs) > 1
    assert best_size([sure, sure, hopeless], costs, [50, 50, 50]) == 1
    assert best_size([sure, sure, hopeless], costs, [50, 50, 6]) == 8, "it ends in time"
    assert best_size([sure], costs, [50]) == best_size([sure], costs)


def test_guesses_that_hardly_pay_are_not_made() -> None:
    costs = measured({1: 1.0, 2: 1.0})
    assert best_size([[0.0, WORTH - 1.01]], costs) == 1
    assert best_size([[0.0, WORTH - 0.99]], costs) == 2


def test_chances_are_learnt_by_kind() -> None:
    chances = Chances()
    assert [chances.of(n) for n in range(9)] == pytest.approx(CHANCE)
    assert chances.of(100) == chances.of(8)
    assert chances.expected(3, 0) == [0.0]
    first, second = CHANCE[3], CHANCE[3] * CHANCE[4]
    assert chances.expected(3, 2) == pytest.approx([0.0, first, first + second])
    for _ in range(200):
        chances.learn(2, hit=False)
        chances.learn(50, hit=True)
    assert chances.of(2) < 0.01
    assert chances.of(8) > 0.99
    assert chances.of(3) == pytest.approx(CHANCE[3])
    for _ in range(60):  # What was long ago counts little.
        chances.learn(2, hit=True)
    assert chances.of(2) > 0.5


def rounds(hope: Hope, costs: Costs, hit: float, steps: int) -> list[int]:
    """How many guesses each of some steps makes, of which the first ones are right that often."""
    found, owed = [], 0.0
    for _ in range(steps):
        count = hope.tries(best_size([hope.expected(63)], costs) - 1)
        found.append(count)
        if count:
            costs.guesses.append(0.1)
            owed += hit
            right = count if owed >= 1 else 0
            owed -= owed >= 1
            hope.learn(right, min(right + 1, count))
    return found


def test_a_draft_that_never_hits_ends_in_plain_steps() -> None:
    hope, costs = Hope(), measured({1: 1.0, 16: 1.75})
    assert hope.expected(2) == pytest.approx([0.0, MODEL_CHANCE, MODEL_CHANCE + MODEL_CHANCE**2])
    counts = rounds(hope, costs, hit=0.0, steps=3000)
    tried = [i for i, n in enumerate(counts) if n]
    assert counts[0] > 0
    rest = [i for i in tried if i > 60]
    assert all(counts[i] == 1 for i in rest), "a try is one guess"
    gaps = [b - a for a, b in itertools.pairwise(rest)]
    assert gaps == sorted(gaps)
    assert gaps[0] > SOON
    assert gaps[-1] == SELDOM


def test_a_rest_is_tried_again_and_may_end() -> None:
    hope, costs = Hope(), measured({1: 1.0, 16: 1.75})
    rounds(hope, costs, hit=0.0, steps=200)
    assert hope.patience > SOON
    counts = rounds(hope, costs, hit=1.0, steps=8000)
    assert sum(n > 0 for n in counts[-100:]) == 100
    assert hope.patience == SOON


def test_a_good_draft_never_rests() -> None:
    hope, costs = Hope(), measured({1: 1.0, 16: 1.75})
    counts = rounds(hope, costs, hit=1.0, steps=100)
    assert min(counts) > 0
    assert counts[-1] == SIZES[-1] - 1
    assert len(hope.expected(1000)) == SIZES[-1]


def test_a_draft_that_takes_longer_than_it_saves_rests() -> None:
    hope, costs = Hope(), measured({1: 1.0, 16: 1.75})
    for _ in range(KEPT):
        costs.guesses.append(3.0)
    assert costs.guess == 3.0
    assert best_size([hope.expected(15)], costs) == 1


def test_what_a_draft_is_worth() -> None:
    assert drafts.speedup(0.0, 4) == 1.0
    assert drafts.speedup(1.0, 4) == 5.0
    assert drafts.speedup(0.6, 4, check=1.2) == pytest.approx(3.4 / 1.2)
    for length, check, guess in ((1, 1.1, 0.0), (4, 2.0, 0.3), (7, 1.0, 0.9)):
        needed = drafts.acceptance_needed(length, check, guess)
        assert drafts.speedup(needed, length, check, guess) == pytest.approx(1.0)
    assert drafts.acceptance_needed(1, check=1.5, guess=0.7) > 1, "it never is worth it"
