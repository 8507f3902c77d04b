"""What a judge says of pairs of answers, and how far its order sways it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...decoding.stats import Stats
from ...metrics import mean_interval

ROWS = 8  # so many pairs are shown where judgments are printed


@dataclass(frozen=True, eq=False)
class Judgments:
    """The judgments of n pairs of answers (a, b) by P principles. NaN where a pair has failed.

    Attributes:
        orders: ``[n, P, 2, 2]`` float64: the probabilities of both labels, first with a under the
            first label and b under the second, then the other way round. They are of the whole
            vocabulary: what two labels lack to 1, other tokens have.
        principles: the names of the principles; (None,) is the template's own question.
        reasons: why each pair could not be judged, as a RuntimeWarning said; None where it was.
        stats: what it cost.
    """

    orders: Tensor
    principles: tuple[str | None, ...]
    reasons: tuple[str | None, ...]
    stats: Stats

    def __len__(self) -> int:
        return len(self.reasons)

    @cached_property
    def failed(self) -> Tensor:
        """``[n]`` bool: which pairs could not be judged."""
        return torch.tensor([why is not None for why in self.reasons], dtype=torch.bool)

    @cached_property
    def by_principle(self) -> Tensor:
        """``[n, P, 2]`` float64: ``s_a = (p(A | a, b) + p(B | b, a)) / 2`` and ``s_b = (p(B | a, b)
        + p(A | b, a)) / 2`` of each principle."""
        (a_first, b_second), (b_first, a_second) = (
            (x[..., 0], x[..., 1]) for x in self.orders.unbind(dim=2)
        )
        return torch.stack([(a_first + a_second) / 2, (b_second + b_first) / 2], dim=-1)

    @cached_property
    def first(self) -> Tensor:
        """``[n]`` float64: s_a, the mean over the principles."""
        return self.by_principle[..., 0].mean(dim=1)

    @cached_property
    def second(self) -> Tensor:
        """``[n]`` float64: s_b, the mean over the principles."""
        return self.by_principle[..., 1].mean(dim=1)

    @cached_property
    def votes(self) -> Tensor:
        """``[n]`` int64: how many more principles prefer a than b."""
        a, b = self.by_principle.unbind(dim=-1)
        return ((a > b).long() - (a < b).long()).sum(dim=1)

    @property
    def first_wins(self) -> Tensor:
        """``[n]`` bool: whether a beats b: by the majority of the principles, where they tie by the
        mean score, and where this ties too, a does. False where a pair has failed."""
        return self.preference >= 0.5

    @cached_property
    def preference(self) -> Tensor:
        """``[n]`` float64: how probable it is that a is better, ``s_a / (s_a + s_b)``.

        Of several principles it is the mean over those of the majority, or over all where they tie.
        So it is above 0.5 where a wins, below where b does, and 0.5 where they tie exactly.
        """
        a, b = self.by_principle.unbind(dim=-1)
        votes = self.votes[:, None]
        sides = torch.where(votes > 0, a > b, torch.where(votes < 0, a < b, True))
        share = torch.where(a == b, 0.5, a / (a + b))
        tied = (votes[:, 0] == 0) & (self.by_principle.shape[1] > 1)
        mean = torch.where(sides, share, 0.0).sum(dim=1) / sides.sum(dim=1)
        whole = torch.where(self.first == self.second, 0.5, self.first / (self.first + self.second))
        return torch.where(self.failed, math.nan, torch.where(tied, whole, mean))

    @cached_property
    def winners(self) -> list[str | None]:
        """Which answer of each pair is better: "a", "b" or "tie", as `preference` is above, below
        or at 0.5; None where the pair has failed."""
        names = {True: "a", False: "b"}
        return [
            None if math.isnan(p) else "tie" if p == 0.5 else names[p > 0.5]
            for p in self.preference.tolist()
        ]

    @property
    def position_bias(self) -> float:
        """How often the order alone decides: the share of judgments in which the same label is the
        likelier one in both orders. NaN without a judgment."""
        return self._share(self._same_label.abs())

    @property
    def toward_first(self) -> float:
        """The share of judgments in which the first label is the likelier one in both orders."""
        return self._share((self._same_label > 0).double())

    @property
    def _same_label(self) -> Tensor:
        """``[n, P]``: 1 where both orders prefer the first label, -1 the second, 0 neither."""
        signs = (self.orders[..., 0] - self.orders[..., 1]).sign()
        return torch.where(signs[..., 0] == signs[..., 1], signs[..., 0], 0.0)

    def _share(self, each: Tensor) -> float:
        found = each[~self.failed]
        return float(found.mean()) if found.numel() else math.nan

    def accuracy(self, first_is_better: Sequence[Any] | Tensor) -> tuple[float, float]:
        """How often the judge agrees with labels, and half of the 95 % interval of that share.

        An exact tie agrees by half. Pairs that failed are not counted.

        Args:
            first_is_better: for each pair whether a is the better answer, as a bool, 1 or 0.

        Raises:
            TypeError, ValueError: it is something else, or there is not one a pair.
        """
        try:
            labels = torch.as_tensor(first_is_better, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"first_is_better is {first_is_better!r:.80}; it must be a bool for each pair"
            ) from error
        if labels.shape != self.failed.shape:
            raise ValueError(
                f"first_is_better has the shape {list(labels.shape)}; it must be [{len(self)}], "
                "one a pair"
            )
        odd = labels[(labels != 0) & (labels != 1)].tolist()
        if odd:
            raise ValueError(
                f"first_is_better has {odd[0]}; it must have True or 1 where a is better, else "
                "False or 0"
            )
        preference = self.preference
        agree = torch.where(preference == 0.5, 0.5, ((preference > 0.5) == labels.bool()).double())
        found = agree[~self.failed].tolist()
        return mean_interval(found) if found else (math.nan, math.nan)

    def __getitem__(self, key: Any) -> NoReturn:
        """There are no items: tensors and lists have an entry for each pair."""
        raise TypeError(
            f"Judgments have no item {key!r}: winners[i] says which answer of pair i is better, "
            "preference[i] how probable it is that a is, first[i] and second[i] are the scores"
        )

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "Judgments cannot be iterated over; for pairs one after the other there are winners, "
            "preference, first, second and reasons"
        )

    def __repr__(self) -> str:
        """For people: the scores of each pair, cut after some of them."""
        lines = []
        for i, winner in enumerate(self.winners[:ROWS]):
            scores = "failed"
            if winner is not None:
                wins = winner if winner == "tie" else f"{winner} wins"
                scores = f"{wins}, {float(self.first[i]):.4g} to {float(self.second[i]):.4g}"
                if self.principles != (None,):
                    each = zip(self.principles, self.by_principle[i].tolist(), strict=True)
                    scores += f" ({', '.join(f'{p}: {a:.3g} to {b:.3g}' for p, (a, b) in each)})"
            lines.append(f"{i}: {scores}")
        if len(self) > ROWS:
            lines.append(f"... and {len(self) - ROWS} more")
        head = [f"{len(self)} pair{'' if len(self) == 1 else 's'}"]
        if not math.isnan(self.position_bias):
            head.append(f"order alone decides {self.position_bias:.1%}")
        head.append(f"{self.stats.seconds:.3g} s")
        return "\n  ".join([f"Judgments({', '.join(head)})", *lines])
