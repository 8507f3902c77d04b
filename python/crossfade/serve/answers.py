"""The forms of answers: OpenAI's, with the fields that crossfade adds where they are asked for.

An answer has the fields that it was made with. So those that OpenAI's API always has are given even
where they are None, and those of crossfade only on demand.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel

LEAST = -9999.0  # stands for minus infinity, which JSON lacks, as in OpenAI's API


def number(x: float) -> float | None:
    """A figure as JSON can have it: infinities become large numbers, NaN becomes null."""
    return None if math.isnan(x) else max(LEAST, min(-LEAST, x))


class Answer(BaseModel):
    """What is sent, with what it was made with."""

    def json_bytes(self) -> bytes:
        return self.model_dump_json(exclude_unset=True).encode()


class CompletionDetails(BaseModel):
    """What drafts guessed: tokens that were drawn, and tokens that were not."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int
    reasoning_tokens: int
    audio_tokens: int


class Usage(BaseModel):
    """What a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: CompletionDetails


class Change(BaseModel):
    """Faders that were moved while a text was written, and its tokens by then."""

    tokens: int
    weights: dict[str, float]


class TopLogprob(BaseModel):
    """A token, and how likely the blend finds it."""

    token: str
    logprob: float | None
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of a text, and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """The tokens of a text, as lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]
    text_offset: list[int]


class Figures(BaseModel):
    """What crossfade tells of a text besides, each list with an entry a token.

    Attributes:
        term_logprobs: by the name of each term.
        pushes: by the name of each fader, or else of each term, in nats.
        kl_to_base: in nats.
        value: what the search thought of the text.
        changes: faders that were moved while it was written.
        cut: what ended a text before its end or its limit: "cancelled" or "timeout".
    """

    term_logprobs: list[dict[str, float | None]] | None = None
    pushes: list[dict[str, float | None]] | None = None
    kl_to_base: list[float | None] | None = None
    value: float | None = None
    changes: list[Change] | None = None
    cut: str | None = None


Finish = Literal["stop", "length"]


class Message(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(BaseModel):
    """What the assistant says more."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(Figures):
    """An answer to a chat."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: Finish


class ChatCompletion(Answer):
    """The answers to a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChunkChoice(Figures):
    """A part of an answer to a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None


class ChatChunk(Answer):
    """A part of the answers to a chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionChoice(Figures):
    """A text, or a part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None


class Completion(Answer):
    """Texts, or parts of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


def schema_of_stream(chunk: type[BaseModel]) -> dict[str, Any]:
    """What the OpenAPI document says of each event of a stream."""
    what = f"a {chunk.__name__} or an error as JSON; the last one is [DONE]"
    data = {"type": "string", "description": what}
    return {"schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
