"""Weights of terms. A weight is a number, or a number for each request: a tensor `[requests]`.

A list, a tuple or an array stands for such a tensor. A tensor or an array without dimensions is a
number.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from ..checks import check_number, plain_number
from ..ops.check import WEIGHT_SUM_TOLERANCE

Weight: TypeAlias = "float | Tensor"
T = TypeVar("T")
KINDS = "a number, or a list or tensor [requests] of numbers"


def check_weight(name: str, w: Any) -> Weight:
    """A weight as a float, or as a float32 tensor `[requests]`.

    The tensor is a copy, so that the caller may change the one that was given. Numbers are looked
    at; the contents of a tensor are not, as that would wait for its device.

    Raises:
        TypeError, ValueError: calls the weight `name`, and says what it was and must be.
    """
    w = plain_number(w)
    if not isinstance(w, Tensor):
        if isinstance(w, (list, tuple)) or is_array(w):
            return _of_requests(name, w)
        if isinstance(w, bool) or not isinstance(w, numbers.Real):
            raise TypeError(f"{name} is a {type(w).__name__}; it must be {KINDS}")
        return check_number(name, w)
    if w.dtype == torch.bool or w.is_complex():
        raise TypeError(f"{name} has dtype {w.dtype}; it must be a float tensor [requests]")
    if w.dim() != 1:
        raise ValueError(
            f"{name} has shape {list(w.shape)}; it must be [requests], or a number for all"
        )
    return w.detach().to(torch.float32, copy=True)


def holds(condition: bool | Tensor) -> bool:
    """Whether something is so of a weight: of each of its numbers, as far as the host has them.

    The contents of a tensor on another device are not waited for; a row whose weights turn out to
    be NaN fails alone.
    """
    if not isinstance(condition, Tensor):
        return condition
    return condition.device.type != "cpu" or bool(condition.all())


def _of_requests(name: str, w: Any) -> Tensor:
    """A list or an array with a number for each request, as a tensor."""
    each = w.tolist() if is_array(w) else w
    if not each:
        raise ValueError(f"{name} is empty; it must have a number for each request")
    nested = [x for x in each if isinstance(x, (list, tuple)) or getattr(x, "shape", None)]
    if nested:
        raise ValueError(
            f"{name} has {nested[0]!r:.80} among its entries; it must be {KINDS}: a number for "
            "each request"
        )
    numbers = [check_number(f"{name}[{i}]", x) for i, x in enumerate(each)]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def is_array(x: Any) -> bool:
    """Whether this is an array as numpy makes them, with a dimension at least."""
    return hasattr(x, "tolist") and bool(getattr(x, "shape", None)) and not isinstance(x, Tensor)


def weight_list(name: str, weights: Any) -> list[Any]:
    """Weights of several terms as a list: given as one, or as an array or a tensor.

    An array is ``[terms]``, or ``[requests, terms]`` where each request has its own.

    Raises:
        TypeError: it is something else.
    """
    if is_array(weights):
        weights = torch.as_tensor(weights, device="cpu")
    if isinstance(weights, Tensor) and weights.dim() in (1, 2):
        return list(weights.unbind(-1))
    if not isinstance(weights, (list, tuple)):
        kind = type(weights).__name__
        raise TypeError(f"{name} is a {kind}; it must be a list with a weight for each model")
    return list(weights)


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


def check_power(name: str, r: Any) -> float:
    """r of a power mean as a float: a finite number, inf (the union) or -inf (the intersection).

    Raises:
        TypeError, ValueError: calls it `name`, and says what it was and must be.
    """
    r = plain_number(r)
    return r if isinstance(r, float) and math.isinf(r) else check_number(name, r)


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
