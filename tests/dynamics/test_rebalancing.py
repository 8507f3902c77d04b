"""Rows that even out how fast behaviours are learnt."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import pytest
import torch
from crossfade import dynamics
from hypothesis import given, settings
from hypothesis import strategies as st
from statements import apart, pairs

FAR, NEAR = apart("film", [4.0, 0.0]), apart("plot", [0.0, 2.0])
STATS = {"film": FAR, "plot": NEAR}


def counts(rows: Any) -> Counter[str]:
    return Counter(rows["behaviour"])


def test_shares_are_as_the_inverse_square_of_distinguishability() -> None:
    assert dynamics.shares(STATS) == pytest.approx({"film": 0.2, "plot": 0.8})
    assert dynamics.shares(STATS, power=1) == pytest.approx({"film": 1 / 3, "plot": 2 / 3})
    assert dynamics.shares(STATS, power=0) == {"film": 0.5, "plot": 0.5}
    for wrong, says in (({}, "stats has no behaviour"), ({"a": apart("a", [0.0])}, "stats has no")):
        with pytest.raises(ValueError, match=says):
            dynamics.shares(wrong)
    with pytest.raises(ValueError, match=r"power is -1; it must be 0 or more"):
        dynamics.shares(STATS, power=-1)


def test_rebalanced_rows_are_the_given_ones_by_their_shares() -> None:
    rows = pairs(each=20)
    found = dynamics.rebalanced(rows, STATS, seed=3)
    assert counts(found) == {"film": 8, "plot": 32}
    plot = Counter(r["prompt"] for r in found if r["behaviour"] == "plot")
    assert set(plot.values()) == {1, 2}  # all of them are there, as evenly as can be
    assert all(row in rows for row in found)
    assert [*found] == [*dynamics.rebalanced(datasets.Dataset.from_list(rows), STATS, seed=3)]
    assert [*found] != [*dynamics.rebalanced(rows, STATS, seed=4)]
    assert found["behaviour"] != sorted(found["behaviour"])  # they are mixed


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 9), st.floats(0, 9))),
    st.integers(1, 4),
)
def test_there_are_as_many_rows_as_before(of: dict[str, tuple[int, float]], most: int) -> None:
    """However unlike behaviours are, and no row is there more than `most` times."""
    if not any(d for _, d in of.values()):
        return
    rows = [{"behaviour": b, "at": i} for b, (n, _) in of.items() for i in range(n)]
    stats = {b: apart(b, [d]) for b, (_, d) in of.items()}
    found = dynamics.rebalanced(rows, stats, most=most)
    assert len(found) == len(rows)
    each = Counter((r["behaviour"], r["at"]) for r in found)
    assert max(each.values()) <= most


def test_rows_that_no_statistics_are_of_stay() -> None:
    rows = [*pairs(each=10), {**pairs()[0], "behaviour": None}, {**pairs()[1], "behaviour": "cast"}]
    with pytest.warns(UserWarning, match="stay as they are") as warned:
        found = dynamics.rebalanced(rows, STATS)
    assert [str(w.message) for w in warned] == [
        "there is no 'behaviour' for 1 rows, the first is row 20; they stay as they are",
        "stats has no 'cast' for 1 rows, the first is row 21; they stay as they are",
    ]
    assert counts(found) == {"film": 4, "plot": 16, None: 1, "cast": 1}


def test_what_is_no_list_of_rows() -> None:
    with pytest.raises(TypeError, match="rows is a dict; it must be a datasets"):
        dynamics.rebalanced({}, STATS)
    with pytest.raises(ValueError, match="most is 0"):
        dynamics.rebalanced(pairs(), STATS, most=0)


def losses(behaviours: list[torch.Tensor], places: list[int], rate: float) -> list[float]:
    """The area under each behaviour's DPO loss, as a head alone learns rows in this order.

    A row is a state whose answer is yes; a margin of 0 is the reference's.
    """
    head, area = torch.zeros(len(behaviours[0][0])).double(), [0.0] * len(behaviours)
    for k, b in enumerate(places):
        x = behaviours[b][k % len(behaviours[b])]
        head += rate * torch.sigmoid(-head @ x) * x
        for i, states in enumerate(behaviours):
            area[i] += float(torch.nn.functional.softplus(-(states @ head)).mean())
    return area


def test_learning_is_evened_out() -> None:
    """Three behaviours at distances 4, 2 and 1 with noise: areas under losses are nearer to each
    other, and the slowest is learnt faster."""
    generator = torch.Generator().manual_seed(0)
    distances, width = [4.0, 2.0, 1.0], 12
    behaviours, stats = [], {}
    for i, distance in enumerate(distances):
        noise = 0.3 * torch.randn(30, width, generator=generator).double()
        direction = torch.eye(width)[i].double() * distance
        behaviours.append(direction / 2 + noise)
        stats[str(i)] = apart(str(i), direction.tolist())
    rows = [{"behaviour": str(i)} for i in range(3) for _ in range(60)]
    order = torch.randperm(len(rows), generator=generator).tolist()
    before = losses(behaviours, [int(rows[k]["behaviour"]) for k in order], rate=0.05)
    even = dynamics.rebalanced(rows, stats)
    after = losses(behaviours, [int(b) for b in even["behaviour"]], rate=0.05)
    assert max(after) / min(after) < 0.5 * (max(before) / min(before) - 1) + 1
    assert after[2] < before[2]
