"""Errors as OpenAI's API has them: an object with a message, a type, the field and a code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from ..checks import did_you_mean
from ..decoding.session import Closed, Full

INVALID = "invalid_request_error"
RETRY = {"Retry-After": "1"}  # seconds after which a place in the queue is likely to be free
# Arguments of a session, and the fields that set them: the first one that a request has.
FIELDS = {
    "inputs": ("prompt", "messages"),
    "prompts": ("prompt",),
    "responses": ("prompt",),
    "max_new_tokens": ("max_tokens",),
    "stop_strings": ("stop",),
    "formula": ("blend",),
}
# What a field with several forms must be; pydantic would say it of each form by itself.
FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
    "content": "a text or a list of parts {'type': 'text', 'text': ...}",
    "tool_choice": "'none' or 'auto'",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class APIError(HTTPException):
    """An answer that is no success.

    Attributes:
        message: what went wrong, with the field, what it was and what it must be.
        kind: the type of the error, as OpenAI names it.
        param: the field.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.kind, self.param, self.code = message, kind, param, code

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def json_bytes(self) -> bytes:
        return json.dumps(self.body).encode()

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def refused(field: str, message: str, code: str | None = None) -> APIError:
    """The answer to a field that cannot be what it is."""
    return APIError(400, message, param=field, code=code)


def busy(message: str, code: str = "queue_full") -> APIError:
    """The answer where more is asked for than may wait."""
    return APIError(429, message, kind="rate_limit_error", code=code, headers=RETRY)


def internal(message: str = "an internal error; the log of the server says more") -> APIError:
    return APIError(500, message, kind="server_error", code="internal_error")


def of_submit(error: Exception, known: Iterable[str]) -> APIError:
    """The answer to what a session raises when a request is handed to it.

    Args:
        known: the fields of the request, one of which the message of the error may begin with.
    """
    if isinstance(error, Full):
        return busy(str(error) or "as many requests wait as may")
    if isinstance(error, Closed):
        return dead()
    if isinstance(error, (TypeError, ValueError, NotImplementedError)):
        found = re.match(r"[A-Za-z_]\w*", str(error))
        named = found[0] if found else ""
        fields = set(known)
        field = next((f for f in FIELDS.get(named, (named,)) if f in fields), None)
        if field is None:
            return APIError(400, str(error))
        return refused(field, f"{field}{str(error)[len(named) :]}")
    return internal()


def of_run(error: BaseException) -> APIError:
    """The answer to what made a request fail while its text was written."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Closed):
        return dead()
    if isinstance(error, TimeoutError):
        return APIError(504, str(error) or "time is up", kind="server_error", code="timeout")
    if isinstance(error, (RuntimeError, ValueError, ArithmeticError, MemoryError)):
        said = str(error).partition("\n")[0] or type(error).__name__
        return APIError(500, said, kind="server_error", code="request_failed")
    return internal()


def dead() -> APIError:
    return APIError(
        503, "the engine has stopped; no request is served", kind="server_error", code="engine_dead"
    )


def of_validation(errors: Iterable[Mapping[str, Any]], known: Iterable[str]) -> APIError:
    """The answer to a body that is not of its form: the first thing that is wrong with it.

    Args:
        errors: as pydantic lists them.
        known: the names of fields, one of which an unknown field may have been meant for.
    """
    listed = list(errors)
    first = listed[0]
    loc = [part for part in first["loc"] if part not in ("body", "query", "path")]
    path = _path(loc)
    kind, given = first["type"], first.get("input")
    if kind == "value_error":
        said = str(first["ctx"]["error"])
        return refused(path or said.partition(" ")[0], said, kind)
    if not loc:
        what = "missing" if given is None else f"a {type(given).__name__}"
        return APIError(400, f"the body is {what}; it must be a JSON object", code=kind)
    if kind == "extra_forbidden":
        meant = did_you_mean(loc[-1], known)
        return refused(path, f"{path} is not a field that is known{meant}", "unknown_field")
    if kind == "missing":
        return refused(path, f"{path} is missing", "missing_field")
    named = [str(part) for part in loc if str(part) in FORMS]
    if len(listed) > 1 and named and all(named[-1] in e["loc"] for e in listed):
        at = loc.index(named[-1]) + 1
        path = _path(loc[:at])
        return refused(path, f"{path} is not of its form; it must be {FORMS[named[-1]]}", kind)
    if kind == "none_required":
        return refused(path, f"{path} is not supported; leave it out", "unsupported_field")
    said = str(first["msg"]).replace("Input should be", "it must be", 1)
    said = said[:1].lower() + said[1:]
    return refused(path, f"{path} is {given!r:.80}; {said}", kind)


def _path(loc: Iterable[Any]) -> str:
    """The place of a value in a body, as in ``messages[0].content``.

    pydantic puts the name of a form between, where there are several; these have brackets.
    """
    found = ""
    for part in loc:
        if isinstance(part, int):
            found += f"[{part}]"
        elif "[" not in part and part not in ("str", "int", "float", "bool", "none"):
            found += f".{part}" if found else part
    return found
