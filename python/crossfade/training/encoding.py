"""Rows of texts as token ids, the very ones that decoding and scoring read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .. import reading
from ..decoding.inputs import encode, left_pad
from ..decoding.writing import Writing
from .rows import check_message


def encoded(
    prompt: Any, completion: Any, tokenizer: Any, finished: bool, name: str
) -> tuple[list[int], list[int]]:
    """The ids of a prompt, which is a text or a chat, and of the completion that follows it.

    They are the ids that `crossfade.score` would read, so that a model learns of the very tokens
    that it will be asked about. A finished completion ends with EOS, one that was cut does not.

    Raises:
        TypeError, ValueError: names the row, what it was and what it must be.
    """
    completion = content_of(completion, f"completion of {name}")
    chat = isinstance(prompt, (list, tuple))
    if not isinstance(completion, str) or not (isinstance(prompt, str) or (chat and prompt)):
        raise TypeError(
            f"{name} has the prompt {prompt!r:.80} and the completion {completion!r:.80}; they "
            "must be texts or lists of messages"
        )
    reading.check_unicode([prompt, completion], name)
    if chat:
        prompt = list(prompt)
        for i, message in enumerate(prompt):
            check_message(message, f"message {i} in prompt of {name}")
    before = encode(prompt, tokenizer, name)
    prompts = replace(left_pad([before]), items=[prompt])
    (after,) = Writing(tokenizer, prompts).tokens([0], [completion])
    eos = getattr(tokenizer, "eos_token_id", None)
    if finished:
        if eos is None:
            raise ValueError(f"{name} is finished, and the tokenizer has no EOS; give token ids")
        if after[-1:] != [eos]:
            after.append(eos)
    return before, after


def content_of(completion: Any, name: str) -> Any:
    """The content of a completion that is one message of the assistant; any other as it is.

    Raises:
        ValueError: it is a list of other messages.
    """
    if not isinstance(completion, (list, tuple)):
        return completion
    if (
        len(completion) != 1
        or not isinstance(completion[0], Mapping)
        or completion[0].get("role") != "assistant"
    ):
        raise ValueError(f"{name} is {completion!r:.80}; it must be one message of the assistant")
    return completion[0].get("content")
