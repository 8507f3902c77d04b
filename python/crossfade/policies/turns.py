"""A chat as plain text, for prompts in which another conversation is quoted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..decoding.chats import plain_text
from ..decoding.forms import request


def turns(name: str, context: Any) -> list[tuple[str, str]]:
    """The turns of a context, each as its role with a capital, and what is said in it.

    Args:
        name: what errors call it.
        context: a chat, or a text, which is the user's.

    Raises:
        TypeError, ValueError: it is neither; names it.
    """
    asked = request(name, context)
    if isinstance(asked, str):
        return [("User", asked)]
    if not isinstance(asked[0], Mapping):
        raise TypeError(f"{name} is token ids; it must be a text or a chat")
    return [(m["role"].capitalize(), plain_text(m.get("content")) or "") for m in asked]
