"""What is measured of a front: its hypervolume, its best points, how well weights steer it.

Rewards are maximised. Points are ``[n, rewards]``: lists, arrays or tensors of finite numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number


def hypervolume(points: Any, reference: Any) -> float:
    """The volume of what the points dominate, above a reference.

    It is the measure of all ``z`` with ``reference <= z <= p`` in every reward for some point p. A
    point that is not above the reference in every reward counts nothing, and without any that is,
    the volume is 0.

    Args:
        points: ``[n, rewards]``, of any number of rewards. n may be 0.
        reference: ``[rewards]``: the worst that is of interest. Volumes of one reference alone can
            be compared.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    at = matrix("reference", [reference])[0]
    if len(at) == 0:
        raise ValueError("reference is empty; it must have a number for each reward")
    above = matrix("points", points, len(at)) - at
    above = above[(above > 0).all(dim=1)]
    return float(volumes(above[non_dominated(above)][None]))


def volumes(boxes: Tensor) -> Tensor:
    """``[draws]``: the volume of each union of boxes ``[0, b]``, given as ``[draws, n, sides]``.

    A side below 0 counts as one of 0. The union is cut into slices along its last side, each of
    which is the union of boxes of one side less.
    """
    boxes = boxes.clamp(min=0)
    draws, n, sides = boxes.shape
    if n == 0:
        return boxes.new_zeros(draws)
    if sides == 1:
        return boxes[:, :, 0].amax(dim=1)
    order = boxes[:, :, -1].argsort(dim=1, descending=True)
    boxes = boxes.gather(1, order[:, :, None].expand_as(boxes))
    heights = boxes[:, :, -1]
    steps = heights - torch.cat([heights[:, 1:], heights.new_zeros(draws, 1)], dim=1)
    if sides == 2:
        return (steps * boxes[:, :, 0].cummax(dim=1).values).sum(dim=1)
    total = boxes.new_zeros(draws)
    for k in range(n):
        if steps[:, k].any():
            total += steps[:, k] * volumes(boxes[:, : k + 1, :-1])
    return total


def non_dominated(points: Any) -> Tensor:
    """``[n]`` bool: which points no other point dominates.

    A point dominates another if it is as high in every reward and higher in one. Equal points do
    not dominate each other, so that both stay or none.

    Raises:
        TypeError, ValueError: as `hypervolume`.
    """
    x = matrix("points", points)
    beaten = torch.zeros(len(x), dtype=torch.bool)
    for p in x:
        beaten |= (p >= x).all(dim=1) & (p > x).any(dim=1)
    return ~beaten


def front(points: Any) -> Tensor:
    """``[m, rewards]`` float64: the points that no other dominates, each once.

    They are ordered by the first reward, the highest first, then by the second, and so on.

    Raises:
        TypeError, ValueError: as `hypervolume`.
    """
    x = matrix("points", points)
    return x[non_dominated(x)].unique(dim=0).flip(0) if len(x) else x


def spearman(x: Any, y: Any) -> float:
    """Spearman's rank correlation of two lists of numbers, in [-1, 1].

    Numbers that are equal have the mean of their ranks. Where one of the lists is constant, or has
    a single number, nothing follows anything and the correlation is 0.

    Raises:
        TypeError, ValueError: as `hypervolume`.
    """
    (a,), (b,) = matrix("x", [x]), matrix("y", [y])
    if len(a) != len(b):
        raise ValueError(f"y has {len(b)} numbers; it must have {len(a)}, as x")
    a, b = (r - r.mean() for r in (_ranks(a), _ranks(b)))
    norm = float(a.norm() * b.norm()) if len(a) else 0.0
    return max(-1.0, min(1.0, float(a @ b) / norm)) if norm else 0.0


def _ranks(x: Tensor) -> Tensor:
    below = (x[:, None] > x[None, :]).sum(dim=1)
    return below.double() + (x[:, None] == x[None, :]).sum(dim=1).double() / 2


def steerability(weights: Any, rewards: Any) -> float:
    """How well weights steer rewards: the mean over objectives of Spearman's correlation.

    1 says that each reward rises with its own weight, whatever the others do.

    Args:
        weights: ``[n, objectives]``: the weights of each point.
        rewards: ``[n, objectives]``: the rewards there.

    Raises:
        TypeError, ValueError: as `hypervolume`.
    """
    w = matrix("weights", weights)
    r = matrix("rewards", rewards)
    if w.shape != r.shape:
        raise ValueError(
            f"rewards are {list(r.shape)}; they must be {list(w.shape)}, as the weights"
        )
    if w.shape[1] == 0:
        raise ValueError("weights are of no objective; they must be of one at least")
    each = [spearman(a, b) for a, b in zip(w.T, r.T, strict=True)]
    return math.fsum(each) / len(each)


def matrix(name: str, x: Any, width: int | None = None) -> Tensor:
    """``[n, width]`` finite numbers as a float64 tensor on the CPU.

    Raises:
        TypeError, ValueError: calls them `name`, and says what was wrong.
    """
    if isinstance(x, Tensor) or hasattr(x, "tolist"):
        x = x.tolist()
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes)):
        raise TypeError(f"{name} is {x!r:.80}; it must be a list of rows of numbers")
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in x]
    for i, row in enumerate(rows):
        where = name if len(rows) == 1 and name in ("reference", "x", "y") else f"{name}[{i}]"
        if not isinstance(row, Sequence) or isinstance(row, (str, bytes)):
            raise TypeError(f"{where} is {row!r:.80}; it must be a list of numbers")
        for j, number in enumerate(row):
            check_number(f"{where}[{j}]", number)
        wanted = len(rows[0]) if width is None else width
        if len(row) != wanted:
            raise ValueError(f"{where} has {len(row)} numbers; it must have {wanted}")
    width = width if width is not None else len(rows[0]) if rows else 0
    return torch.tensor(
        [[float(number) for number in row] for row in rows], dtype=torch.float64, device="cpu"
    ).reshape(len(rows), width)
