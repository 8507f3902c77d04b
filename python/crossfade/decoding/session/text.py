"""A response as text, as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence

from ..writing import Writing

PARTIAL = "\ufffd"  # what the beginning of a character decodes to
LONGEST = 16  # tokens that may be the beginning of a character


class TextStream:
    """Turns the tokens of one response into text, whole characters alone.

    What may be the beginning of a stop string is held back until it is known not to be one. A stop
    string ends the text, and is no part of it.

    Attributes:
        told: the text that was given so far.

    Args:
        writing: of the request; None: without a tokenizer there is no text.
    """

    def __init__(self, writing: Writing | None, stop_strings: Sequence[str] = ()) -> None:
        self.writing, self.stop_strings = writing, tuple(stop_strings)
        self.told = ""
        self.start = 0  # the tokens before this one are decoded
        self.held = ""  # text that is decoded and was not given
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """The new text of a response that has these tokens by now.

        Args:
            ids: all of its tokens so far.
        """
        if self.writing is None or self.stopped or len(ids) == self.start:
            return ""
        for end in range(len(ids), max(self.start, len(ids) - LONGEST), -1):
            (text,) = self.writing.texts([0], [ids[:end]], [self.start])
            if text and not text.endswith(PARTIAL):
                break
        else:
            if len(ids) - self.start < LONGEST:
                return ""
            end, (text,) = len(ids), self.writing.texts([0], [ids], [self.start])
        self.start = end
        return self._give(self.held + text)

    def end(self, ids: Sequence[int]) -> str:
        """The rest of the text of a response that has ended."""
        text = self.add(ids)
        if self.writing is not None and not self.stopped:
            if self.start < len(ids):
                (rest,) = self.writing.texts([0], [ids], [self.start])
                self.held += rest
            rest = self._cut(self.held)
            if not self.stopped:
                self.told += rest
            self.held, self.start, text = "", len(ids), text + rest
        return text

    def whole(self, ids: Sequence[int]) -> str:
        """All of the text of a response."""
        if self.writing is None:
            return ""
        (text,) = self.writing.texts([0], [ids])
        place = min((p for s in self.stop_strings if (p := text.find(s)) >= 0), default=None)
        return text[:place]

    def _give(self, text: str) -> str:
        """What of the new text can be given: all but what may begin a stop string."""
        given = self._cut(text)
        if self.stopped:
            return given
        longest = max(map(len, self.stop_strings), default=1) - 1
        back = next(
            (
                n
                for n in range(min(longest, len(text)), 0, -1)
                if any(s.startswith(text[-n:]) for s in self.stop_strings)
            ),
            0,
        )
        given, self.held = text[: len(text) - back], text[len(text) - back :]
        self.told += given
        return given

    def _cut(self, text: str) -> str:
        """The text up to a stop string, if it has one."""
        places = [p for s in self.stop_strings if (p := text.find(s)) >= 0]
        if places:
            self.stopped, self.held, text = True, "", text[: min(places)]
            self.told += text
        return text
