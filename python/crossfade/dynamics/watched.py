"""The pairs that a run watches: what they were at step 0, and what they are under a model now."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import figures
from .answers import Answers, kind_of
from .questions import Pair
from .readings import Reading, read_pairs

FIGURES = tuple(field.name for field in dataclasses.fields(Reading))


class Watched:
    """Pairs of behaviours, with the figures of step 0.

    Attributes:
        pairs: those whose figures were finite at step 0.
        left_out: the numbers of the rows of the others.
        counts: how many pairs each behaviour has, in the order of the first ones.
        start: the figures of step 0.
        answers: where the head began, of statements under a head that is trained; else None.

    Args:
        pairs: all pairs.
        tensors: what `begin` found of them.
    """

    def __init__(self, pairs: Sequence[Pair], tensors: Mapping[str, Tensor]) -> None:
        start = Reading(*(tensors[name] for name in FIGURES))
        finite = start.is_finite
        self.pairs = _those(pairs, finite)
        self.left_out = [pair.number for pair in _those(pairs, ~finite)]
        self.start = start[finite]
        self.counts = dict(Counter(pair.behaviour for pair in self.pairs))
        self.answers = None
        if "head" in tensors:
            yes, no = _answers(self.pairs)
            self.answers = Answers(yes, no, tensors["head"], tensors["steps"])

    @staticmethod
    def begin(model: Any, pairs: Sequence[Pair], max_batch: int | None) -> dict[str, Tensor]:
        """Read pairs under a model before its training: all that a later reading is compared with.

        Raises:
            ValueError: no pair has figures that are finite.
        """
        reading = read_pairs(model, as_mappings(pairs), max_batch)
        tensors = {name: getattr(reading, name) for name in FIGURES}
        kept = _those(pairs, reading.is_finite)
        if not kept:
            raise ValueError("rows has no row left that can be watched; it must have one")
        if are_statements(kept) and kind_of(model) == "trained":
            found = Answers.of(model, kept, *_answers(kept), max_batch)
            tensors |= {"head": found.start, "steps": found.steps}
        return tensors

    @property
    def kind(self) -> str:
        return "statements" if are_statements(self.pairs) else "pairs"

    def measure(
        self, model: Any, beta: float, max_batch: int | None
    ) -> tuple[dict[str, dict[str, float | None]], list[figures.Warned]]:
        """The figures of each behaviour under a model, and what it is to be warned of."""
        now = read_pairs(model, as_mappings(self.pairs), max_batch)
        moved = None if self.answers is None else self.answers.moved(model)
        found: dict[str, dict[str, float | None]] = {}
        warned: list[figures.Warned] = []
        finite: dict[str, tuple[Reading, Reading]] = {}
        for k, (behaviour, count) in enumerate(self.counts.items()):
            own = torch.tensor([pair.behaviour == behaviour for pair in self.pairs])
            own &= now.is_finite
            n = int(own.sum())
            if n:
                finite[behaviour] = now[own], self.start[own]
                found[behaviour] = {**figures.of(*finite[behaviour], beta), "n": n}
            else:
                found[behaviour] = {**dict.fromkeys(figures.NAMES), "n": 0}
            if moved is not None:
                found[behaviour] |= moved[k]
            if n < count:
                text = (
                    f"{count - n} of {count} pairs of {behaviour!r} have figures that are not "
                    "finite; means are of the others"
                )
                warned.append(figures.Warned("not finite", behaviour, text))
        return found, [*warned, *figures.warnings(finite)]


def are_statements(pairs: Sequence[Pair]) -> bool:
    """Whether all pairs choose between the same two tokens."""
    responses = {(tuple(r)) for pair in pairs for r in (pair.chosen_ids, pair.rejected_ids)}
    return len(responses) == 2 and all(len(r) == 1 for r in responses)


def as_mappings(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    return [pair._asdict() for pair in pairs]


def _answers(pairs: Sequence[Pair]) -> tuple[int, int]:
    """The two tokens that all pairs choose between, in an order that does not depend on them."""
    first, second = sorted((pairs[0].chosen_ids[0], pairs[0].rejected_ids[0]))
    return first, second


def _those(pairs: Sequence[Pair], mask: Tensor) -> list[Pair]:
    return [pair for pair, wanted in zip(pairs, mask.tolist(), strict=True) if wanted]
