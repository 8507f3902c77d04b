"""Chats and texts of others as plain text, for prompts in which they are quoted."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from ..decoding.chats import plain_text
from ..decoding.forms import request


def turns(name: str, context: Any) -> list[tuple[str, str]]:
    """The turns of a context, each as its role with a capital, and what is said in it.

    Calls of tools stand after what is said, each in a line: ``weather({"city": "Paris"})``.

    Args:
        name: what errors call it.
        context: a chat, or a text, which is the user's.

    Raises:
        TypeError, ValueError: it is neither; names it.
    """
    asked = request(name, context, words=True)
    if isinstance(asked, str):
        return [("User", asked)]
    return [(m["role"].capitalize(), _said(m)) for m in asked]


def _said(message: Mapping[str, Any]) -> str:
    text = plain_text(message.get("content")) or ""
    return "\n".join([text] * bool(text) + list(map(_called, message.get("tool_calls") or ())))


def _called(call: Mapping[str, Any]) -> str:
    """A call of a tool, as chat templates take it, as a line."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or "name" not in function:
        return str(function)
    given = function.get("arguments") or {}
    if not isinstance(given, str):
        given = json.dumps(given, default=str, ensure_ascii=False)
    return f"{function['name']}({given})"


def quoted(text: str, tokenizer: Any) -> str:
    """A text that is read as it is spelled: no special token of the tokenizer stands in it.

    Tokenizers take the spelling of a special token, such as ``<|im_end|>``, for the token itself,
    wherever a text has it. So an answer could end the message in which a prompt quotes it, and go
    on in another's name. Here such a spelling gets a space after its first character:
    ``< |im_end|>``.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {token.content for token in added if token.special}
    special.update(getattr(tokenizer, "all_special_tokens", ()))
    return _spelling(tuple(sorted(special))).sub(r"\1 ", text) if special else text


@functools.lru_cache(maxsize=16)
def _spelling(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Finds the first character of each place where one of some tokens is spelled."""
    return re.compile(f"(?={'|'.join(map(re.escape, tokens))})(.)", re.DOTALL)
