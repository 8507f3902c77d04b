"""The power means of models: mixture, harmonic mean, union, intersection, and all between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..checks import explained
from .blend import Blend, Model, as_term
from .weights import check_power, weight_list


@explained()
def power_mean(models: Sequence[Any], weights: Sequence[Any], r: float) -> Blend:
    """The power mean of next-token distributions: ``pi ~ (sum_k w_k p_k^r)^(1/r)``.

    ``r = 1`` is the mixture, ``r = -1`` the harmonic mean, and ``r = 0`` the geometric blend
    ``sum_k w_k log p_k``, an ordinary blend. The limits are ``r = inf``, the largest ``max_k p_k``,
    and ``r = -inf``, the smallest: there weights only say which models count, those above 0. To a
    mean with a finite ``r != 0`` only values can be added.

    Args:
        models: `Model` terms or bare Hugging Face models.
        weights: a number or a tensor ``[requests]`` a model, or all of them as an array. With
            ``r != 0`` none may be negative and they must sum to 1.
        r: any finite number, ``math.inf`` or ``-math.inf``.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: MOD's decoding rules for f-divergences (Shi et al., arXiv:2406.18853). Every model reads
    every token; ``r != 0`` reads the logits twice.
    """
    if not isinstance(models, (list, tuple)):
        raise TypeError(f"models is a {type(models).__name__}; it must be a list")
    weights = weight_list("weights", weights)
    if not models:
        raise ValueError("models is empty; it must have at least one model")
    terms = tuple(as_term(f"models[{k}]", m, Model) for k, m in enumerate(models))
    return Blend(terms, tuple(weights), power=check_power("r", r))


def union(*terms: Any) -> Blend:
    """The union of next-token distributions: ``pi(v) ~ max_k p_k(v)``.

    A token is likely where any of the terms finds it likely; what one excludes (-inf) another may
    bring. It can be scaled and added as a term can, ``base - 0.9 * union(bad, base)``, where it is
    ``max_k log p_k``. It is the power mean with ``r = inf``, which takes weights by request:
    ``power_mean([a, b], [[1.0, 0.5], [0.0, 0.5]], r=inf)`` is `a` alone for the first of two
    requests. Two reads of the logits.

    Args:
        terms: `Model` terms or bare Hugging Face models.

    Raises:
        TypeError, ValueError: names the term, what it was and what it must be.

    Source: language-model arithmetic (Dekoninck et al., arXiv:2311.14479).
    """
    return _extreme("union", terms, math.inf)


def intersection(*terms: Any) -> Blend:
    """The intersection of next-token distributions: ``pi(v) ~ min_k p_k(v)``.

    A token is likely where all of the terms find it likely; what one excludes (-inf) is excluded.
    It is the power mean with ``r = -inf``. Arguments, errors, cost and source are those of `union`.
    """
    return _extreme("intersection", terms, -math.inf)


def _extreme(name: str, terms: Sequence[Any], r: float) -> Blend:
    for k, x in enumerate(terms):
        if isinstance(x, (list, tuple)):
            raise TypeError(f"terms[{k}] is a {type(x).__name__}; write {name}(a, b)")
    if not terms:
        raise ValueError(f"{name}() has no terms; it must have at least one Model")
    models = [as_term(f"terms[{k}]", x, Model) for k, x in enumerate(terms)]
    each = list(dict.fromkeys(models))
    return power_mean(each, [1 / len(each)] * len(each), r)
