"""What decoding asks of a search's settings, and the settings that several searches have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..blends.values import LogRatio, ValueSum, as_value
from ..checks import check_called, check_number

MOST_ROWS = 1024  # of one prompt: the selection kernels take no more


@dataclass(frozen=True, repr=False)
class EntropyAbove:
    """Where a chunk ends: before a token whose distribution has an entropy above so many nats."""

    nats: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "nats", check_number("nats", self.nats))
        if self.nats < 0:
            raise ValueError(f"nats is {self.nats}; it must be at least 0")

    def __repr__(self) -> str:
        return f"entropy_above({self.nats:g})"


def entropy_above(nats: float) -> EntropyAbove:
    """Ends chunks where the next token is uncertain: a `chunk_end` of searches that have chunks.

    A chunk ends before a token whose distribution has an entropy above `nats`, and has at least
    one token. Rows fork there, where their next tokens are most likely to differ. The entropy is
    that of the blend at temperature 1, ``H = -sum_v p(v) log p(v)``, before truncation, as in
    `Output.logprobs`; nothing is decoded to text. `Output.entropies` has it for every token. A row
    reads the last token of its chunk once more when it goes on, which is a step of its own.

    Args:
        nats: at least 0.

    Raises:
        TypeError, ValueError: `nats` is something else.

    Source: the segments of cascade reward sampling (Li et al., arXiv:2406.16306).
    """
    return EntropyAbove(nats)


def sentence_end(text: str) -> bool:
    """Whether a text ends with a sentence or a line: a `chunk_end` of searches that have chunks."""
    return text.rstrip(" \"')]\u2019\u201d").endswith((".", "!", "?", "\u2026", "\n"))


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
    def chunk_end(self) -> Callable[[str], bool] | EntropyAbove | None:
        """What else ends a chunk: a function of its text, or the entropy of the next token."""
        return None

    @property
    def text_end(self) -> Callable[[str], bool] | None:
        """The function of a chunk's text that says whether the chunk ends after it."""
        return None if isinstance(self.chunk_end, EntropyAbove) else self.chunk_end

    @property
    def most_entropy(self) -> float | None:
        """The entropy, in nats, above which a chunk ends before the next token."""
        return self.chunk_end.nats if isinstance(self.chunk_end, EntropyAbove) else None

    @property
    def duplicate_finished(self) -> bool:
        """Whether a row that has ended is continued as well, as copies of itself."""
        return False

    @property
    def value(self) -> ValueSum | None:
        """What scores the rows; None if nothing does."""
        return None

    @property
    def tilt(self) -> LogRatio | None:
        """The log-ratio of what is meant to what proposes; None if the latter is meant."""
        return None

    @property
    def objective(self) -> ValueSum | None:
        """What puts rows in order: the value with the tilt added; None if a judge does."""
        if self.tilt is None:
            return self.value
        return self.tilt._sum() if self.value is None else self.value + self.tilt

    @property
    def selection_temperature(self) -> float:
        """By ``exp(score / selection_temperature)`` the rows that stay are drawn; 0: the best."""
        return 0.0

    @property
    def rows(self) -> int:
        """How many rows are decoded for each prompt."""
        return self.width * self.samples

    @property
    def budget(self) -> int | None:
        """The most tokens that are drawn of a prompt, in all of its rows; None: no such limit."""
        return None

    @property
    def fewest(self) -> int:
        """The rows that the search needs at least."""
        return 1

    def of_rows(self, rows: int) -> Search:
        """The same search with at most so many rows, which are at least `fewest`."""
        raise NotImplementedError

    def within(self, limit: int) -> Search:
        """The search that keeps the budget with rows of up to `limit` tokens.

        Raises:
            ValueError: the budget is smaller than the fewest rows.
        """
        if self.budget is None or self.rows * limit <= self.budget:
            return self
        rows = self.budget // limit
        if rows < self.fewest:
            each = "a row" if self.fewest == 1 else f"{self.fewest} rows"
            raise ValueError(
                f"budget is {self.budget}; it must be at least {self.fewest * limit}, the tokens "
                f"of {each} of max_new_tokens={limit}"
            )
        return self.of_rows(rows)


def check_value(value: Any, tilt: LogRatio | None = None) -> ValueSum | None:
    """What a search chooses by, as a value; None where it chooses by its tilt alone."""
    if value is None and tilt is None:
        raise TypeError(
            "value is None; a search must have one to choose by: a LogRatio, a RewardModel, or "
            "a function of prompts and responses"
        )
    return None if value is None else as_value(value)


def check_objective(search: Search) -> None:
    """Require that a value does not take away all that a tilt adds.

    Raises:
        ValueError: it does, so that all rows are equal.
    """
    objective = search.objective
    if objective is not None and not objective.values:
        raise ValueError(
            f"value is {search.value}, which takes the tilt away again: nothing is left to choose "
            "by"
        )


def check_tilt(tilt: Any) -> LogRatio | None:
    """A tilt, checked, with a name of its own among the parts of the objective."""
    if tilt is None:
        return None
    if not isinstance(tilt, LogRatio):
        raise TypeError(
            f"tilt is a {type(tilt).__name__}; it must be a LogRatio(target, sampler) of the model "
            "that is meant and the one that proposes, or None"
        )
    if tilt.normalize:
        raise ValueError("tilt is normalised by its length, and no ratio of densities then")
    if tilt.beta <= 0:
        raise ValueError(
            f"tilt has the beta {tilt.beta:g}; it must be above 0, or what is meant counts against"
        )
    return replace(tilt, name=tilt.name or "tilt")


def check_chunk_length(number: Any) -> None:
    if number is not None:
        check_count("chunk_length", number)


def check_chunk_end(chunk_end: Any) -> None:
    if chunk_end is None or isinstance(chunk_end, EntropyAbove):
        return
    if not callable(chunk_end) or isinstance(chunk_end, type):
        kind = isinstance(chunk_end, type)
        what = f"the class {chunk_end.__name__}" if kind else f"a {type(chunk_end).__name__}"
        raise TypeError(
            f"chunk_end is {what}; it must be a function of a text, such as "
            "sentence_end, or entropy_above(nats), or None"
        )
    if chunk_end is entropy_above:
        raise TypeError("chunk_end is entropy_above itself; it must have a number: (nats)")
    check_called("chunk_end is called as chunk_end(text)", chunk_end, 1)


def check_count(name: str, number: Any) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} is {number!r}; it must be an int")
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")


def check_budget(budget: Any) -> None:
    if budget is not None:
        check_count("budget", budget)


def check_rows(name: str, rows: int) -> None:
    if rows > MOST_ROWS:
        raise ValueError(f"{name} is {rows}; it must be at most {MOST_ROWS} rows a prompt")
