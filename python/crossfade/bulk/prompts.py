"""Prompts from the command line, from files and from stdin."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import reading
from ..checks import did_you_mean
from .settings import SETTINGS, check_settings

CARRIED = ("id", "metadata")  # keys of whoever made the file, which go into the results as they are
# What to say of keys that other programs have.
MEANT = {
    **dict.fromkeys(
        ("text", "context", "question", "query", "instruction", "input"), 'did you mean "prompt"?'
    ),
    **dict.fromkeys(("chat", "conversation", "history"), 'did you mean "messages"?'),
    "blend": 'it is one for all prompts, given by --blend; "weights" sets its faders',
}
MEANT_OF_WRITING = {  # where texts are written
    "max_tokens": 'did you mean "max_new_tokens"?',
    "max_length": 'did you mean "max_new_tokens"?',
    "stop_strings": 'did you mean "stop"?',
    "stop_sequences": 'did you mean "stop"?',
    "n": "it is one for all prompts, given by --n",
    "num_return_sequences": "it is one for all prompts, given by --n",
}


def read_lines(source: str) -> list[Any]:
    """The lines of a file, or of stdin if `source` is ``-``, without those that are empty.

    The lines of a file named ``*.jsonl`` are read as JSON objects, as are those of stdin if the
    first one starts with ``{``. All others are texts.
    """
    where = "stdin" if source == "-" else source
    if source.lower().endswith((".json", ".csv", ".tsv")):
        kind = "JSON" if source.lower().endswith(".json") else "a table"
        raise ValueError(
            f"{where} is {kind}; it must be a .jsonl file with an object on each line, or a text "
            "file"
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


@dataclass(frozen=True)
class Line:
    """A prompt, and what else its line says.

    Attributes:
        prompt: a text, a chat or token ids.
        settings: how this one is decoded, by the names of `settings.SETTINGS`.
        carried: what goes into its result as it is.
    """

    prompt: Any
    settings: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, Any] = field(default_factory=dict)

    def sent(self, *, chat: bool) -> Any:
        """What the models read: if `chat`, a text becomes a user's message; a line's own system
        prompt makes a chat of any text, and comes before other messages."""
        system = self.settings.get("system")
        if not isinstance(self.prompt, str):
            chatting = self.prompt
        elif chat or system is not None:
            chatting = [{"role": "user", "content": self.prompt}]
        else:
            return self.prompt
        return chatting if system is None else [{"role": "system", "content": system}, *chatting]


def read_prompts(
    texts: Sequence[str], source: str | None, *, keep: Sequence[str] = ()
) -> list[Line]:
    """The prompts in `texts` or, if there are none, those of the file `source` or of stdin.

    Args:
        source: a file as `read_lines` takes it, whose objects have a ``"prompt"`` or the
            ``"messages"`` of a chat; None is stdin.
        keep: keys of these objects that are carried along, as those of `CARRIED` are.

    Raises:
        ValueError: prompts are given twice, or not at all, or one of them is no prompt, or has an
            unknown key or a setting that it must not have.
    """
    if texts and source is not None:
        raise ValueError("prompts are given both as arguments and by --prompts; it must be one")
    if not texts and source is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("no prompts are given; pass them as arguments, by --prompts or on stdin")
    items = list(texts) or read_lines("-" if source is None else source)
    lines = [line_of(item, i, keep=keep) for i, item in enumerate(items)]
    if not lines:
        raise ValueError("there are no prompts: the input is empty")
    return lines


def line_of(
    item: Any,
    index: int,
    *,
    keep: Sequence[str] = (),
    known: Collection[str] = SETTINGS,
    noun: str = "prompt",
) -> Line:
    """What a line says, which is a text or a JSON object. Errors call it prompt `index`.

    Args:
        keep: as in `read_prompts`.
        known: the settings that an object may have.
        noun: what errors call it in place of a prompt.
    """
    where = f"{noun} {index}"
    if not isinstance(item, dict):
        return Line(prompt_of(item, where))
    carried = {key: item[key] for key in (*CARRIED, *keep) if key in item}
    found = {key: item[key] for key in known if key in item}
    for key in item:
        if key not in (*carried, *found, "prompt", "messages"):
            meant = MEANT | (MEANT_OF_WRITING if "max_new_tokens" in known else {})
            near = did_you_mean(key, ("prompt", "messages", *known), meant)
            what = near or '; what is not for the models goes under "metadata", or by --keep KEY'
            raise ValueError(f"{where} has the unknown key {key!r}{what}")
    try:
        settings = check_settings(found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    line = Line(prompt_of(item, where), settings, carried)
    if "system" in settings and not isinstance(line.prompt, str):
        first = line.prompt[0]
        if not isinstance(first, dict) or first.get("role") == "system":
            what = "a system message" if isinstance(first, dict) else "token ids"
            raise ValueError(f'{where} has a "system" and {what}; it must have one of them')
    return line


def prompt_of(item: Any, where: str) -> Any:
    """The prompt that a line, or its JSON object, is. Errors call it `where`."""
    if isinstance(item, dict):
        keys = [key for key in ("prompt", "messages") if key in item]
        both = [item[key] for key in keys if item[key]]
        if len(keys) == 1 and item[keys[0]] in ("", []):
            raise ValueError(f'the "{keys[0]}" of {where} is empty')
        if len(both) != 1:
            raise ValueError(
                f'{where} has the keys {sorted(item)}; it must have a "prompt" or "messages"'
            )
        item = both[0]
    if isinstance(item, str):
        reading.check_unicode(item, where)  # Arguments of a process may be any bytes.
        if not item.strip():
            raise ValueError(f"{where} is empty")
        return item
    if not isinstance(item, list):
        raise ValueError(f"{where} is {item!r:.80}; it must be a text, a chat or token ids")
    return item  # Chats and lists of ids are checked where they are encoded.
