"""Text on stdout while it is written."""

from __future__ import annotations

import sys
from typing import Any


class Printer:
    """A streamer for `generate` that prints the response of one request, token by token.

    Args:
        tokenizer: of the first term.
        chat: whether the response is an answer, which is printed without white space before it.
    """

    def __init__(self, tokenizer: Any, *, chat: bool) -> None:
        self.tokenizer, self.at_start = tokenizer, chat
        self.before: list[int] | None = None  # the prompt, and the tokens that have been printed
        self.new: list[int] = []

    def put(self, tokens: Any) -> None:
        """Take the prompt first, then a token at a time."""
        if self.before is None:
            self.before = tokens.flatten().tolist()
            return
        self.new += tokens.tolist()
        self._print(whole=False)

    def end(self) -> None:
        self._print(whole=True)

    def _print(self, *, whole: bool) -> None:
        from ..decoding.writing import text_after

        (text,) = text_after(self.tokenizer, [self.before or []], [self.new])
        if not text or (text.endswith("\ufffd") and not whole):
            return  # The next token may end the character that these have begun.
        self.before, self.new = [*(self.before or []), *self.new], []
        text = text.lstrip() if self.at_start else text
        self.at_start = self.at_start and not text
        sys.stdout.write(text)
        sys.stdout.flush()
