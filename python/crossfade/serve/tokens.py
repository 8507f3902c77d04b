"""Tokens as OpenAI's API shows them: each by itself, as a text and as bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .answers import (
    ChatLogprobs,
    CompletionLogprobs,
    Figures,
    TokenLogprob,
    TopLogprob,
    number,
)
from .contract import Piece


@dataclass(frozen=True)
class Token:
    """A token that was written, or one of a prompt that was scored.

    Attributes:
        logprob: under the blend; None of the first token of a prompt.
        top: the likeliest tokens in its place.
        terms: its log-prob under each term.
        pushes: by how many nats each fader moved it away from the base.
        kl: the divergence of the blend from the base where it was drawn.
    """

    id: int
    logprob: float | None
    top: Mapping[int, float] = field(default_factory=dict)
    terms: Mapping[str, float] | None = None
    pushes: Mapping[str, float] | None = None
    kl: float | None = None


def tokens_of(piece: Piece) -> list[Token]:
    """The tokens of a piece. What was not asked for is empty there."""

    def at(each: Sequence[Any], i: int) -> Any:
        return each[i] if each else None

    return [
        Token(
            token,
            at(piece.logprobs, i),
            at(piece.top_logprobs, i) or {},
            at(piece.term_logprobs, i),
            at(piece.pushes, i),
            at(piece.kl, i),
        )
        for i, token in enumerate(piece.ids)
    ]


def tokens_of_scores(scores: Any, row: int, ids: Sequence[int]) -> list[Token]:
    """The tokens of a text that was scored.

    Args:
        scores: the `crossfade.Scores` of several texts, of which `row` is the number of this one.
    """
    logprobs = scores.logprobs[row].tolist()
    tops: list[dict[int, float]] = [{} for _ in ids]
    if scores.top_tokens is not None:
        pairs = zip(scores.top_tokens[row].tolist(), scores.top_logprobs[row].tolist(), strict=True)
        tops = [dict(zip(t, p, strict=True)) for t, p in pairs]
    return [Token(*each) for each in zip(ids, logprobs, tops, strict=False)]


def figures_of(tokens: Iterable[Token], figures: Figures) -> None:
    """Add to `figures` what was asked for of each token."""
    listed = list(tokens)
    if any(t.terms is not None for t in listed):
        figures.term_logprobs = [_numbers(t.terms) for t in listed]
    if any(t.pushes is not None for t in listed):
        figures.pushes = [_numbers(t.pushes) for t in listed]
    if any(t.kl is not None for t in listed):
        figures.kl_to_base = [None if t.kl is None else number(t.kl) for t in listed]


def _numbers(by_name: Mapping[str, float] | None) -> dict[str, float | None]:
    return {name: number(x) for name, x in (by_name or {}).items()}


class Spelling:
    """What single tokens look like, without what is around them.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text and its bytes in UTF-8; None where the tokenizer does not tell them.

        A token that ends within a character has no text: it is spelled ``bytes:\\xe2\\x80``.
        """
        if token not in self._known:
            self._known[token] = self._spell(token)
        return self._known[token]

    def text(self, token: int) -> str:
        return self(token)[0]

    def _spell(self, token: int) -> tuple[str, list[int] | None]:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a column of the model past the tokenizer's last token
            return f"<{token}>", None
        if piece.startswith(SPACE) and not text.startswith(" "):
            text = f" {text}"  # SentencePiece drops the space of a text's first word
        if "\ufffd" not in text:
            return text, list(text.encode())
        raw = _raw(piece)
        if raw is None:
            return text, None
        return "bytes:" + "".join(f"\\x{b:02x}" for b in raw), list(raw)

    def chat_logprobs(self, tokens: Iterable[Token]) -> ChatLogprobs:
        content = []
        for t in tokens:
            text, raw = self(t.id)
            top = [self._top(i, x) for i, x in _best(t.top)]
            said = None if t.logprob is None else number(t.logprob)
            content.append(TokenLogprob(token=text, logprob=said, bytes=raw, top_logprobs=top))
        return ChatLogprobs(content=content, refusal=None)

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text, raw = self(token)
        return TopLogprob(token=text, logprob=number(logprob), bytes=raw)

    def completion_logprobs(self, tokens: Sequence[Token], offset: int) -> CompletionLogprobs:
        """The log-probs of tokens; `offset` is where the first of them stands in its text.

        The token itself is among the likeliest ones, as in OpenAI's API, whichever rank it has. Of
        two tokens that look alike the likelier one is told.
        """
        texts = [self.text(t.id) for t in tokens]
        tops: list[dict[str, float | None] | None] = []
        for t in tokens:
            if t.logprob is None:
                tops.append(None)
                continue
            top: dict[str, float | None] = {}
            for i, x in _best({**t.top, t.id: t.logprob}):
                top.setdefault(self.text(i), number(x))
            tops.append(top)
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return CompletionLogprobs(
            tokens=texts,
            token_logprobs=[None if t.logprob is None else number(t.logprob) for t in tokens],
            top_logprobs=tops,
            text_offset=offsets,
        )


SPACE = "\u2581"  # what SentencePiece writes for a space


def _best(top: Mapping[int, float]) -> list[tuple[int, float]]:
    return sorted(top.items(), key=lambda item: -item[1])


def _raw(piece: str) -> bytes | None:
    """The bytes of a token that is no whole text: of byte-level BPE, or SentencePiece's <0xE2>."""
    if found := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes([int(found[1], 16)])
    if all(c in BYTES for c in piece):
        return bytes(BYTES[c] for c in piece)
    return None


def _byte_characters() -> dict[str, int]:
    """The bytes by the characters that byte-level BPE writes for them.

    A byte that is a visible character of Latin-1 stands for itself, and the others are the
    characters from 256 on, in their order.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_characters()
