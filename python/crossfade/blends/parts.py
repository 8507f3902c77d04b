"""Parts of a blend: terms that are joined, and clamped, before they are added to the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, plain_number
from ..ops.check import MAX_PARTS
from .weights import Weight, is_zero, merge_weights, weight_rows


@dataclass(frozen=True, eq=False)
class Part:
    """Some terms of a blend whose log-probs are joined before they are added to the others.

    ``sum_k weights[k] * log p_k`` with power 0. With power ``inf`` or ``-inf`` the sum of the
    weights times the largest or the smallest ``log p_k``: the union or the intersection of the
    terms. What comes of it is clamped to ``[min, max]``, in nats. It is written as
    ``(0.8 * (tuned - ref)).clamp(-2, 2)``, or as ``0.5 * union(a, b)`` where it is added to others.

    Args:
        terms: `Model` terms.
        weights: a number or a tensor ``[requests]`` a term. A term whose weight is the number 0 is
            left out.
        power: 0, ``math.inf`` or ``-math.inf``.
        min, max: by default nothing is clamped.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    terms: tuple[Any, ...]
    weights: tuple[Weight, ...]
    power: float = 0.0
    min: float = -math.inf
    max: float = math.inf

    def __post_init__(self) -> None:
        total = merge_weights("weights", self.terms, self.weights)
        total = {t: w for t, w in total.items() if not is_zero(w)}
        if self.power != 0 and not math.isinf(self.power):
            raise ValueError(f"power is {self.power}; of a part it must be 0, inf or -inf")
        put = object.__setattr__  # the dataclass is frozen
        put(self, "terms", tuple(total))
        put(self, "weights", tuple(total.values()))
        put(self, "min", check_bound("min", self.min, -math.inf))
        put(self, "max", check_bound("max", self.max, math.inf))
        if self.min > self.max:
            raise ValueError(f"min is {self.min:g}; it must be at most max, which is {self.max:g}")

    @property
    def is_clamped(self) -> bool:
        return not math.isinf(self.min) or not math.isinf(self.max)

    def times(self, weights: Sequence[Weight], factor: Weight, *, divide: bool = False) -> Part:
        """This part with these weights, which are its own multiplied or divided by a factor.

        Raises:
            ValueError: it is clamped, and the factor is not one for all requests.
        """
        if not self.is_clamped:
            return replace(self, weights=tuple(weights))
        if isinstance(factor, Tensor):
            raise ValueError(
                "a clamp has one min and one max for all requests, so it cannot be scaled by a "
                "weight for each; weigh what is clamped: (w * (a - b)).clamp(-2, 2)"
            )
        f = 1 / factor if divide else factor
        if f == 0:  # No weight is left, so there is nothing to clamp.
            return replace(self, weights=tuple(weights), min=-math.inf, max=math.inf)
        least, most = sorted((f * self.min, f * self.max))
        return replace(self, weights=tuple(weights), min=least, max=most)


def check_bound(name: str, x: Any, nothing: float) -> float:
    """A bound in nats as a float; None, like `nothing`, does not bound.

    Raises:
        TypeError, ValueError: calls the bound `name`, and says what it was and must be.
    """
    x = plain_number(x)
    if x is None or (isinstance(x, float) and x == nothing):
        return nothing
    return check_number(name, x)


def used_parts(parts: Sequence[Any], power: float) -> tuple[Part, ...]:
    """The parts of a blend that have a term with a weight.

    Raises:
        TypeError, ValueError: one is no `Part`, they are too many, or the blend is a power mean.
    """
    for part in parts:
        if not isinstance(part, Part):
            raise TypeError(f"parts have a {type(part).__name__}; they must be of Part")
    used = tuple(part for part in parts if part.terms)
    if len(used) > MAX_PARTS:
        raise ValueError(f"parts are {len(used)}; they must be at most {MAX_PARTS}")
    if used and power != 0:
        raise ValueError(f"power is {power:g}; it must be 0, as the blend has parts")
    return used


def part_rows(
    parts: Sequence[Part],
    terms: Sequence[Any],
    names: Sequence[str],
    requests: int,
    device: torch.device | str | None,
) -> tuple[tuple[float, ...], ...] | Tensor:
    """The weights in each part of all terms of a blend, in the form that `weight_rows` has.

    Returns:
        Of each part a tuple of numbers, or a float32 tensor ``[requests, parts, terms]``.

    Raises:
        ValueError: a weight tensor has another length; names the term.
    """
    each = []
    for part in parts:
        own = dict(zip(part.terms, part.weights, strict=True))
        weights = tuple(own.get(term, 0.0) for term in terms)
        each.append(weight_rows(names, weights, requests, device))
    if not any(isinstance(w, Tensor) for w in each):
        return tuple(each)  # type: ignore[arg-type]
    rows = [torch.as_tensor(w, dtype=torch.float32, device=device) for w in each]
    return torch.stack([w.expand(requests, len(terms)) for w in rows], dim=1)
