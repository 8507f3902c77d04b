"""Weights of terms. A weight is a number, or a tensor `[requests]` with a number a request."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..checks import check_number
from ..ops.check import WEIGHT_SUM_TOLERANCE

Weight: TypeAlias = "float | Tensor"
T = TypeVar("T")


def check_weight(name: str, w: Any) -> Weight:
    """A weight as a float, or as a float32 tensor `[requests]`.

    The tensor is a copy, so that the caller may change the one that was given.
    """
    if not isinstance(w, Tensor):
        if isinstance(w, bool) or not isinstance(w, numbers.Real):
            raise TypeError(
                f"{name} is a {type(w).__name__}; it must be a number or a tensor [requests]"
            )
        return check_number(name, w)
    if w.dtype == torch.bool or w.is_complex():
        raise TypeError(f"{name} has dtype {w.dtype}; it must be a float tensor [requests]")
    if w.dim() != 1:
        raise ValueError(
            f"{name} has shape {list(w.shape)}; it must be [requests], or a number for all"
        )
    return w.detach().to(torch.float32, copy=True)


def is_zero(w: Weight) -> bool:
    """Whether a weight is the number 0.

    A tensor never is, whatever it holds: to look into one on a GPU would wait for the GPU.
    """
    return not isinstance(w, Tensor) and w == 0


def merge_weights(name: str, terms: Sequence[T], weights: Sequence[Any]) -> dict[T, Weight]:
    """Each distinct term with the sum of its weights, in the order of first appearance.

    Args:
        name: what errors call the weights.
    """
    if len(weights) != len(terms):
        raise ValueError(f"{name} has {len(weights)} members; it must have {len(terms)}, as terms")
    total: dict[T, Weight] = {}
    for k, (term, x) in enumerate(zip(terms, weights, strict=True)):
        w = check_weight(f"{name}[{k}]", x)
        if term in total:
            w = _combined(total[term], w, name, term)
        total[term] = w
    return total


def _combined(a: Weight, b: Weight, name: str, term: Any) -> Weight:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape:
            raise ValueError(
                f"{name} of {term} are [{len(a)}] and [{len(b)}]; they must have one length, one a "
                "request"
            )
        b = b.to(a.device)
    return a + b


def check_sum(weights: Sequence[Weight]) -> None:
    """Raise an error unless the weights sum to one.

    Where one of them is a tensor nothing is checked here; the kernels check each row.
    """
    seen = [w for w in weights if not isinstance(w, Tensor)]
    if len(seen) == len(weights) and abs(sum(seen) - 1) > WEIGHT_SUM_TOLERANCE:
        raise ValueError(f"weights sum to {sum(seen):.6g}; they must sum to 1")


def check_mean(weights: Sequence[Weight]) -> None:
    """Raise an error if a weight of a power mean is negative, or they do not sum to one."""
    for w in weights:
        if not isinstance(w, Tensor) and w < 0:
            raise ValueError(f"weights have {w}; in a power mean none may be negative")
    check_sum(weights)


def weight_rows(
    names: Sequence[str],
    weights: tuple[Weight, ...],
    requests: int,
    device: torch.device | str | None,
) -> tuple[float, ...] | Tensor:
    """The weights of a batch as the kernels take them.

    Returns:
        `weights` themselves if all are numbers, else a float32 tensor ``[requests, terms]`` on
        `device`.

    Raises:
        ValueError: a weight tensor has another length; names the term.
    """
    if not any(isinstance(w, Tensor) for w in weights):
        return weights  # type: ignore[return-value]
    columns = []
    for name, w in zip(names, weights, strict=True):
        if not isinstance(w, Tensor):
            w = torch.full((requests,), w, dtype=torch.float32, device="cpu")
        if len(w) != requests:
            raise ValueError(
                f"the weight of {name} is a tensor [{len(w)}]; it must be [{requests}], the "
                "requests"
            )
        columns.append(w.to(device))
    return torch.stack(columns, dim=1)
