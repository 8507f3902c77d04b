"""The models that guess tokens for the others, over caches of their own or over a term's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .group import Group
from .plan import logits_of


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
        models: how many these are.
    """

    def __init__(
        self, groups: Sequence[Group], places: Sequence[int], models: int, *, shared: bool = False
    ) -> None:
        self.groups, self.places, self.shared = tuple(groups), tuple(places), shared
        self._models = models

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
        each = logits_of(found, tokens.device, self._models)
        return [each[(k,)][:, 0] for k in self.places]

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
