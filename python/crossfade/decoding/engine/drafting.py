"""The models that guess tokens for the others, over caches of their own or over a term's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .group import Group

Logits = Callable[[Mapping[Group, Tensor], Sequence[int]], list[Tensor]]


class Guessers(NamedTuple):
    """Which models of a call guess tokens.

    Attributes:
        places: of these models.
        first: the models from this place on do nothing else.
    """

    places: tuple[int, ...]
    first: int


class Drafting:
    """Models that read ahead of the others, in rows that have the same slots.

    Attributes:
        shared: whether they are a term of the blend, whose forwards and caches serve both.

    Args:
        places: of the models, among those of the call.
        logits: gives the logits of each place, of those that groups gave.
    """

    def __init__(
        self, groups: Sequence[Group], places: Sequence[int], shared: bool, logits: Logits
    ) -> None:
        self.groups, self.places, self.shared = tuple(groups), tuple(places), shared
        self._logits = logits

    def feed(self, tokens: Tensor, counts: Tensor) -> list[Tensor]:
        """Let each row read the first ``counts [slots]`` of its ``tokens [slots, n]``, and keep
        them.

        Returns:
            Logits ``[slots, V]`` of each model after them. Those of rows that read none mean
            nothing.
        """
        at = None if tokens.shape[1] == 1 else (counts - 1).clamp(min=0)
        found = {}
        for group in self.groups:
            group.reserve(tokens.shape[1])
            group.forwards_run += 1
            found[group] = group.feed(tokens.to(group.device), at)
            group.keep(counts)
            if not self.shared:
                group.tokens_read += int(counts.sum()) * len(group.terms)
        return [z[:, 0] for z in self._logits(found, self.places)]

    def room(self) -> list[int] | None:
        """Of each slot, how many more tokens its row has room for in the contexts of all models;
        None where no row can fill one."""
        rooms = [
            (context - group.lengths).view(-1, group.slots).amin(dim=0).cpu()
            for group in self.groups
            if (context := group.models[0].context) is not None and context < group.most
        ]
        return torch.stack(rooms).amin(dim=0).tolist() if rooms else None

    def take_back(self, counts: Tensor) -> None:
        """Let rows forget so many ``[slots]`` of the tokens that they read last."""
        for group in self.groups:
            group.take_back(counts)
            group.count()
