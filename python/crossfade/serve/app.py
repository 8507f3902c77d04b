"""The application: OpenAI's endpoints and crossfade's own over one session."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

import crossfade

from .. import reading
from . import answers, errors, limits
from .chat import ChatForm, ChatRequest
from .completions import CompletionForm, CompletionRequest
from .contract import Session
from .desk import File, files_of
from .errors import APIError, ErrorBody
from .exchange import respond
from .routes import DetokenizeRequest, Moved, TokenizeRequest, router
from .security import Guard, Watch
from .service import Service
from .settings import Settings

ABOUT = (
    "OpenAI's API over blends of language models: each request may have a formula, faders, "
    "guidance, a search and drafts of its own."
)
FAILED: dict[int | str, Any] = {
    "4XX": {"model": ErrorBody, "description": "the request is refused"},
    "5XX": {"model": ErrorBody, "description": "the request has failed"},
}
BODIES = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest, Moved)
KNOWN = sorted({name for body in BODIES for name in body.model_fields})


class StrictRequest(Request):
    """A request whose body is JSON to the letter: UTF-8, finite numbers, no key twice."""

    async def json(self) -> Any:
        body = await self.body()
        try:
            text = reading.decode(body, "the body")
            return reading.parse_json(
                text, "the body", unique=True, finite=True, most_keys=limits.KEYS
            )
        except ValueError as error:
            raise APIError(400, str(error), code="invalid_json") from None


class StrictRoute(APIRoute):
    """A route that reads bodies as `StrictRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def create_app(session: Session, settings: Settings | None = None) -> FastAPI:
    """The application of a server. The session stays its owner's, who closes it.

    Args:
        session: a `crossfade.Session`, or anything that has what `contract.Session` says.
        settings: what the server is told; by default it has no keys, and serves this machine.
    """
    service = Service(session, settings or Settings())

    app = FastAPI(
        title="crossfade",
        description=ABOUT,
        version=crossfade.__version__,
        docs_url=None,  # Pages that load scripts from elsewhere.
        redoc_url=None,
        separate_input_output_schemas=False,
        dependencies=[Security(HTTPBearer(auto_error=False))] if service.settings.keys else None,
        exception_handlers={
            RequestValidationError: _invalid,
            HTTPException: _failed,
        },
    )
    app.state.service = service
    app.router.route_class = StrictRoute
    _add_decoding(app, service)
    own = router(service, int(time.time()), FAILED)
    app.include_router(own)
    files = files_of(service.settings.page)
    for path, file in files.items():
        app.add_api_route(path, _giver(file), include_in_schema=False)
    # What is added last comes first.
    app.add_middleware(Guard, service=service, files=files)
    if service.settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Watch, service=service)
    return app


def _add_decoding(app: FastAPI, service: Service) -> None:
    """The two endpoints that write texts."""

    def stream_too(whole: type[answers.Answer], chunk: type[answers.Answer]) -> dict[Any, Any]:
        stream = {"text/event-stream": answers.schema_of_stream(chunk)}
        return {**FAILED, 200: {"model": whole, "content": stream}}

    @app.post(
        "/v1/chat/completions", responses=stream_too(answers.ChatCompletion, answers.ChatChunk)
    )
    async def chat(asked: ChatRequest, http: Request) -> Response:
        """Answer a chat."""
        return await respond(service, http, ChatForm(asked, service))

    @app.post("/v1/completions", responses=stream_too(answers.Completion, answers.Completion))
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        """Go on with texts."""
        return await respond(service, http, CompletionForm(asked, service))


def _giver(file: File) -> Callable[[], Any]:
    async def give() -> Response:
        return Response(file.content, media_type=file.type, headers={"Cache-Control": "no-cache"})

    return give


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return errors.of_validation(error.errors(), KNOWN).response()


async def _failed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if not isinstance(error, APIError):  # Nothing is there, or not by this method.
        said = f"{request.method} {request.url.path} is nothing that this server has"
        error = APIError(error.status_code, said, code="not_found", headers=error.headers)
    return error.response()
