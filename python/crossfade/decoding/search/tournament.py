"""A tournament as a search: whole rows play each other, and a judge or a value says who wins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..stats import ModelStats, summed
from .answers import probabilities
from .bracket import Bracket, mean_probs, shuffled
from .job import search_of
from .loop import SearchLoop

Pairs = Sequence[tuple[int, int]]  # places of rows that play each other


@dataclass(frozen=True)
class Referee:
    """Says of pairs of rows how probable it is that the first one is preferred.

    Args:
        fit: whether each row can be compared. One that cannot loses against any that can.
        compare: gives the probabilities of pairs of rows that can be.
        texts: what rows are compared by, where those of one text need not be.
    """

    fit: Sequence[bool]
    compare: Callable[[Pairs], Sequence[float]]
    texts: Sequence[str] | None = None

    def probs(self, pairs: Pairs) -> list[float]:
        """The probability of each pair, NaN where neither row can be compared."""
        found = [self._unasked(a, b) for a, b in pairs]
        asked = [i for i, p in enumerate(found) if p is None]
        answers = self.compare([pairs[i] for i in asked]) if asked else []
        known = dict(zip(asked, answers, strict=True))
        return [known[i] if p is None else p for i, p in enumerate(found)]

    def _unasked(self, a: int, b: int) -> float | None:
        """The probability of a pair that need not be compared; None for any other."""
        if not (self.fit[a] and self.fit[b]):
            return float(self.fit[a]) if self.fit[a] or self.fit[b] else float("nan")
        return 0.5 if self.texts is not None and self.texts[a] == self.texts[b] else None


def judged(
    judge: Any, contexts: Sequence[Any], texts: Sequence[str], failed: Sequence[bool]
) -> Referee:
    """A referee that asks a judge about the texts that rows have written.

    Args:
        judge: has ``prefer(contexts, firsts, seconds)``.
        contexts: what each row answers.
        failed: of each row, which is not compared then; nor is one without a word.
    """

    def compare(pairs: Pairs) -> list[float]:
        answer = judge.prefer(
            [contexts[a] for a, _ in pairs],
            [texts[a] for a, _ in pairs],
            [texts[b] for _, b in pairs],
        )
        return probabilities("judge", answer, len(pairs), "pair")

    fit = [bool(text.strip()) and not bad for text, bad in zip(texts, failed, strict=True)]
    return Referee(fit, compare, texts)


class TournamentLoop(SearchLoop):
    """Decodes the rows of a request in neighbouring slots, and lets them play once they have ended.

    A tournament is a search of one chunk, whose rows are ordered not by their values but by when
    they were eliminated. All requests that are at this boundary play together.
    """

    def __init__(self, *arguments: Any, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._judged: tuple[ModelStats, ...] = ()  # the work of a judge that tells it

    def stats(self) -> list[ModelStats]:
        return [*super().stats(), *self._judged]

    def _ranked(
        self, slots: list[int], rows: int, values: Tensor, failed: Tensor
    ) -> tuple[Tensor, Tensor]:
        size, first_rows = rows, [self.seated[s] for s in slots[::rows]]
        brackets = [
            Bracket(shuffled(size, int(row.value("seed")), int(row.value("stream"))))
            for row in first_rows
        ]
        with self._referee(slots, values, failed) as referee:
            while not brackets[0].over:  # All have as many rows, and so as many rounds.
                pairs = [
                    (g * size + a, g * size + b)
                    for g, bracket in enumerate(brackets)
                    for a, b in bracket.pairs
                ]
                probs = iter(referee.probs(pairs))
                for bracket in brackets:
                    bracket.play([next(probs) for _ in bracket.pairs])
        each = [bracket.played() for bracket in brackets]
        places = torch.empty(len(each), size, dtype=torch.float32, device="cpu")
        for g, played in enumerate(each):
            places[g, played.order] = torch.arange(size, dtype=torch.float32, device="cpu")
            for s in slots[g * size : (g + 1) * size]:
                self.slots.outcomes[s] = played
        if self.settings.value is None:
            means = [p for played in each for p in mean_probs(played)]
            values = torch.tensor(means, dtype=torch.float32, device="cpu")[:, None]
        return -places.flatten(), values

    @contextmanager
    def _referee(self, slots: list[int], values: Tensor, failed: Tensor) -> Iterator[Referee]:
        """Whatever decides matches of the rows in slots, whose places are those in `slots`.

        What a judge keeps of them is gone afterwards.
        """
        if self.settings.value is not None:
            scores = values[:, 0].tolist()
            each = zip(failed.tolist(), scores, strict=True)
            fit = [x == x and not bad for bad, x in each]  # x is not NaN.
            yield Referee(fit, lambda pairs: [_by_score(scores[a], scores[b]) for a, b in pairs])
            return
        settings: Any = self.settings
        candidates, judge = self._written(slots), settings.judge
        contexts = [search_of(row).texts[row.request] for row in candidates.rows]
        keeping = getattr(judge, "keeping", None)
        with nullcontext(judge) if keeping is None else keeping() as asked:
            try:
                yield judged(asked, contexts, candidates.texts, failed.tolist())
            finally:
                if keeping is not None:
                    self._add(getattr(asked, "stats", None) or ())

    def _add(self, stats: Sequence[ModelStats]) -> None:
        """Count what a judge has done. Its models are named as those of a value are."""
        ours = (replace(s, names=tuple(map(_of_judge, s.names))) for s in stats)
        self._judged = summed([*self._judged, *ours])


def _of_judge(name: str) -> str:
    return name if name.startswith("judge") else f"judge.{name}"


def _by_score(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)
