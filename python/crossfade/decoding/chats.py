"""Chats as texts: what chat templates are given, and what is asked of them beforehand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import did_you_mean
from ..elsewhere import ROLES
from .forms import Request, is_chat

KNOWN_ROLES = ("system", "user", "assistant", "tool", "developer")
# Arguments of `apply_chat_template` that are set here.
SET_HERE = {
    *("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


def template_arguments(tools: Any, chat_template_kwargs: Any) -> dict[str, Any]:
    """What chat templates are given besides the chat, checked.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    found: dict[str, Any] = {}
    if chat_template_kwargs is not None:
        if not isinstance(chat_template_kwargs, Mapping):
            kind = type(chat_template_kwargs).__name__
            raise TypeError(
                f"chat_template_kwargs is a {kind}; it must be a mapping of names to values, such "
                "as {'enable_thinking': False}"
            )
        found |= chat_template_kwargs
        for name in found:
            if not isinstance(name, str):
                raise TypeError(f"chat_template_kwargs has the key {name!r:.80}; it must be a str")
            if name in SET_HERE:
                raise ValueError(
                    f"chat_template_kwargs has {name!r}, which follows from the request; leave it "
                    "out"
                )
        if "tools" in found:
            raise ValueError("chat_template_kwargs has 'tools'; pass them as tools=[...]")
    if tools is None:
        return found
    if not isinstance(tools, (list, tuple)):
        raise TypeError(
            f"tools is a {type(tools).__name__}; it must be a list of functions, or of their JSON "
            "schemas"
        )
    for i, tool in enumerate(tools):
        if not callable(tool) and not isinstance(tool, Mapping):
            raise TypeError(
                f"tools[{i}] is {tool!r:.80}; it must be a function, or its JSON schema: "
                "{'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
            )
    return found | {"tools": list(tools)} if tools else found


def render(
    chat: list[Any],
    tokenizer: Any,
    arguments: Mapping[str, Any] | None = None,
    *,
    whole: bool = False,
) -> str:
    """A chat as a text, made by the tokenizer's chat template.

    A chat whose last message is the assistant's stays open, so that decoding goes on with that
    message, as in pipelines of transformers; with `whole` it is closed. Any other chat is followed
    by the start of an answer.

    Args:
        arguments: what the template is given besides, as `template_arguments` makes it.
    """
    answering = chat[-1]["role"] != "assistant"
    if not answering and not whole and chat[-1].get("content") is None:
        raise ValueError(
            "its last message has the assistant's tool calls and no content; a message with the "
            "role 'tool' must follow, which says what the tool gave"
        )
    _check_messages(chat, template_of(tokenizer, arguments))

    def text_of(chat: list[Any]) -> str:
        return tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=answering,
            continue_final_message=not answering and not whole,
            **(arguments or {}),
        )

    if any(m.get("content") is None for m in chat):
        chat = _with_contents(chat, text_of)
    text = text_of(chat)
    # A template that does not know contents in parts prints their list as Python would. Such
    # contents are given to it again, as one text each.
    printed = [isinstance(m.get("content"), list) and str(m["content"]) in text for m in chat]
    if any(printed):
        return text_of([{**m, "content": plain_text(m["content"])} for m in chat])
    return text


def _with_contents(chat: list[Any], text_of: Any) -> list[Any]:
    """A chat for a template that fails at a message without content, or prints it as "None".

    Such messages are given to it with an empty text. Others are left as they are.
    """
    empty = [m if m.get("content") is not None else {**m, "content": ""} for m in chat]
    try:
        text = text_of(chat)
    except Exception:  # A template is a program, which may raise whatever it likes.
        return empty
    return empty if text.count("None") > text_of(empty).count("None") else chat


def template_of(tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> str | None:
    """The text of the template that `render` uses; None if the tokenizer does not show it."""
    own = (arguments or {}).get("chat_template")
    if own is not None or not hasattr(tokenizer, "get_chat_template"):
        return own
    try:
        return tokenizer.get_chat_template(tools=(arguments or {}).get("tools"))
    except ValueError:  # There is none, which is said when one is needed.
        return None


def _check_messages(chat: list[Any], template: str | None) -> None:
    """Refuse what a template would silently write as it is, or leave out.

    Raises:
        ValueError: names the message.
    """
    if template is None:
        return
    for i, message in enumerate(chat):
        role = message["role"]
        says = did_you_mean(role, KNOWN_ROLES, ROLES)
        if role not in KNOWN_ROLES and says and not _has_word(template, role):
            raise ValueError(f"message {i} has the role {role!r}, which is not in it{says}")
        if message.get("tool_calls") and not _has_word(template, "tool_calls"):
            raise ValueError(
                f"message {i} has tool_calls, and it has no place for them; a model that was "
                "trained to call tools has one in its chat template"
            )


def check_read(
    arguments: Mapping[str, Any],
    members: Sequence[tuple[str, Any, Sequence[Request] | None]],
    numbers: Sequence[int],
) -> None:
    """Refuse arguments of chat templates that no template reads.

    Args:
        members: of each model of a call its name, its tokenizer and what it reads of the requests;
            None for token ids.
        numbers: the places of the requests in the caller's list.

    Raises:
        ValueError: a request is no chat for any model, or an argument is in no template.
    """
    if not arguments:
        return
    given = ", ".join(
        "tools" if n == "tools" else f"chat_template_kwargs[{n!r}]" for n in arguments
    )
    for i, number in enumerate(numbers):
        if not any(items is not None and is_chat(items[i]) for _, _, items in members):
            raise ValueError(
                f"request {number} is no chat, and {given} is for chat templates; it must be a "
                "list of messages: [{'role': 'user', 'content': ...}]"
            )
    texts = {
        name: text
        for name, tokenizer, items in members
        if items is not None and any(map(is_chat, items))
        if (text := template_of(tokenizer, arguments)) is not None
    }
    whose = ", ".join(texts)
    for name in arguments:
        if name == "chat_template" or not texts:
            continue
        if any(_has_word(text, name) for text in texts.values()):
            continue
        if name == "tools":
            raise ValueError(f"tools are given, and the chat template of {whose} reads none")
        words = {w for text in texts.values() for w in re.findall(r"\w+", text)}
        raise ValueError(
            f"chat_template_kwargs has {name!r}, which the chat template of {whose} does not read"
            f"{did_you_mean(name, words)}"
        )


def _has_word(template: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", template) is not None


def plain_text(content: Any) -> Any:
    """The content of a message as one text, if it is a list of parts; else as it is."""
    if isinstance(content, (list, tuple)):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return content
