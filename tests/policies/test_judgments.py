"""The arithmetic of judgments: votes, ties, bias of the order and accuracy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from crossfade.decoding.stats import Stats
from crossfade.policies.self_judge import Judgments
from hypothesis import example, given
from hypothesis import strategies as st

NAN = math.nan


def judgments(orders: Any, failed: Any = None) -> Judgments:
    """Judgments with the probabilities ``orders [n, P, 2, 2]``."""
    x = torch.tensor(orders, dtype=torch.float64)
    why = tuple("it failed" if bad else None for bad in failed or [False] * len(x))
    names = tuple(f"p{i}" for i in range(x.shape[1])) if x.shape[1] > 1 else (None,)
    return Judgments(x, names, why, Stats(0, 0.0, (), 0, 0))


def scored(*pairs: tuple[float, float]) -> Any:
    """One pair's orders, by principle, whose scores are s_a and s_b, without bias."""
    return [[[a, b], [b, a]] for a, b in pairs]


def test_both_orders_make_the_scores() -> None:
    found = judgments([[[[0.7, 0.2], [0.5, 0.1]]]])
    assert found.by_principle[0, 0].tolist() == pytest.approx([(0.7 + 0.1) / 2, (0.2 + 0.5) / 2])
    assert found.first.tolist() == pytest.approx([0.4])
    assert found.second.tolist() == pytest.approx([0.35])
    assert found.preference.tolist() == pytest.approx([0.4 / 0.75])


@pytest.mark.parametrize(
    ("scores", "first_wins", "preference"),
    [
        (scored((0.6, 0.3)), True, 2 / 3),
        (scored((0.3, 0.6)), False, 1 / 3),
        (scored((0.4, 0.4)), True, 0.5),  # an exact tie goes to the lower index
        # two narrow votes beat a wide one
        (scored((0.4, 0.3), (0.4, 0.3), (0.0, 0.9)), True, 4 / 7),
        (scored((0.3, 0.4), (0.3, 0.4), (0.9, 0.0)), False, 3 / 7),
        # a tie of votes goes by the mean score
        (scored((0.4, 0.3), (0.1, 0.8)), False, 0.5 / 1.6),
        (scored((0.4, 0.3), (0.3, 0.4)), True, 0.5),
        # principles that tie do not vote
        (scored((0.4, 0.4), (0.3, 0.4), (0.4, 0.4)), False, 3 / 7),
    ],
)
def test_principles_vote(scores: Any, first_wins: bool, preference: float) -> None:
    found = judgments([scores])
    assert found.first_wins.tolist() == [first_wins]
    assert found.preference.tolist() == pytest.approx([preference])
    assert found.winners == ["tie" if preference == 0.5 else "a" if first_wins else "b"]


probability = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.4, 0.5])
orders = st.lists(
    st.tuples(*[st.tuples(probability, probability)] * 2).map(lambda x: [list(y) for y in x]),
    min_size=1,
    max_size=4,
)


# The votes tie, and the mean scores differ by less than the preference can show.
TIED_TO_ROUNDING = [
    [[0.0, 0.0], [0.25, 0.0]],
    [[0.0, 0.25], [0.3, 0.25]],
    [[0.0, 0.3], [0.0, 0.4]],
    [[0.5, 0.25], [0.3, 0.5]],
]


@example(TIED_TO_ROUNDING)
@given(orders)
def test_the_preference_says_who_wins_and_mirrors(one: Any) -> None:
    """A swapped pair has its orders the other way round, with the same numbers."""
    found, turned = judgments([one]), judgments([[each[::-1] for each in one]])
    assert torch.equal(found.by_principle, turned.by_principle.flip(-1))
    p, q = float(found.preference), float(turned.preference)
    assert p + q == pytest.approx(1)
    assert found.first_wins.tolist() == [p >= 0.5]
    if p != 0.5:
        assert turned.first_wins.tolist() == [p < 0.5]


def test_failed_pairs_are_nan_and_count_for_nothing() -> None:
    nothing = [[[NAN, NAN], [NAN, NAN]]]
    found = judgments([scored((0.6, 0.3)), nothing], [False, True])
    assert found.preference.isnan().tolist() == [False, True]
    assert found.first_wins.tolist() == [True, False]
    assert found.accuracy([True, True])[0] == 1.0
    assert found.position_bias == 0.0
    assert "1: failed" in repr(found)
    alone = judgments([nothing], [True])
    assert math.isnan(alone.position_bias)
    assert math.isnan(alone.accuracy([True])[0])
    assert found.winners == ["a", None]
    assert repr(alone) == "Judgments(1 pair, 0 s)\n  0: failed"


def test_the_order_decides_where_one_label_wins_in_both() -> None:
    first = [[[0.6, 0.3], [0.7, 0.2]]]
    second = [[[0.3, 0.6], [0.2, 0.7]]]
    answers = [[[0.3, 0.6], [0.6, 0.3]]]
    even = [[[0.4, 0.4], [0.6, 0.3]]]
    found = judgments([first, first, second, answers, answers, even])
    assert found.position_bias == pytest.approx(3 / 6)
    assert found.toward_first == pytest.approx(2 / 6)
    assert "order alone decides 50.0%" in repr(found)


def test_accuracy_counts_ties_by_half() -> None:
    found = judgments([scored((0.6, 0.3)), scored((0.3, 0.6)), scored((0.4, 0.4))])
    share, interval = found.accuracy([True, True, False])
    assert share == pytest.approx((1 + 0 + 0.5) / 3)
    assert interval == pytest.approx(1.96 * 0.5 / math.sqrt(3))
    assert found.accuracy(torch.tensor([1, 0, 1]))[0] == pytest.approx(2.5 / 3)
    with pytest.raises(ValueError, match=r"first_is_better has the shape \[2\]; it must be \[3\]"):
        found.accuracy([True, False])
    for labels, error, message in (
        ([-1, 1, 1], ValueError, "first_is_better has -1; it must have True or 1"),
        ([1.0, math.nan, 0.0], ValueError, "first_is_better has nan; it must have True or 1"),
        (["a", "b", "a"], TypeError, "first_is_better is .* it must be a bool for each pair"),
        ([True, None, False], TypeError, "first_is_better is .* it must be a bool for each pair"),
    ):
        with pytest.raises(error, match=message):
            found.accuracy(labels)


def test_judgments_print_for_people() -> None:
    text = repr(judgments([scored((0.6, 0.3), (0.2, 0.4))] * 10))
    assert text.splitlines()[0] == "Judgments(10 pairs, order alone decides 0.0%, 0 s)"
    assert "0: a wins, 0.4 to 0.35 (p0: 0.6 to 0.3, p1: 0.2 to 0.4)" in text
    assert text.endswith("... and 2 more")


def test_a_tie_is_printed_as_one() -> None:
    found = judgments([scored((0.4, 0.4)), scored((0.3, 0.4))])
    assert "0: tie, 0.4 to 0.4\n  1: b wins, 0.3 to 0.4" in repr(found)


def test_judgments_have_no_items() -> None:
    found = judgments([scored((0.6, 0.3))])
    with pytest.raises(TypeError, match=r"no item 0: winners\[i\] says which answer of pair i is"):
        found[0]
    with pytest.raises(TypeError, match=r"cannot be iterated over; .* there are winners"):
        list(found)
