"""Prompts from the command line, from files and from stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .. import reading


def read_lines(source: str) -> list[Any]:
    """The non-empty lines of a file or of stdin (``-``), as texts or as JSON objects.

    They are JSON in a file named ``*.jsonl``, and on stdin if the first one starts with ``{``.
    """
    where = "stdin" if source == "-" else source
    if source.lower().endswith(".json"):
        raise ValueError(f"{where} is JSON; it must be .jsonl with an object a line, or a text")
    text = _read_stdin() if source == "-" else reading.read_text(source)
    lines = text.split("\n")  # not splitlines: JSON may hold other line breaks as they are
    filled = [line for line in lines if line.strip()]
    starts_json = bool(filled) and filled[0].lstrip().startswith("{")
    if not (source.lower().endswith(".jsonl") or (source == "-" and starts_json)):
        return filled
    return reading.parse_json_lines(lines, where)


def _read_stdin() -> str:
    """The text on stdin, in UTF-8 as that of a file, whatever the terminal's encoding is."""
    if sys.stdin is None:
        raise ValueError("stdin is closed; prompts must come from there, or from a file")
    data = getattr(sys.stdin, "buffer", None)  # a text stream put in its place has none
    return sys.stdin.read() if data is None else reading.decode(data.read(), "stdin")


def read_prompts(texts: Sequence[str], source: str | None, *, chat: bool) -> list[Any]:
    """Prompts given on the command line, or from a file or stdin: texts, or chats.

    An object of a ``.jsonl`` has a ``"prompt"`` or a chat's ``"messages"``. `chat`: texts become
    the user's message of a chat.
    """
    if texts and source is not None:
        raise ValueError("prompts are given both as arguments and by --prompts; it must be one")
    if not texts and source is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("no prompts are given; pass them as arguments, by --prompts or on stdin")
    items = list(texts) or read_lines("-" if source is None else source)
    prompts = [prompt_of(item, i, chat=chat) for i, item in enumerate(items)]
    if not prompts:
        raise ValueError("there are no prompts: the input is empty")
    return prompts


def prompt_of(item: Any, index: int, *, chat: bool) -> Any:
    if isinstance(item, dict):
        both = [item[key] for key in ("prompt", "messages") if item.get(key)]
        if len(both) != 1:
            raise ValueError(
                f'prompt {index} has the keys {sorted(item)}; it must have a "prompt" or "messages"'
            )
        item = both[0]
    if isinstance(item, str):
        reading.check_unicode(item, f"prompt {index}")  # of a command line that is not UTF-8
        if not item.strip():
            raise ValueError(f"prompt {index} is empty")
        return [{"role": "user", "content": item}] if chat else item
    if not isinstance(item, list):
        raise ValueError(f"prompt {index} is {item!r:.80}; it must be a text, a chat or token ids")
    return item  # generate and score check what a chat is
