"""The fields that requests for texts and for chats have in common.

What is not named here or in the two forms is refused by its name, and so is a number that is text,
a truth value or not finite: a field is never ignored by mistake. Those that OpenAI's clients send
and that change nothing here are in `Ignored`, those that would change something in the forms'
lists of what is not supported.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from . import limits


def few(most: int, least: int = 0) -> Any:
    """Of a list: how many items it may have. Its first bad item ends it, so that a long list of
    them is not a long list of errors."""
    return Field(min_length=least, max_length=most, fail_fast=True)


Name = Annotated[str, Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=limits.STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Bias = Annotated[float, Field(ge=-100, le=100)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,10}$")]
Count = Annotated[int, Field(ge=1, le=limits.ROWS)]
Faders = Annotated[dict[Name, float], Field(max_length=limits.NAMES)]


class Strict(BaseModel):
    """A form that takes nothing but what it names."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


Content = Text | Annotated[list[Part], few(limits.MESSAGES)]


def joined(content: str | list[Part]) -> str:
    """The content of a message as one text."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


class StreamOptions(Strict):
    """What a stream tells besides its texts."""

    include_usage: bool = Field(False, description="end with a chunk that has the usage")
    include_obfuscation: bool = Field(False, description="changes nothing here")


class Lora(Strict):
    """How far one adapter is in a mix of weights."""

    id: Annotated[int, Field(ge=0)] | None = Field(
        None, description="the place of a term in /v1/models, without that of the default blend"
    )
    name: Name | None = Field(None, description="the term's name")
    scale: float

    @model_validator(mode="after")
    def one_of_both(self) -> Lora:
        if (self.id is None) == (self.name is None):
            raise ValueError("lora needs an id or a name for each adapter, and not both")
        return self


class Search(Strict):
    """How texts are searched: best of n, chunk-level beam search, or a tournament.

    What decides is a value or a judge that the server has loaded; a single one needs no name.
    """

    best_of: Count | None = Field(None, description="write so many texts and keep the best")
    width: Count | None = Field(None, description="how many texts stay after a chunk")
    samples: Count | None = Field(None, description="how many times each of them is continued (4)")
    chunk_length: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        None, description="tokens of a chunk (5)"
    )
    tournament: Count | None = Field(
        None, description="write so many texts, which a judge compares"
    )
    value: Name | None = Field(None, description="what scores the texts, by its name")
    judge: Name | None = Field(None, description="what compares the texts, by its name")

    @model_validator(mode="after")
    def one_search(self) -> Search:
        given = [n for n in ("best_of", "width", "tournament") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "search needs one of best_of, width and tournament; it has "
                + (" and ".join(given) or "none")
            )
        if self.width is None and (self.samples is not None or self.chunk_length is not None):
            raise ValueError(f"search has chunks, which belong to width; it has {given[0]}")
        if self.judge is not None and self.tournament is None:
            raise ValueError("search has a judge, which decides a tournament alone")
        if self.judge is not None and self.value is not None:
            raise ValueError("search has a judge and a value; one of them decides")
        if self.rows > limits.ROWS:
            raise ValueError(f"search has {self.rows} rows; it must have at most {limits.ROWS}")
        return self

    @property
    def rows(self) -> int:
        """How many rows it decodes for each text."""
        if self.width is not None:
            return self.width * (self.samples or 4)
        return self.best_of or self.tournament or 1


class Prediction(Strict):
    """What the answer is likely to repeat, as OpenAI's API has it."""

    type: Literal["content"]
    content: Content


class Ignored(Strict):
    """Fields that clients send and that change nothing: they are about OpenAI's own service."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Sampling(Strict):
    """How tokens are drawn; the defaults are OpenAI's."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="1 if it is not given; at 0 the likeliest token is taken"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = Field(None, description="0: all tokens")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=limits.BIASES)] | None = Field(
        None, description="token ids, and what is added to their scores"
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = Field(
        None, description="the same request with the same seed gives the same tokens"
    )
    stop: Stop | Annotated[list[Stop], few(limits.STOPS)] | None = None


class Extensions(Strict):
    """What crossfade adds to OpenAI's API, as clients send it by ``extra_body``."""

    blend: Annotated[str, Field(min_length=1, max_length=limits.FORMULA)] | None = Field(
        None, description='a formula of the terms, such as "base + w * (kind - base)"'
    )
    weights: Faders | None = Field(None, description="where the faders of the blend stand")
    systems: Annotated[dict[Name, Text], Field(max_length=limits.NAMES)] | None = Field(
        None, description="system prompts that single terms read"
    )
    lora: Annotated[list[Lora], few(limits.NAMES, 1)] | None = Field(
        None, description="one mix of adapters in weight space, in place of a blend"
    )
    guidance_scale: float | None = Field(None, description="of classifier-free guidance; 1 is none")
    negative_prompt: Text | None = Field(None, description="what guidance leads away from")
    search: Search | None = None
    draft: Name | None = Field(
        None, description='what guesses tokens: "prompt", or a draft that the server has loaded'
    )
    prediction: Prediction | None = None
    return_term_logprobs: bool = Field(False, description="each token's log-prob under each term")
    return_pushes: bool = Field(
        False, description="by how many nats each fader moved a token away from the base"
    )
    return_kl_to_base: bool = Field(False, description="each step's divergence from the first term")

    @model_validator(mode="after")
    def together(self) -> Extensions:
        if self.negative_prompt is not None and self.guidance_scale is None:
            raise ValueError("negative_prompt is given without guidance_scale, which says how far")
        if self.draft is not None and self.prediction is not None:
            raise ValueError("draft and prediction are both given; one of them guesses tokens")
        return self


class Generation(Sampling, Extensions, Ignored):
    """What requests for texts and for chats share."""

    model: Name | None = Field(None, description="a name of /v1/models; the default blend if none")
    n: Annotated[int, Field(ge=1, le=limits.CHOICES)] | None = Field(
        None, description="how many texts to write; 1 if it is not given"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def streamed(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are given without stream, which they belong to")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def tells_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
