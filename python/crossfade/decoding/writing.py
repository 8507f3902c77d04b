"""From the tokens of a response to its text and back. Both depend on what stands before it.

Tokenizers treat the beginning of a text unlike its middle. A SentencePiece tokenizer writes a space
before the first word of a text and takes it off when it decodes, a WordPiece one marks what goes on
with a word, and a character may begin in one token and end in the next. So nothing here encodes or
decodes a response alone: it is always read after its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..reading import check_unicode
from .chats import render
from .forms import Ids, Request, is_ids, token_ids
from .inputs import Prompts

# A response is decoded after the last tokens of its prompt, so many of them, and encoded after the
# last characters of its prompt.
TOKENS = 64
CHARACTERS = 256
# A response that would share a token with the end of its prompt is encoded after one of these.
ANCHORS = ("\n", "a", "0", ".")


def text_after(tokenizer: Any, before: Sequence[Ids], new: Sequence[Ids]) -> list[str]:
    """What `new` tokens add to the text of those before them, without special tokens.

    The tokens before are decoded alone, and together with the new ones. What the two texts begin
    with alike is cut off the second. So the text before and the one given back make the whole
    text. A character that begins in the tokens before and ends in the new ones is new.
    """
    if not new:
        return []
    begun = [b[-TOKENS:] for b in before]
    heads = tokenizer.batch_decode(begun, skip_special_tokens=True)
    for i, ids in enumerate(before):
        # Where the end of a prompt holds no text, or begins within a character, take more of it.
        while len(begun[i]) < len(ids) and (not heads[i] or heads[i].startswith("\ufffd")):
            begun[i] = ids[-2 * len(begun[i]) :]
            heads[i] = tokenizer.decode(begun[i], skip_special_tokens=True)
    whole = tokenizer.batch_decode(
        [[*b, *n] for b, n in zip(begun, new, strict=True)], skip_special_tokens=True
    )
    return [text[_agree(head, text) :] for head, text in zip(heads, whole, strict=True)]


def tokens_after(tokenizer: Any, before: Sequence[str], texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts where they follow those before them.

    The text before is encoded alone, and together with the text. Where the tokens of both begin
    with those of the first, the rest of them is the answer. Else a token would span the boundary,
    and the text is encoded after a character of `ANCHORS` that it shares no token with: without
    one a tokenizer might put a space before it, as before any beginning of a text. The first
    anchor counts whose tokens, decoded after what is before the text, read as the text.
    """
    begun = [b[-CHARACTERS:] for b in before]
    heads = _encode(tokenizer, begun)
    both = _encode(tokenizer, [b + text for b, text in zip(begun, texts, strict=True)])
    return [
        _rest(head, whole) or _apart(tokenizer, head, text)
        for head, whole, text in zip(heads, both, texts, strict=True)
    ]


def _apart(tokenizer: Any, head: Ids, text: str) -> list[int]:
    """The tokens of a text which, encoded together with that of `head`, would share one with it."""
    anchored = _encode(tokenizer, [*ANCHORS, *(anchor + text for anchor in ANCHORS), text])
    alone = anchored.pop()
    found = [_rest(anchored[i], anchored[i + len(ANCHORS)]) for i in range(len(ANCHORS))]
    found = [ids for ids in (*found, alone) if ids]
    read = text_after(tokenizer, [head] * len(found), found)
    alike = [ids for ids, back in zip(found, read, strict=True) if back == text]
    return next(iter(alike or found), [])


def given_tokens(
    name: str, given: Any, request: int, writing: Writing | None, vocabulary: int
) -> list[int]:
    """The token ids of a response that the caller gives, as a text or as ids; maybe none.

    Raises:
        TypeError, ValueError: names what is given, what it was and what it must be.
    """
    if not isinstance(given, str):
        ids = token_ids(name, given)
        empty = hasattr(given, "__len__") and len(given) == 0
        if ids is None and not empty:
            raise TypeError(f"{name} is {given!r:.80}; it must be a text or token ids")
        found = ids or []
    elif writing is None:
        what = name.partition("[")[0]
        raise ValueError(f"tokenizer is None; texts as {what} need one (or give ids)")
    else:
        check_unicode(given, name)
        (found,) = writing.tokens([request], [given])
    outside = [t for t in found if not 0 <= t < vocabulary]
    if outside:
        raise ValueError(f"{name} has id {outside[0]}; ids must be within [0, {vocabulary})")
    return list(found)


