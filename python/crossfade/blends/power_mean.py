"""The power mean of models, which is the mixture, the harmonic mean and all between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..checks import check_number, explained
from .blend import Blend, Model, as_term
from .weights import weight_list


@explained()
def power_mean(models: Sequence[Any], weights: Sequence[Any], r: float) -> Blend:
    """The power mean of next-token distributions: ``pi ~ (sum_k w_k p_k^r)^(1/r)``.

    ``r = 1`` is the mixture, ``r = -1`` the harmonic mean, and ``r = 0`` the geometric blend
    ``sum_k w_k log p_k``, an ordinary blend. With ``r != 0`` only values can be added to it.

    Args:
        models: `Model` terms or bare Hugging Face models.
        weights: a number or a tensor ``[requests]`` a model, or all of them as an array. With
            ``r != 0`` none may be negative and they must sum to 1.
        r: any finite number.

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
    return Blend(terms, tuple(weights), power=check_number("r", r))
