"""What else is asked of a server: its models, tokens, running requests, health and figures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field, model_validator

import crossfade

from ..decoding.chats import render
from . import submitting
from .answers import Change
from .chat import Messages
from .contract import Request as SessionRequest
from .desk import Desk, desk_of
from .errors import APIError, refused
from .exchange import in_thread
from .fields import Faders, Name, Strict, Text, TokenId, few
from .security import owner_of
from .service import Service

SOON = 200  # hundredths of a second in which moved faders are waited for
Id = Annotated[str, Path(pattern=r"^[a-z]{1,16}-[0-9a-f]{32}$", description="the id of an answer")]


class ModelCard(BaseModel):
    """A blend or a term that a request may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    blend: str


class ModelList(BaseModel):
    """The default blend, then each term."""

    object: Literal["list"]
    data: list[ModelCard]


class TokenizeRequest(Strict):
    """A text or a chat, of which the tokens are asked for."""

    model: Name | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt is what is tokenized, or else messages; give one of them")
        return self


class Tokens(BaseModel):
    """The tokens of a text."""

    count: int
    tokens: list[int]


class DetokenizeRequest(Strict):
    """Tokens, of which the text is asked for."""

    model: Name | None = None
    tokens: Annotated[list[TokenId], few(1 << 20)]


class Detokenized(BaseModel):
    """The text of tokens."""

    prompt: str


class Moved(Strict):
    """Where the faders of a running request are to stand from its next token on."""

    weights: Annotated[Faders, Field(min_length=1)]


class Moves(BaseModel):
    """The faders that were moved, of each text of a request."""

    id: str
    changes: list[list[Change]]


class Cancelled(BaseModel):
    """A request that ends where it is."""

    id: str
    cancelled: bool


class Health(BaseModel):
    """Whether the server serves."""

    status: Literal["ok", "dead"]


class Version(BaseModel):
    """Which crossfade this is."""

    version: str


def router(service: Service, created: int, errors: Mapping[int | str, Any]) -> APIRouter:
    """The routes that answer at once.

    Args:
        created: when the server began.
        errors: how answers that are no success look in the OpenAPI document.
    """
    session, settings = service.session, service.settings
    found = APIRouter(responses=dict(errors))

    def check_model(name: str | None) -> None:
        submitting.blend_of_model(name, session, settings)

    @found.get("/v1/models")
    async def models() -> ModelList:
        """The names that `model` may have: the default blend, then each term."""
        names = {submitting.default_model(session, settings): session.blend}
        names |= {term: term for term in submitting.models_of(session)}
        cards = [
            ModelCard(id=id, object="model", created=created, owned_by="crossfade", blend=blend)
            for id, blend in names.items()
        ]
        return ModelList(object="list", data=cards)

    @found.get("/v1/desk")
    async def desk() -> Desk:
        """What a page of faders must know of this server."""
        return desk_of(service)

    @found.post("/tokenize")
    async def tokenize(asked: TokenizeRequest) -> Tokens:
        """The tokens of a text, or of a chat in the model's template."""
        check_model(asked.model)
        ids = await in_thread(lambda: _encode(service, asked))
        return Tokens(count=len(ids), tokens=ids)

    @found.post("/detokenize")
    async def detokenize(asked: DetokenizeRequest) -> Detokenized:
        """The text of tokens."""
        check_model(asked.model)
        size = len(service.tokenizer)
        outside = next((t for t in asked.tokens if t >= size), None)
        if outside is not None:
            raise refused("tokens", f"tokens has {outside}; ids must be within [0, {size})")
        return Detokenized(prompt=await in_thread(lambda: service.text_of(asked.tokens)))

    @found.post("/v1/requests/{id}/weights")
    async def weights(id: Id, moved: Moved, http: Request) -> Moves:
        """Move faders of a request that is being written, from its next token on."""
        call = service.calls.find(id, owner_of(http.scope))
        before = [len(request.changes) for request in call.requests]
        try:
            await in_thread(lambda: _move(call.requests, moved.weights))
        except (TypeError, ValueError) as error:
            raise refused("weights", str(error)) from None
        for _ in range(SOON):  # The session takes note of it between two steps.
            pairs = zip(call.requests, before, strict=False)
            if all(request.done or len(request.changes) > n for request, n in pairs):
                break
            await asyncio.sleep(0.01)
        changes = [
            [Change(tokens=n, weights=dict(w)) for n, w in request.changes]
            for request in call.requests
        ]
        return Moves(id=id, changes=changes)

    @found.post("/v1/requests/{id}/cancel")
    async def cancel(id: Id, http: Request) -> Cancelled:
        """Let a request end where it is; what is written so far is its answer."""
        service.calls.find(id, owner_of(http.scope)).cancel()
        return Cancelled(id=id, cancelled=True)

    @found.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """200 while requests are served, 503 once the engine has died."""
        if not session.alive:
            response.status_code = 503
        return Health(status="ok" if session.alive else "dead")

    @found.get("/version")
    async def version() -> Version:
        """Which crossfade this is."""
        return Version(version=crossfade.__version__)

    @found.get("/metrics", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    return found


def _move(requests: Iterable[SessionRequest], weights: Mapping[str, float]) -> None:
    for request in requests:
        if not request.done:
            request.weights(**weights)


def _encode(service: Service, asked: TokenizeRequest) -> list[int]:
    tokenizer = service.tokenizer
    if asked.prompt is not None:
        return tokenizer(asked.prompt, add_special_tokens=asked.add_special_tokens)["input_ids"]
    if not service.has_chat_template:
        raise refused("messages", "messages need a chat template, which the model does not have")
    chat = [m.for_template(service.knows_developers) for m in asked.messages or ()]
    try:
        text = render(chat, tokenizer)
    except APIError:
        raise
    except Exception as error:  # A template is a program, which may raise whatever it likes.
        raise refused("messages", f"messages: the chat template refuses them: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]