def _rest(head: list[int], whole: list[int]) -> list[int]:
    """What `whole` has after `head`; nothing where it does not begin with it."""
    return whole[len(head) :] if whole[: len(head)] == head else []


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return list(map(list, tokenizer(texts, add_special_tokens=False)["input_ids"]))


def as_text(ids: Sequence[Any], tokenizer: Any) -> str:
    """Token ids as a text that can be encoded anew, by this tokenizer or by another.

    A BOS that the tokenizer puts before every text is left out, as the tokenizer that encodes the
    text puts its own there. Other special tokens stay in the text, as they are spelled.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    added = bos is not None and list(ids[:1]) == [bos] == tokenizer("")["input_ids"][:1]
    return tokenizer.decode(ids[1:] if added else ids)


def as_texts(items: Sequence[Request], tokenizer: Any) -> list[Request]:
    """Requests as texts and chats: those given as ids are decoded."""
    return [as_text(x, tokenizer) if is_ids(x) else x for x in items]


def answer_lead(tokenizer: Any, chat: list[Any], prompt: str, arguments: Mapping[str, Any]) -> str:
    """The white space that a chat template puts between the start of an answer and its content.

    `prompt` is the text that the template makes of the chat and its other `arguments`. White space
    after it belongs to the template, as in ``[/INST] Hello``, where the answer is ``Hello``.
    """
    if chat[-1]["role"] == "assistant":
        return ""
    content = "crossfade"
    try:
        whole = tokenizer.apply_chat_template(
            [*chat, {"role": "assistant", "content": content}], tokenize=False, **arguments
        )
    except Exception:  # A template may raise anything at an answer that it does not expect.
        return ""
    lead = whole[len(prompt) : whole.rfind(content)] if whole.startswith(prompt) else ""
    return lead if lead.isspace() else ""


class Writing:
    """Turns responses to given prompts from tokens into texts and back.

    The text of a prompt, followed by that of its response, is the text of both. Where a prompt was
    given as a text that ends in white space, and its tokens do not have that, it is left out of the
    response's text.

    Args:
        tokenizer: of the tokens of prompts and responses.
    """

    def __init__(self, tokenizer: Any, prompts: Prompts) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts.unpadded()
        self.items: Sequence[Request] = prompts.items or self.prompts
        self.chat = prompts.chat
        self._openings: dict[int, Opening] = {}

    def texts(
        self, requests: Sequence[int], tokens: Sequence[Ids], starts: Sequence[int] | None = None
    ) -> list[str]:
        """The text of each request's response, or of its tokens from ``starts[i]`` on."""
        starts = [0] * len(tokens) if starts is None else starts
        rows = list(zip(requests, tokens, starts, strict=True))
        found = text_after(
            self.tokenizer,
            [[*self.prompts[r], *ids[:start]] for r, ids, start in rows],
            [ids[start:] for _, ids, start in rows],
        )
        skipped = ["" if start else self._opening(r).skipped for r, _, start in rows]
        return [text[_agree(text, skip) :] for text, skip in zip(found, skipped, strict=True)]

    def tokens(self, requests: Sequence[int], texts: Sequence[str]) -> list[list[int]]:
        """The tokens of responses, given as texts: `texts` gives these texts for them."""
        openings = [self._opening(r) for r in requests]
        return tokens_after(
            self.tokenizer,
            [o.text for o in openings],
            [o.lead + text for o, text in zip(openings, texts, strict=True)],
        )

    def _opening(self, request: int) -> Opening:
        if request not in self._openings:
            item, ids = self.items[request], self.prompts[request]
            if is_ids(item):
                opening = Opening(as_text(item, self.tokenizer), "", "")
            else:
                text = item if isinstance(item, str) else render(item, self.tokenizer, self.chat)
                lead = (
                    ""
                    if isinstance(item, str)
                    else answer_lead(self.tokenizer, item, text, self.chat)
                )
                end = text[len(text.rstrip()) :]
                kept = self.tokenizer.decode(ids[-TOKENS:], skip_special_tokens=True) if end else ""
                opening = Opening(text, lead, lead if kept[-1:].isspace() else end + lead)
            self._openings[request] = opening
        return self._openings[request]


class Opening(NamedTuple):
    """What stands before a response, as text.

    Attributes:
        text: the prompt.
        lead: the white space that the chat template puts between the prompt and an answer.
        skipped: white space that belongs to the prompt or the template. It is left out of the
            response's text even where the response's tokens write it.
    """

    text: str
    lead: str
    skipped: str


def _agree(a: str, b: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
