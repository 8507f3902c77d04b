"""What texts and chats have in common on the way to their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from .answers import Answer, Change, Figures, Finish, Usage
from .fields import Generation
from .tokens import Token


class Head(NamedTuple):
    """What every part of an answer begins with."""

    id: str
    created: int
    model: str


@dataclass
class Written:
    """What a request of the session has written.

    Attributes:
        index: its number among the choices of the answer.
        echo: the prompt, where it is a part of the answer.
        tokens: those of the prompt too, where they were scored.
        count: tokens that were written.
        cut: what ended it early: "cancelled" or "timeout".
    """

    index: int
    echo: str = ""
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    count: int = 0
    finish: Finish = "length"
    cut: str | None = None
    changes: list[Change] = field(default_factory=list)
    value: float | None = None

    @property
    def mean_logprob(self) -> float:
        """The mean log-prob of its tokens, by which the best of several is chosen."""
        written = [t.logprob or 0.0 for t in self.tokens[len(self.tokens) - self.count :]]
        return sum(written) / max(1, len(written))

    def ending(self, figures: Figures) -> None:
        """Add to `figures` what is known at the end alone."""
        if self.changes:
            figures.changes = self.changes
        if self.cut is not None:
            figures.cut = self.cut
        if self.value is not None:
            figures.value = self.value


class Form(Protocol):
    """What requests for texts and for chats do differently.

    Attributes:
        asked: the fields.
        prefix: what the ids of answers begin with.
        prompts: what is decoded, each an input of a session.
        drawn, kept: how many texts are written to each prompt, and how many of them are given.
        tops: how many tokens are told beside each one; None: log-probs are not asked for.
        echoes: whether the prompt is a part of the answer.
        most: the limit of tokens that is asked for; None: that of the server.
        options: arguments of `Session.submit` that only this form has.
    """

    @property
    def asked(self) -> Generation: ...
    @property
    def prefix(self) -> str: ...
    @property
    def prompts(self) -> Sequence[Any]: ...
    @property
    def drawn(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def tops(self) -> int | None: ...
    @property
    def echoes(self) -> bool: ...
    @property
    def most(self) -> int | None: ...
    @property
    def options(self) -> dict[str, Any]: ...

    def opening(self, head: Head, index: int) -> Answer | None:
        """What a stream says of a text before anything of it is written."""

    def part(self, head: Head, index: int, text: str, tokens: Sequence[Token]) -> Answer:
        """What a stream says of the next tokens of a text."""

    def closing(self, head: Head, written: Written) -> Answer:
        """What a stream says of a text that has ended."""

    def total(self, head: Head, usage: Usage) -> Answer:
        """What a stream says at its end, if it is asked for."""

    def whole(self, head: Head, written: Sequence[Written], usage: Usage) -> Answer:
        """The answer that is not streamed."""
