"""Figures of a behaviour's pairs, and the rules by which one is warned of."""

from __future__ import annotations

import math

import pytest
import torch
from crossfade.dynamics import Reading, figures

LOG2 = math.log(2)


def reading(margins: list[float], chosen: float = -5.0, argmax: float = -1.0) -> Reading:
    """Pairs whose chosen responses have about one log-prob."""
    m = torch.tensor(margins).double()
    spread = 0.01 * torch.arange(len(m)).double()
    base = chosen + spread
    return Reading(base, base - m, argmax + spread, torch.full_like(m, 0.7))


START = reading([0.0] * 8)


def warned(now: dict[str, Reading], start: Reading = START) -> dict[str, str]:
    found = figures.warnings({b: (x, start) for b, x in now.items()})
    return {f"{w.kind} {w.behaviour}": w.text for w in found}


def test_figures_by_hand() -> None:
    start = reading([1.0, -1.0, 0.5, 0.0])
    now = reading([2.0, -1.0, 0.0, 0.0], chosen=-6.0, argmax=-0.5)
    got = figures.of(now, start, beta=0.3)
    growth = [1.0, 0.0, -0.5, 0.0]
    assert got["loss"] == pytest.approx(sum(math.log1p(math.exp(-0.3 * g)) for g in growth) / 4)
    assert got["accuracy"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)
    assert got["plain_accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert got["margin"] == pytest.approx(0.25)
    assert got["growth"] == pytest.approx(0.125)
    deviation = torch.tensor(growth).double().std()
    assert got["growth_error"] == pytest.approx(3.1824 * float(deviation) / 2, rel=0.01)
    assert got["chosen"] == pytest.approx(-6 + 0.015)
    assert got["rejected"] == pytest.approx(-6 + 0.015 - 0.25)
    assert (got["argmax"], got["entropy"]) == (pytest.approx(-0.485), pytest.approx(0.7))
    alone = figures.of(now[torch.tensor([0])], start[torch.tensor([0])], beta=0.3)
    assert alone["growth_error"] is None
    assert tuple(got) == tuple(alone) == figures.NAMES


def test_the_reach_of_intervals_is_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for freedom in (4, 5, 9, 30, 1000):
        assert figures.student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-3)


def test_a_behaviour_that_another_one_starves() -> None:
    grown = reading([2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.0])
    still = reading([0.1, 0.0, 0.1, -0.1, 0.0, 0.1, 0.0, 0.1])
    found = warned({"film": grown, "plot": still})
    assert [*found] == ["starved plot"]
    assert found["starved plot"].startswith(
        "'film' starves 'plot': the log-odds of chosen over rejected responses grew by 2.00 ± 0.1"
    )
    # one that fell is starved too, and one that keeps up is not
    assert [*warned({"film": grown, "plot": reading([-1.0] * 8)})] == ["starved plot"]
    assert not warned({"film": grown, "plot": reading([1.0] * 8)})


@pytest.mark.parametrize(
    "others",
    [
        # the odds have not doubled yet
        (reading([LOG2 - 0.01] * 8), reading([0.0] * 8)),
        # few pairs grew by much: the mean's interval begins below log 2
        (reading([16.0] + [0.0] * 7), reading([0.0] * 8)),
        # some of the slower behaviour grew as fast, so that it may do so as a whole
        (reading([2.0] * 8), reading([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0])),
    ],
)
def test_no_behaviour_is_starved_where_chance_may_do_it(others: tuple[Reading, Reading]) -> None:
    assert not warned(dict(zip(("film", "plot"), others, strict=True)))


def test_nothing_is_said_of_few_pairs() -> None:
    start = reading([0.0] * 4)
    assert not warned({"film": reading([9.0] * 4), "plot": reading([0.0] * 4)}, start)
    assert not warned({"film": reading([1.0] * 4, chosen=-9.0, argmax=-0.1)}, start)
    assert not warned({})


@pytest.mark.parametrize(
    ("margin", "chosen", "argmax", "squeezed"),
    [
        (1.0, -6.0, -0.9, True),
        (1.0, -5.5, -0.9, False),  # chosen responses have lost less than half
        (0.1, -3.0, -0.9, False),  # they have gained
        (-2.0, -6.0, -0.9, False),  # rejected ones have gained
        (1.0, -6.0, -1.1, False),  # the most likely tokens have lost too
    ],
)
def test_likelihood_that_leaves_both_responses(
    margin: float, chosen: float, argmax: float, squeezed: bool
) -> None:
    found = warned({"film": reading([margin] * 8, chosen, argmax)})
    assert [*found] == (["squeezed film"] if squeezed else [])
    if squeezed:
        assert found["squeezed film"] == (
            "likelihood leaves both responses of 'film': log-probs of chosen ones fell by 1.00 and "
            "of rejected ones by 2.00, and those of the most likely tokens rose by 0.10 a token"
        )
