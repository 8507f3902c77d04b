"""``POST /v1/completions``: its fields, and the forms of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from . import limits
from .answers import Completion, CompletionChoice, Usage
from .fields import Generation, Text, TokenId, few
from .forms import Head, Written
from .service import Service
from .tokens import Token, figures_of

SHORT = 16  # tokens that OpenAI's API writes where a request does not say how many
Ids = Annotated[list[TokenId], few(1 << 20, 1)]


class CompletionRequest(Generation):
    """Texts to go on with."""

    prompt: (
        Text
        | Annotated[list[Text], few(limits.PROMPTS, 1)]
        | Ids
        | Annotated[list[Ids], few(limits.PROMPTS, 1)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(
        None, description=f"{SHORT} if it is not given; at 0 the prompt alone is scored"
    )
    best_of: Annotated[int, Field(ge=1, le=limits.CHOICES)] | None = Field(
        None, description="write so many texts, and give the n likeliest"
    )
    logprobs: Annotated[int, Field(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    echo: bool | None = Field(None, description="give the prompt too, and its log-probs")
    suffix: None = None  # OpenAI's API has it, and it is not supported

    @model_validator(mode="after")
    def texts_together(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError(f"best_of is {self.best_of}; it must be at least n, {self.n}")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise ValueError(
                "best_of is more than n, and the best are known at the end alone; leave stream out"
            )
        if self.max_tokens == 0 and not (self.echo and self.logprobs is not None):
            raise ValueError("max_tokens is 0; it must be above 0 without echo and logprobs")
        other = ("systems", "lora", "guidance_scale", "search")
        given = next((name for name in other if getattr(self, name) is not None), None)
        if self.echo and self.logprobs is not None and given is not None:
            raise ValueError(f"{given} is given with echo and logprobs, which score a blend alone")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        return given if several else [given]


class CompletionForm:
    """Texts on the way to what follows them."""

    prefix = "cmpl"

    def __init__(self, asked: CompletionRequest, service: Service) -> None:
        self.asked, self.prompts = asked, asked.prompts
        self.kept = asked.n or 1
        self.drawn = asked.best_of or self.kept
        self.tops, self.echoes = asked.logprobs, bool(asked.echo)
        self.most = SHORT if asked.max_tokens is None else asked.max_tokens
        self.options: dict[str, Any] = {}
        self.service = service
        self.offsets: dict[int, int] = {}  # how long the text of a choice is by now

    def opening(self, head: Head, index: int) -> None:
        """A stream of texts begins with the texts themselves."""

    def part(self, head: Head, index: int, text: str, tokens: Sequence[Token]) -> Completion:
        return self._of_choices(head, [self._choice(index, text, tokens)])

    def closing(self, head: Head, written: Written) -> Completion:
        choice = self._choice(written.index, "", ())
        choice.finish_reason = written.finish
        written.ending(choice)
        return self._of_choices(head, [choice])

    def total(self, head: Head, usage: Usage) -> Completion:
        return self._of_choices(head, [], usage)

    def _choice(self, index: int, text: str, tokens: Sequence[Token]) -> CompletionChoice:
        logprobs = None
        if self.tops is not None and tokens:
            offset = self.offsets.get(index, 0)
            logprobs = self.service.spelling.completion_logprobs(tokens, offset)
            self.offsets[index] = offset + sum(map(len, logprobs.tokens))
        choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=None)
        figures_of(tokens, choice)
        return choice

    def _of_choices(
        self, head: Head, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> Completion:
        found = Completion(object="text_completion", choices=choices, **head._asdict())
        if not self.asked.stream or self.asked.tells_usage:
            found.usage = usage
        return found

    def whole(self, head: Head, written: Sequence[Written], usage: Usage) -> Completion:
        choices = []
        for w in written:
            choice = self._choice(w.index, w.echo + w.text, w.tokens)
            choice.finish_reason = w.finish
            w.ending(choice)
            choices.append(choice)
        return self._of_choices(head, choices, usage)
