"""The forms in which a caller gives a request: a text, a chat, or token ids in many shapes."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import did_you_mean
from ..elsewhere import INPUTS, MESSAGE

MEANT = {**INPUTS, **MESSAGE}  # what is said to keys of messages that are others'
Ids = Sequence[int]
Request = str | list[Any]  # a text, a chat (a list of messages) or a list of token ids


def request(name: str, item: Any, *, words: bool = False) -> Request:
    """One request, checked; `name` is what errors call it. With `words` it may not be token ids.

    Raises:
        TypeError, ValueError: it has another form. NotImplementedError: a chat shows a picture.
    """
    if isinstance(item, str):
        return item
    if is_chat(item):
        return _chat(name, item)
    ids = token_ids(name, item)
    if ids is not None and words:
        raise TypeError(f"{name} is token ids; it must be a text or a chat")
    if ids is not None:
        return ids
    empty = isinstance(item, (Sequence, Tensor)) and not _length(item)
    what = "empty" if empty else repr(item)[:80]
    nested = isinstance(item, (list, tuple)) and all(isinstance(x, str) for x in item)
    says = "; texts stand in one list, ['...', '...']" if nested and not empty else ""
    if nested and len(item) == 2 and item[0].lower() in ("system", "user", "assistant", "human"):
        says = "; a message is {'role': ..., 'content': ...}"
    chat = "a chat (a list of messages with 'role' and 'content')"
    forms = f"a text or {chat}" if words else f"a text, {chat} or a list of token ids"
    raise TypeError(f"{name} is {what}; it must be {forms}{says}")


def token_ids(name: str, x: Any) -> list[int] | None:
    """Token ids as plain ints, from a list, a tensor or an array; None where it is none of these.

    Raises:
        ValueError: one is no id of any model, or a tensor holds no data.
    """
    if isinstance(x, Tensor):
        check_tensor(name, x)
    if hasattr(x, "tolist"):  # a tensor or an array
        x = x.tolist()
    if not isinstance(x, Sequence) or isinstance(x, (str, bytes, bytearray)) or not x:
        return None
    if is_ids(x):
        ids = list(x)
    elif all(map(_is_id, x)):
        ids = list(map(int, x))
    else:
        return None
    for i in (min(ids), max(ids)):
        if not -(2**63) <= i < 2**63:
            raise ValueError(f"{name} has id {i}, which no vocabulary has")
    return ids


def tensor(name: str, x: Any) -> Tensor:
    """Lists of numbers or an array as a tensor on the CPU; a tensor stays as it is."""
    if isinstance(x, Tensor):
        check_tensor(name, x)
        return x
    x = x.tolist() if hasattr(x, "tolist") else x
    try:
        return torch.tensor(x, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{name} is {x!r:.80}; it must be a rectangle of numbers [requests, length], "
            "left-padded: rows of different lengths need no mask"
        ) from error


def check_tensor(name: str, x: Tensor) -> None:
    if x.is_meta or x.layout is not torch.strided:
        what = "on the device meta" if x.is_meta else f"of layout {x.layout}"
        raise ValueError(f"{name} is {what}; it must be a dense tensor with data")


def is_numbers(x: Any) -> bool:
    """Whether this is an array of numbers, as numpy and libraries like it make them."""
    return getattr(getattr(x, "dtype", None), "kind", None) in ("b", "i", "u", "f")


def is_chat(x: Any) -> bool:
    """Whether this is a list of messages, whatever keys they have: `request` checks these."""
    return isinstance(x, (list, tuple)) and bool(x) and all(isinstance(m, Mapping) for m in x)


def is_ids(x: Any) -> bool:
    return (
        isinstance(x, Sequence)
        and bool(x)
        and not isinstance(x, (bytes, bytearray))
        and all(isinstance(i, int) and not isinstance(i, bool) for i in x)
    )


def _is_id(x: Any) -> bool:
    if isinstance(x, Tensor):
        return x.dim() == 0 and not (
            x.is_floating_point() or x.is_complex() or x.dtype == torch.bool
        )
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _length(x: Any) -> int:
    return x.numel() if isinstance(x, Tensor) else len(x)


def _chat(name: str, chat: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A chat whose messages have a role, and a text or the parts of one."""
    for i, message in enumerate(chat):
        where = f"{name}, message {i},"
        calls = message.get("tool_calls")
        for key in ("role", "content"):
            if key not in message and (key == "role" or not calls):
                others = [k for k in message if k not in ("role", "content", "tool_calls")]
                says = next((s for k in others if (s := did_you_mean(k, [key], MEANT))), "")
                raise TypeError(f"{where} has the keys {[*message]}; it must have {key!r}{says}")
        role, content = message["role"], message.get("content")
        if not isinstance(role, str):
            raise TypeError(f"{where} has the role {role!r:.80}; it must be a text")
        if calls is not None and not (
            isinstance(calls, (list, tuple)) and all(isinstance(c, Mapping) for c in calls)
        ):
            raise TypeError(
                f"{where} has the tool_calls {calls!r:.80}; it must be a list of "
                "{'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"
            )
        if content is None and len(message.keys() - {"role", "content"}) > 0:
            continue  # a message that calls tools has no content; the chat template reads the calls
        if isinstance(content, (list, tuple)):
            readable = all(_is_text(where, part) for part in content)
        else:
            readable = isinstance(content, str)
        if not readable:
            raise TypeError(
                f"{where} has the content {content!r:.80}; it must be a text, or a list of parts "
                "{'type': 'text', 'text': ...}"
            )
    return list(chat)


def _is_text(where: str, part: Any) -> bool:
    """Whether a part of a message is text; one of another type is refused by name."""
    if not isinstance(part, Mapping):
        return isinstance(part, str)
    kind = part.get("type")
    if isinstance(kind, str) and kind != "text":
        raise NotImplementedError(
            f"{where} has a part of the type {kind!r}, which is not supported"
        )
    return kind == "text" and isinstance(part.get("text"), str)


def common(a: Ids, b: Ids) -> int:
    """The length of the longest common prefix of two texts."""
    if type(a) is not type(b):
        a, b = list(a), list(b)
    alike, unlike = 0, min(len(a), len(b)) + 1  # lengths of prefixes that are known to be so
    middle = unlike - 1  # That all are alike is the usual case.
    while alike < middle:
        if a[alike:middle] == b[alike:middle]:  # Such comparisons are fast.
            alike = middle
        else:
            unlike = middle
        middle = (alike + unlike) // 2
    return alike
