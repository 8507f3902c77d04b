"""Who is let in, before anything of a request is read: hosts, origins, keys, sizes.

A page that a user visits may try to reach a server on the same machine. Its browser tells the name
by which it was reached as `Host`, whose page it is as `Origin`, and asks before it sends JSON. So
all three are checked, even where there is no key.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError, internal
from .service import LOG, Service

OPEN = ("/", "/health", "/version", "/openapi.json")  # what needs no key, besides the page's files
PUBLIC_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "form-action 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
OWNER, REQUEST_ID = "crossfade.owner", "crossfade.request_id"  # what is noted in a scope


def owner_of(scope: Mapping[str, Any]) -> str:
    """Whose request this is, as the guard found."""
    return scope[OWNER]


class Guard:
    """Refuses what must not come in. An ASGI application around another.

    Args:
        files: paths of the page, which are given without a key, since it asks for the key itself.
    """

    def __init__(self, app: ASGIApp, service: Service, files: Collection[str]) -> None:
        self.app, self.settings = app, service.settings
        self.open = {*OPEN, *files}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # There are no websockets here.
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        try:
            self._check_host(headers, scope)
            scope[OWNER] = self._owner(headers, scope)
            if scope["method"] == "POST":
                self._check_body(headers)
        except APIError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, _Body(receive, self.settings.limits), send)

    def _check_host(self, headers: Headers, scope: Scope) -> None:
        """Refuse another server's name, and the script of another server's page."""
        host = headers.get("host", "")
        name = _name_of(host)
        here = (scope.get("server") or ("", 0))[0]  # the address that the client has reached
        if name not in self.settings.hosts and name != here:
            raise APIError(
                403,
                f"Host is {host!r:.80}, which is not this server's; --allow-host gives it a name",
                code="wrong_host",
            )
        origin = headers.get("origin")
        if origin is None or origin in self.settings.origins:
            return
        scheme, _, authority = origin.partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme, "")
        own = {host.lower(), host.lower().removesuffix(port) if port else host.lower()}
        if authority.lower() not in own:
            raise APIError(
                403,
                f"Origin is {origin!r:.80}, which is not this server's; --allow-origin lets pages "
                "of another in",
                code="wrong_origin",
            )

    def _owner(self, headers: Headers, scope: Scope) -> str:
        owner = self.settings.keys.owner(headers.get("authorization"))
        if owner is not None:
            return owner
        if scope["path"] in self.open:
            return ""
        given = "is none of this server's" if "authorization" in headers else "is missing"
        raise APIError(
            401,
            f"the API key {given}; send it as the header Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _check_body(self, headers: Headers) -> None:
        """Refuse a body by what its headers say of it."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        length = headers.get("content-length", "0")
        if kind != "application/json" and (length != "0" or "transfer-encoding" in headers):
            raise APIError(
                415, f"Content-Type is {kind!r:.80}; it must be application/json", code="wrong_type"
            )
        if not length.isdecimal() or int(length) > self.settings.limits.body:
            raise too_large(self.settings.limits.body)


def _name_of(host: str) -> str:
    """The name or the address in a header ``Host``, without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def too_large(most: int) -> APIError:
    return APIError(
        413,
        f"the body is too large; it must have at most {most} bytes",
        code="body_too_large",
        headers={"Connection": "close"},
    )


class _Body:
    """Receives a body of so many bytes at most, in so much time; then the client's leaving."""

    def __init__(self, receive: Receive, limits: Any) -> None:
        self.receive, self.limits = receive, limits
        self.left, self.whole = limits.body, False
        self.until = time.monotonic() + limits.body_seconds

    async def __call__(self) -> Message:
        if self.whole:
            return await self.receive()
        try:
            with anyio.fail_after(max(0.0, self.until - time.monotonic())):
                message = await self.receive()
        except TimeoutError:
            raise APIError(
                408,
                f"the body did not come within {self.limits.body_seconds:g} seconds",
                code="body_too_slow",
                headers={"Connection": "close"},
            ) from None
        self.left -= len(message.get("body", b""))
        self.whole = not message.get("more_body", False)
        if self.left < 0:
            raise too_large(self.limits.body)
        return message


class Watch:
    """Gives each request an id, each answer its headers and a line in the log.

    What nobody foresaw becomes an answer here, and is logged with where it happened.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        # An id is written to logs, so one that could hold anything is replaced by one of our own.
        own = given if PUBLIC_ID.fullmatch(given) else uuid.uuid4().hex
        scope[REQUEST_ID] = own
        status, begun = 0, time.monotonic()

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = own
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except Exception as error:
            self.service.log_failure(own, error)
            if not status:
                await internal().response()(scope, receive, sending)
        finally:
            seconds = time.monotonic() - begun
            route = getattr(scope.get("route"), "path", "other")
            self.service.metrics.answered(route, status, seconds)
            LOG.info("%s %s %s %.2f s %s", scope["method"], route, status, seconds, own)
