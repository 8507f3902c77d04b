"""Weightings: how much each reward counts, as mappings of the rewards' names to numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import check_number, did_you_mean
from ..decoding.settings import check_int

KL = "kl"  # the weight of staying near the reference, whose reward is the negative divergence
MOST = 100_000  # weightings of a grid


def weightings(weights: Any, rewards: Sequence[str]) -> list[dict[str, float]]:
    """The weightings of a sweep, each with a number for every reward.

    Args:
        weights: a number n, for the grid of the simplex whose steps are ``1 / (n - 1)``. Or a list
            of mappings, in which rewards that are left out count 0. They may have "kl" besides.
        rewards: the names.

    Raises:
        TypeError, ValueError: names the weighting, what it was and what it must be.
    """
    if not isinstance(weights, (Mapping, Sequence)) or isinstance(weights, str):
        if weights is None:
            raise TypeError("weights is None; it must be a number or a list of weightings")
        check_int("weights", weights, 2)
        return _grid(int(weights), rewards)
    if isinstance(weights, Mapping):
        raise TypeError(
            f"weights is {weights!r:.80}, one weighting; it must be a list of them, or a number"
        )
    if not weights:
        raise ValueError("weights is empty; it must have one weighting at least")
    known = list(rewards)
    if any(isinstance(w, Mapping) and KL in w for w in weights) and KL not in known:
        known.append(KL)
    found: list[dict[str, float]] = []
    for i, given in enumerate(weights):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"weights[{i}] is {given!r:.80}; it must be a mapping of the rewards' names to "
                f"numbers, such as {dict.fromkeys(rewards, round(1 / len(rewards), 2))}"
            )
        for name in given:
            if name not in known:
                raise ValueError(
                    f"weights[{i}] has {name!r:.80}; the rewards are {', '.join(rewards)}"
                    f"{did_you_mean(name, known)}"
                )
        numbers = {n: check_number(f"weights[{i}][{n!r}]", given.get(n, 0.0)) for n in known}
        if numbers in found:
            raise ValueError(f"weights[{i}] is {said(numbers)}, as weights[{found.index(numbers)}]")
        found.append(numbers)
    return found


def objectives(each: Sequence[Mapping[str, float]], rewards: Sequence[str]) -> tuple[str, ...]:
    """The names of all that weightings weigh: the rewards, and "kl" where they have it."""
    return tuple(dict.fromkeys([*rewards, *each[0]]))


def _grid(points: int, rewards: Sequence[str]) -> list[dict[str, float]]:
    """All weightings whose weights are multiples of ``1 / (points - 1)`` and sum to 1."""
    steps = points - 1
    each: list[list[int]] = [[]]
    for _ in rewards[1:]:
        each = [[*w, k] for w in each for k in range(steps - sum(w) + 1)]
        if len(each) > MOST:
            raise ValueError(
                f"weights is {points}, which makes over {MOST} weightings of {len(rewards)} "
                "rewards; it must be less, or a list of weightings"
            )
    whole = [[*w, steps - sum(w)] for w in each]
    return [dict(zip(rewards, (k / steps for k in w), strict=True)) for w in whole]


def key(weights: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """A weighting as a key of dicts, whatever the order of its names; those of 0 are left out."""
    return tuple(sorted((name, w) for name, w in weights.items() if w))


def said(weights: Mapping[str, float]) -> str:
    """A weighting for people."""
    return ", ".join(f"{name}={w:.4g}" for name, w in weights.items())
