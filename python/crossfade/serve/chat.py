"""``POST /v1/chat/completions``: its fields, and the forms of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from . import limits
from .answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    Finish,
    Message,
    Usage,
)
from .errors import refused
from .fields import Content, Generation, Name, Strict, few, joined
from .forms import Head, Written
from .service import Service
from .tokens import Token, figures_of

Scalar = bool | int | float | str


class ChatMessage(Strict):
    """A message of a chat. `refusal`, `annotations` and the like are what OpenAI's answers have."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: Annotated[list[dict[str, Any]], few(128)] | None = None
    tool_call_id: Name | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def something_said(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; a message has a text, or calls tools")
        return self

    def for_template(self, knows_developers: bool) -> dict[str, Any]:
        """The message as chat templates take it; a template may not know the role "developer"."""
        role = "system" if self.role == "developer" and not knows_developers else self.role
        found: dict[str, Any] = {"role": role}
        found["content"] = None if self.content is None else joined(self.content)
        for key in ("name", "tool_calls", "tool_call_id"):
            if getattr(self, key) is not None:
                found[key] = getattr(self, key)
        return found


Messages = Annotated[list[ChatMessage], few(limits.MESSAGES, 1)]


class ResponseFormat(Strict):
    """What an answer must be; here it is text."""

    type: Literal["text"]


class ChatRequest(Generation):
    """A chat to answer."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    tools: Annotated[list[dict[str, Any]], few(128)] | None = Field(
        None, description="given to the chat template; a call is a part of the answer's text"
    )
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], few(1, 1)] | None = None
    chat_template_kwargs: Annotated[dict[Name, Scalar], Field(max_length=16)] | None = Field(
        None, description='what the chat template reads besides, such as {"enable_thinking": false}'
    )
    # What OpenAI's API has besides, and is not supported.
    audio: None = None
    functions: None = None
    function_call: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def chat_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is given without logprobs, which it belongs to")
        most = {n for n in (self.max_tokens, self.max_completion_tokens) if n is not None}
        if len(most) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; one of them is enough")
        if "chat_template" in (self.chat_template_kwargs or {}):
            raise ValueError("chat_template_kwargs has chat_template, which is the model's own")
        return self


class ChatForm:
    """A chat on the way to its answer."""

    prefix = "chatcmpl"
    echoes = False

    def __init__(self, asked: ChatRequest, service: Service) -> None:
        if not service.has_chat_template:
            raise refused(
                "messages", "messages need a chat template, which the model does not have"
            )
        self.asked, self.spelling = asked, service.spelling
        self.prompts = [[m.for_template(service.knows_developers) for m in asked.messages]]
        self.drawn = self.kept = asked.n or 1
        self.tops = (asked.top_logprobs or 0) if asked.logprobs else None
        self.most = asked.max_completion_tokens or asked.max_tokens
        self.options: dict[str, Any] = {}
        if asked.tools and asked.tool_choice != "none":
            self.options["tools"] = asked.tools
        if asked.chat_template_kwargs:
            self.options["chat_template_kwargs"] = asked.chat_template_kwargs

    def opening(self, head: Head, index: int) -> ChatChunk:
        return self._chunk(head, index, Delta(role="assistant", content=""))

    def part(self, head: Head, index: int, text: str, tokens: Sequence[Token]) -> ChatChunk:
        return self._chunk(head, index, Delta(content=text), tokens)

    def closing(self, head: Head, written: Written) -> ChatChunk:
        chunk = self._chunk(head, written.index, Delta(), finish=written.finish)
        written.ending(chunk.choices[0])
        return chunk

    def total(self, head: Head, usage: Usage) -> ChatChunk:
        return self._of_choices(head, [], usage)

    def _chunk(
        self,
        head: Head,
        index: int,
        delta: Delta,
        tokens: Sequence[Token] = (),
        finish: Finish | None = None,
    ) -> ChatChunk:
        told = self.tops is not None and len(tokens) > 0
        logprobs = self.spelling.chat_logprobs(tokens) if told else None
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        figures_of(tokens, choice)
        return self._of_choices(head, [choice])

    def _of_choices(
        self, head: Head, choices: list[ChunkChoice], usage: Usage | None = None
    ) -> ChatChunk:
        chunk = ChatChunk(object="chat.completion.chunk", choices=choices, **head._asdict())
        if self.asked.tells_usage:
            chunk.usage = usage
        return chunk

    def whole(self, head: Head, written: Sequence[Written], usage: Usage) -> ChatCompletion:
        choices = []
        for w in written:
            choice = ChatChoice(
                index=w.index,
                message=Message(role="assistant", content=w.text, refusal=None),
                logprobs=None if self.tops is None else self.spelling.chat_logprobs(w.tokens),
                finish_reason=w.finish,
            )
            figures_of(w.tokens, choice)
            w.ending(choice)
            choices.append(choice)
        return ChatCompletion(
            object="chat.completion", choices=choices, usage=usage, **head._asdict()
        )
