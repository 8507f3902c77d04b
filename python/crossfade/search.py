"""Searches by a value or a judge, and recipes: what `generate` takes besides a blend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from . import elsewhere
from .blends.algebra import Algebra
from .blends.blend import Blend, as_blend
from .blends.printing import settings_text
from .blends.values import Values, ValueSum, as_value, is_function
from .checks import explained
from .ops import check

MOST_ROWS = 1024  # of one prompt: the selection kernels take no more


class Search:
    """What decoding asks of the settings of every search.

    A search samples `rows` rows of each prompt in chunks. When all of them have stopped, it puts
    them in order, keeps the best `width` and continues each of these `samples` times. What is said
    here is what a search of whole samples says, which is over after its first chunk.
    """

    @property
    def width(self) -> int:
        """How many rows of a prompt stay after a chunk. So many can be returned."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """How many times each of these is continued."""
        return 1

    @property
    def chunk_length(self) -> int | None:
        """The most tokens that a chunk has; None: chunks end where rows do."""
        return None

    @property
    def chunk_end(self) -> Callable[[str], bool] | None:
        """Says of the text of a chunk whether the chunk ends after it."""
        return None

    @property
    def duplicate_finished(self) -> bool:
        """Whether a row that has ended is continued as well, as copies of itself."""
        return False

    @property
    def value(self) -> ValueSum | None:
        """What scores the rows; None if nothing does."""
        return None

    @property
    def rows(self) -> int:
        """How many rows are decoded for each prompt."""
        return self.width * self.samples


@explained(elsewhere.SEARCH)
@dataclass(frozen=True)
class ChunkBeamSearch(Search):
    """Chunk-level beam search: sample in chunks, keep the best rows by a value, fork them.

    1. ``width * samples`` rows a prompt are sampled for a chunk. A row's chunk is shorter if the
       row ends.
    2. The value scores what each row has written so far.
    3. The best `width` rows of each prompt stay, and each is continued `samples` times from step 1.
       The search is over when all rows that stay have ended. It returns the best of them, or with
       ``num_return_sequences=n`` the n best.

    A row that has ended is one candidate. It competes with its fixed score until better rows
    replace it. Of equal rows the one in the lower slot stays, and a value of NaN is the worst.
    Every row draws from the stream of its slot. `samples` = 1 with `width` = n is best of n,
    `width` = 1 is blockwise best-of-n, and ``chunk_length=1`` is a beam search that the value
    guides.

    Args:
        width: how many rows of a prompt stay after a chunk.
        samples: how many times each of them is continued.
        chunk_length: the most tokens that a chunk has; None samples up to the end.
        value: what chooses: a `LogRatio`, `ValueHead`, `RewardModel` or `Reward`, a function that
            is made a `Reward`, or a sum of them.
        chunk_end: a function of the text of a row's chunk so far, such as `sentence_end`, which is
            called after each token and ends the chunk where it returns true. The rows of a prompt
            wait for each other.
        duplicate_finished: whether a row that has ended fills `samples` slots with copies of
            itself, as the paper's code has it. The copies can crowd out rows under way.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: chunk-level beam search (Zhou et al., arXiv:2405.19262); blockwise best-of-n is
    controlled decoding's (Mudgal et al., arXiv:2310.17022).
    """

    width: int = 4
    samples: int = 4
    chunk_length: int | None = 5
    value: Any = None
    chunk_end: Callable[[str], bool] | None = None
    duplicate_finished: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "samples", "chunk_length"):
            number = getattr(self, name)
            if number is not None or name != "chunk_length":
                _check_count(name, number)
        _check_rows("width * samples", self.rows)
        if self.value is None:
            raise TypeError(
                "value is None; a search must have one to choose by: a LogRatio, a RewardModel, or "
                "a function of prompts and responses"
            )
        object.__setattr__(self, "value", as_value(self.value))
        if self.chunk_end is not None and not callable(self.chunk_end):
            raise TypeError(
                f"chunk_end is a {type(self.chunk_end).__name__}; it must be a function or None"
            )
        check.flag("duplicate_finished", self.duplicate_finished)

    def __repr__(self) -> str:
        others = settings_text(self, skip=["width", "samples", "chunk_length", "value"])
        if self.samples == 1 and self.chunk_length is None:
            return f"BestOfN({', '.join([str(self.width), f'value={self.value}', *others])})"
        sizes = [f"{n}={getattr(self, n)}" for n in ("width", "samples", "chunk_length")]
        return f"ChunkBeamSearch({', '.join([*sizes, f'value={self.value}', *others])})"


@explained(elsewhere.SEARCH)
def BestOfN(n: int, value: Any) -> ChunkBeamSearch:
    """Best of n: of n whole samples, the one that the value scores highest.

    It is a `ChunkBeamSearch` of one chunk, and can return up to n rows, the best first.

    Args:
        n: how many rows are sampled for each prompt.
        value: as in `ChunkBeamSearch`.
    """
    _check_count("n", n)
    return ChunkBeamSearch(width=n, samples=1, chunk_length=None, value=value)


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

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: self-rejection of SELF-JUDGE (Lee et al., arXiv:2402.11253).
    """

    judge: Any
    n: int = 16

    def __post_init__(self) -> None:
        _check_count("n", self.n)
        _check_rows("n", self.n)
        object.__setattr__(self, "judge", _as_judge(self.judge))

    def __repr__(self) -> str:
        judge = self.judge
        if type(judge).__repr__ is object.__repr__:  # It would print a place in memory.
            judge = type(judge).__name__
        return f"Tournament({judge}, n={self.n})"

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
    try:
        inspect.signature(judge.prefer).bind([], [], [])
    except TypeError as error:
        raise TypeError(
            f"{name} is a {type(judge).__name__}, whose prefer is called as prefer(contexts, "
            f"firsts, seconds), with three lists, and cannot be: {error}"
        ) from None
    except ValueError:  # What is not written in Python may have no signature.
        pass


def _check_count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} is {number!r}; it must be an int")
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")


def _check_rows(name: str, rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"{name} is {rows}; it must be at most {MOST_ROWS} rows a prompt")


def sentence_end(text: str) -> bool:
    """Whether a text ends with a sentence or a line: a `chunk_end` of `ChunkBeamSearch`."""
    return text.rstrip(" \"')]\u2019\u201d").endswith((".", "!", "?", "\u2026", "\n"))


@explained()
@dataclass(frozen=True)
class Recipe:
    """A blend and the search over it: what `generate` takes in place of a blend.

    Args:
        blend: a `Blend`, a `Model` or a bare Hugging Face causal LM.
        search: a `ChunkBeamSearch` or a `Tournament`.
    """

    blend: Blend
    search: Search

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", as_blend(self.blend))
        check_search(self.search)

    @property
    def value(self) -> ValueSum | None:
        """What scores the rows of the search; None if a judge compares them."""
        return self.search.value


def check_search(search: Any) -> None:
    """Raise a TypeError unless `search` is one that `generate` knows."""
    if isinstance(search, Recipe):
        raise TypeError(
            "search is a Recipe, which has a blend too; it takes the blend's place: "
            "generate(recipe, inputs)"
        )
    if not isinstance(search, Search):
        judges = callable(getattr(search, "prefer", None)) and not isinstance(search, type)
        raise TypeError(
            f"search is a {type(search).__name__}; it must be a search, as "
            "ChunkBeamSearch(value=...), BestOfN(n, value) or Tournament(judge) gives it"
            + "; a judge decides in search=Tournament(judge, n=16)"
            * judges
        )
