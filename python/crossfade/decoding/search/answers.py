"""The numbers that models give, and those of functions and judges of the caller, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...blends.values import LogRatio

ROUNDING = 1e-5  # how far a sum of probabilities in float32 may be beside the true one


def numbers(name: str, answer: Any, count: int, what: str, of_each: str) -> list[float]:
    """What `name` returned, as so many numbers.

    Args:
        what: what the numbers are, such as "scores".
        of_each: what each is of, such as "response".

    Raises:
        TypeError: it is no list of numbers.
        ValueError: they are more or fewer.
    """
    try:
        found = [float(x) for x in answer]
    except (TypeError, ValueError, RuntimeError) as error:  # torch's, for a row of several numbers
        raise TypeError(
            f"{name} returned {answer!r:.80}; it must return a number for each {of_each}"
        ) from error
    if len(found) != count:
        raise ValueError(
            f"{name} returned {len(found)} {what}; it must return {count}, one a {of_each}"
        )
    return found


def probabilities(name: str, answer: Any, count: int, of_each: str) -> list[float]:
    """The same for probabilities, which are within [0, 1] or NaN.

    Raises:
        TypeError, ValueError: as `numbers`, and where one is outside of [0, 1] by more than
            rounding explains.
    """
    found = numbers(name, answer, count, "probabilities", of_each)
    bad = next((p for p in found if p < -ROUNDING or p > 1 + ROUNDING), None)
    if bad is not None:
        raise ValueError(
            f"{name} returned {bad} for a {of_each}; it must return probabilities, within [0, 1] "
            "or NaN"
        )
    return [p if p != p else min(max(p, 0.0), 1.0) for p in found]


def log_ratios(
    value: LogRatio, tuned: Sequence[Sequence[float]], ref: Sequence[Sequence[float]]
) -> list[float]:
    """The log-ratio of each response, from the log-probs of its tokens under both models."""
    return [
        value.beta * (sum(a) - sum(b)) / (max(len(a), 1) if value.normalize else 1)
        for a, b in zip(tuned, ref, strict=True)
    ]


def totals(weights: Tensor, parts: Tensor) -> Tensor:
    """``[n]``: the values of rows, from the weights and the values of their parts ``[n, parts]``.

    A part of the weight 0 counts nothing, even where it is NaN or infinite.
    """
    return torch.where(weights == 0, 0.0, weights * parts).sum(dim=1)
