"""Prompts from the command line, from files and from stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .. import reading


def read_lines(source: str) -> list[Any]:
    """The lines of a file, or of stdin if `source` is ``-``, without those that are empty.

    The lines of a file named ``*.jsonl`` are read as JSON objects, as are those of stdin if the
    first one starts with ``{``. All others are texts.
    """
    where = "stdin" if source == "-" else source
    if source.lower().endswith(".json"):
        raise ValueError(
            f"{where} is JSON; it must be a .jsonl file with an object on each line, or a text file"
        )
    text = _read_stdin() if source == "-" else reading.read_text(source)
    # `splitlines` would also split at U+2028, which a text in JSON may have.
    lines = text.split("\n")
    filled = [line for line in lines if line.strip()]
    starts_json = bool(filled) and filled[0].lstrip().startswith("{")
    if not (source.lower().endswith(".jsonl") or (source == "-" and starts_json)):
        return filled
    return reading.parse_json_lines(lines, where)


def _read_stdin() -> str:
    """The text on stdin, which is UTF-8 as that of a file is, whatever the locale says."""
    if sys.stdin is None:
        raise ValueError("stdin is closed; prompts must come from there, or from a file")
    data = getattr(sys.stdin, "buffer", None)  # A StringIO in the place of stdin has none.
    return sys.stdin.read() if data is None else reading.decode(data.read(), "stdin")


def read_prompts(texts: Sequence[str], source: str | None, *, chat: bool) -> list[Any]:
    """The prompts in `texts` or, if there are none, those of the file `source` or of stdin.

    Args:
        source: a file as `read_lines` takes it, whose objects have a ``"prompt"`` or the
            ``"messages"`` of a chat; None is stdin.
        chat: whether a text becomes the user's message of a chat.

    Raises:
        ValueError: prompts are given twice, or not at all, or one of them is no prompt.
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
    """The prompt that a line, or its JSON object, is. Errors call it prompt `index`."""
    if isinstance(item, dict):
        both = [item[key] for key in ("prompt", "messages") if item.get(key)]
        if len(both) != 1:
            raise ValueError(
                f'prompt {index} has the keys {sorted(item)}; it must have a "prompt" or "messages"'
            )
        item = both[0]
    if isinstance(item, str):
        reading.check_unicode(item, f"prompt {index}")  # Arguments of a process may be any bytes.
        if not item.strip():
            raise ValueError(f"prompt {index} is empty")
        return [{"role": "user", "content": item}] if chat else item
    if not isinstance(item, list):
        raise ValueError(f"prompt {index} is {item!r:.80}; it must be a text, a chat or token ids")
    return item  # Chats and lists of ids are checked where they are encoded.
