"""Which behaviours training gives priority over which others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .behaviours import Statistics


class Priorities(NamedTuple):
    """The priority of each behaviour over each other.

    Attributes:
        names: of the behaviours.
        matrix: ``[n, n]`` float64: in row i and column j the priority of behaviour i over j.
    """

    names: tuple[str, ...]
    matrix: Tensor

    def of(self, behaviour: str, over: str) -> float:
        """The priority of one behaviour over another."""
        for name in (behaviour, over):
            if name not in self.names:
                raise ValueError(f"there is no behaviour {name!r}, but {', '.join(self.names)}")
        return float(self.matrix[self.names.index(behaviour), self.names.index(over)])


def priorities(stats: Mapping[str, Statistics]) -> Priorities:
    """How much more of what two behaviours are first trained on together goes to one of them.

    With d the differences of their means and ``b = (d_i + d_j) / 2``, behaviour i has over j the
    priority ``(b'd_i - b'd_j) / (|b| max(|d_i|, |d_j|))`` (arXiv:2403.18742): within [-2, 2],
    above 0 for the one that is more distinguishable, and 0 for two opposite differences.
    """
    d = torch.stack([s.difference for s in stats.values()]) if stats else torch.empty(0, 0)
    lengths = d.norm(dim=1)
    matrix = torch.zeros(len(d), len(d), dtype=torch.float64)
    for i in range(len(d)):
        middle = (d[i] + d) / 2
        scale = middle.norm(dim=1) * torch.maximum(lengths[i], lengths)
        ahead = (middle * (d[i] - d)).sum(dim=1)
        matrix[i] = torch.where(scale > 0, ahead / scale, 0.0)
    return Priorities(tuple(stats), matrix)
