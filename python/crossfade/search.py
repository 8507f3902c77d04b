"""Searches that a value guides, and recipes: what `generate` takes besides a blend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import elsewhere
from .blends.blend import Blend, as_blend
from .blends.printing import settings_text
from .blends.values import ValueSum, as_value
from .checks import explained
from .ops import check

MOST_ROWS = 1024  # of one prompt: the selection kernels take no more


@explained(elsewhere.SEARCH)
@dataclass(frozen=True)
class ChunkBeamSearch:
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
        if self.rows > MOST_ROWS:
            raise ValueError(
                f"width * samples is {self.rows}; it must be at most {MOST_ROWS} rows a prompt"
            )
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

    @property
    def rows(self) -> int:
        """How many rows are decoded for each prompt."""
        return self.width * self.samples


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


def _check_count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} is {number!r}; it must be an int")
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")


def sentence_end(text: str) -> bool:
    """Whether a text ends with a sentence or a line: a `chunk_end` of `ChunkBeamSearch`."""
    return text.rstrip(" \"')]\u2019\u201d").endswith((".", "!", "?", "\u2026", "\n"))


@explained()
@dataclass(frozen=True)
class Recipe:
    """A blend and the search over it: what `generate` takes in place of a blend.

    Args:
        blend: a `Blend`, a `Model` or a bare Hugging Face causal LM.
        search: a `ChunkBeamSearch`.
    """

    blend: Blend
    search: ChunkBeamSearch

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", as_blend(self.blend))
        check_search(self.search)

    @property
    def value(self) -> ValueSum:
        return self.search.value


def check_search(search: Any) -> None:
    """Raise a TypeError unless `search` is one that `generate` knows."""
    if isinstance(search, Recipe):
        raise TypeError(
            "search is a Recipe, which has a blend too; it takes the blend's place: "
            "generate(recipe, inputs)"
        )
    if not isinstance(search, ChunkBeamSearch):
        raise TypeError(
            f"search is a {type(search).__name__}; it must be a ChunkBeamSearch, as "
            "ChunkBeamSearch(value=...) or BestOfN(n, value) gives it"
        )
