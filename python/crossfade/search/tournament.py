"""Tournaments: whole samples that a judge compares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .. import elsewhere
from ..blends.algebra import Algebra
from ..blends.values import Values, ValueSum, as_value, is_function
from ..checks import check_called, explained
from . import base
from .base import Search


@explained(elsewhere.TOURNAMENT)
@dataclass(frozen=True)
class Tournament(Search):
    """Self-rejection: n whole samples play a knock-out tournament, whose matches a judge decides.

    1. n rows a prompt are sampled to their ends. If time is up before, they play with what is
       written so far.
    2. They are put in an order that depends on the seed of the prompt alone.
    3. Neighbours play each other and the losers leave, until one row is left: n - 1 matches in
       ``ceil(log2 n)`` rounds. Where a round has an odd number of rows, the last of those that had
       the fewest byes has one. The matches of a round of all prompts that play are one call of the
       judge.

    Of two rows the judge prefers the one whose probability is above 0.5. At exactly 0.5, and where
    the judge gives NaN, the row in the lower slot wins. Nothing is asked of a row that failed or
    has no text: it loses against any other, and of two such rows the lower slot wins. Nothing is
    asked of two rows with the same text either: their probability is 0.5.

    `Output.bracket` has all matches, and ``num_return_sequences=k`` returns k rows in the order of
    elimination: the winner, the loser of the final, and so on; those of one round in the order of
    the rows that they lost to. `Output.values` is the mean probability of a row's matches.

    Where a value judges, it scores all rows once, and the row with the higher score wins. The
    winner is that of ``BestOfN(n, value)``, but for rows of one score. NaN is the worst, and
    `Output.values` has the scores.

    Args:
        judge: compares texts: a `Judge`, or any object with a method ``prefer(contexts, firsts,
            seconds)`` which gives, for each pair of responses, the probability that the first one
            is preferred, as a list, an array or a tensor. Contexts are texts or chats as the caller
            gave them, token ids decoded; responses are as in `Output.text`. If it has a method
            ``keeping()`` too, a context manager, then what that gives is asked, all rounds of
            prompts that play together the same one: it may keep what it has read, until they are
            over, and its `stats`, a list of `ModelStats`, becomes a part of `Output.stats`.
            Or a value, which scores each response alone, as in `ChunkBeamSearch`.
        n: how many rows are sampled for each prompt.
        budget: the most tokens that are drawn of a prompt, as in `ChunkBeamSearch`; fewer rows
            play where n rows of `max_new_tokens` are more. What a judge reads is not counted.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: self-rejection of SELF-JUDGE (Lee et al., arXiv:2402.11253).
    """

    judge: Any
    n: int = 16
    budget: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        base.check_count("n", self.n)
        base.check_rows("n", self.n)
        object.__setattr__(self, "judge", _as_judge(self.judge))
        base.check_budget(self.budget)

    def __repr__(self) -> str:
        judge = self.judge
        if type(judge).__repr__ is object.__repr__:  # It would print a place in memory.
            judge = type(judge).__name__
        budget = "" if self.budget is None else f", budget={self.budget}"
        return f"Tournament({judge}, n={self.n}{budget})"

    def of_rows(self, rows: int) -> Tournament:
        return replace(self, n=min(rows, self.n))

    @property
    def width(self) -> int:
        return self.n

    @property
    def value(self) -> ValueSum | None:
        """What scores the rows; None if the judge compares them."""
        return self.judge if isinstance(self.judge, ValueSum) else None


def _as_judge(x: Any) -> Any:
    """`x` as what decides matches: an object with `prefer`, or a value."""
    if callable(getattr(x, "prefer", None)) and not isinstance(x, type):
        check_prefer(x)
        return x
    terms = isinstance(x, Algebra) and x._blend().terms
    if isinstance(x, (Values, Algebra)) and not terms:
        return as_value(x)
    what, instead = f"a {type(x).__name__}", ""
    if is_function(x):
        try:
            return as_value(x)
        except TypeError:
            what = f"{getattr(x, '__name__', type(x).__name__)}, a function"
            instead = (
                " or a function of prompts and responses; what compares two responses is to be a "
                "method prefer"
            )
    elif x is None or isinstance(x, (str, int, float)):
        what = repr(x)[:80]
    elif isinstance(x, type):
        what, instead = f"the class {x.__name__}", f"; make one: {x.__name__}(...)"
    elif isinstance(x, nn.Module) or terms:
        what = f"a bare {type(x).__name__}" if isinstance(x, nn.Module) else f"{x}, a blend"
        instead = "; Judge(model, tokenizer=...) lets a model compare"
        if "SequenceClassification" in type(x).__name__:
            instead = "; RewardModel(model, tokenizer) scores texts with it"
    raise TypeError(
        f"judge is {what}; it must be a Judge, an object with prefer(contexts, firsts, seconds), "
        f"or a value such as a RewardModel{instead}"
    )


def check_prefer(judge: Any, name: str = "judge") -> None:
    """Require that `prefer` of a judge takes contexts, firsts and seconds. Errors say `name`.

    Raises:
        TypeError: it takes something else.
    """
    check_called(
        f"{name} is a {type(judge).__name__}, whose prefer is called as prefer(contexts, firsts, "
        "seconds), with three lists",
        judge.prefer,
        3,
    )
