"""Pairs of answers from files: two answers to a prompt, of which one may be known to be better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import did_you_mean
from ..decoding.chats import plain_text
from ..decoding.forms import is_chat, is_ids, request
from .prompts import line_of, read_lines

FORMS = (("first", "second"), ("chosen", "rejected"))
KEYS = tuple(key for form in FORMS for key in form)
EITHER = '"first" and "second", or "chosen" and "rejected"'
# What to say of keys that other programs have.
MEANT = {
    **dict.fromkeys(
        (
            *("a", "answer_a", "response_a", "output_a", "output_1", "answer_1", "response_1"),
            *("response_0", "completion_a", "response", "answer", "completion"),
        ),
        'did you mean "first"?',
    ),
    **dict.fromkeys(
        (
            *("b", "answer_b", "response_b", "output_b", "output_2", "answer_2", "response_2"),
            "completion_b",
        ),
        'did you mean "second"?',
    ),
    **dict.fromkeys(("better", "preferred", "winner", "accepted"), 'did you mean "chosen"?'),
    **dict.fromkeys(("worse", "loser", "dispreferred", "reject"), 'did you mean "rejected"?'),
    **dict.fromkeys(
        ("answers", "responses", "completions", "outputs", "candidates"),
        f"a pair has {EITHER}",
    ),
    **dict.fromkeys(("label", "preference"), 'the better one of two answers is "chosen"'),
}


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, and what else its line says.

    Attributes:
        prompt: a text or a chat.
        first, second: the two answers.
        labelled: whether the first one is known to be the better one.
        carried: what goes into its result as it is.
    """

    prompt: Any
    first: str
    second: str
    labelled: bool
    carried: dict[str, Any]


def read_pairs(source: str, *, keep: Sequence[str] = ()) -> list[Pair]:
    """The pairs of a file, or of stdin if `source` is ``-``, a JSON object on each line.

    An object has a ``"prompt"`` or the ``"messages"`` of a chat, and its answers are ``"first"``
    and ``"second"``, or ``"chosen"`` and ``"rejected"``, where it is known which one is better. An
    answer is a text or, as in TRL, a list of one message of the assistant. ``chosen`` and
    ``rejected`` may also be whole chats that differ in the last message; they need no prompt.

    Args:
        keep: keys of these objects that are carried along, besides ``"id"`` and ``"metadata"``.

    Raises:
        ValueError, TypeError: names the pair, what it was and what it must be. OSError: the file
            cannot be read.
    """
    items = read_lines(source)
    if not items:
        raise ValueError("there is nothing to judge: the input is empty")
    return [pair_of(item, i, keep=keep) for i, item in enumerate(items)]


def pair_of(item: Any, index: int, *, keep: Sequence[str] = ()) -> Pair:
    """The pair that a JSON object is. Errors call it pair `index`; `read_pairs` has the rest."""
    where = f"pair {index}"
    if not isinstance(item, dict):
        raise ValueError(
            f'{where} is {item!r:.80}; it must be an object of a .jsonl file, with a "prompt" and '
            f"{EITHER}"
        )
    form = _form(item, where)
    others = {key: x for key, x in item.items() if key not in form}
    answers = [_answer(item[key], f'"{key}" of {where}') for key in form]
    prompts = [before for before, _ in answers]
    if any(before is not None for before in prompts):
        others = _with_prompt(others, prompts, where)
    line = line_of(others, index, keep=keep, known=(), noun="pair")
    prompt = request(f"the prompt of {where}", line.prompt)
    if is_ids(prompt):
        raise TypeError(f"the prompt of {where} is token ids; it must be a text or a chat")
    (_, first), (_, second) = answers
    return Pair(line.prompt, first, second, form == FORMS[1], line.carried)


def _form(item: dict[str, Any], where: str) -> tuple[str, str]:
    """The keys of the two answers."""
    given = [key for key in KEYS if key in item]
    forms = [form for form in FORMS if any(key in item for key in form)]
    if len(forms) > 1:
        raise ValueError(f"{where} has the answers {', '.join(given)}; it must have {EITHER}")
    missing = [key for key in (*forms, FORMS[0])[0] if key not in item]
    if not missing:
        return forms[0]
    wanted = missing if forms else KEYS
    for key in item:
        says = did_you_mean(key, wanted, MEANT)
        if says and key not in (*KEYS, "prompt", "messages", "id", "metadata"):
            raise ValueError(f"{where} has the unknown key {key!r}{says}")
    lacks = f'no "{missing[0]}"' if forms else "no answers"
    raise ValueError(f"{where} has {lacks}; it must have {EITHER}")


def _answer(x: Any, name: str) -> tuple[list[Any] | None, str]:
    """An answer as a text, and the messages before it if it is a whole chat."""
    if isinstance(x, str):
        return None, x
    if not is_chat(x) or x[-1].get("role") != "assistant":
        raise ValueError(
            f"{name} is {x!r:.80}; it must be a text or [one message of the assistant]"
        )
    chat: Any = request(name, x)
    text = plain_text(chat[-1].get("content"))
    if not isinstance(text, str):
        raise ValueError(f"{name} ends with {chat[-1]!r:.80}; its content must be a text")
    return chat[:-1] or None, text


def _with_prompt(others: dict[str, Any], prompts: Sequence[Any], where: str) -> dict[str, Any]:
    """What a line has besides its answers, which are whole chats, with the prompt of these."""
    if prompts[0] != prompts[1]:
        raise ValueError(
            f"{where} has two answers that are chats; they must differ in the last message alone"
        )
    chat = prompts[0]
    for key in ("prompt", "messages"):
        if key in others and others[key] not in (chat, plain_text(chat[-1].get("content"))):
            raise ValueError(
                f'{where} has a "{key}" that is not how its answers, which are chats, begin; '
                "leave it out"
            )
    return {
        "messages": chat,
        **{k: x for k, x in others.items() if k not in ("prompt", "messages")},
    }
