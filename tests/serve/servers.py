"""Servers in threads, on free ports of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
from crossfade.serve import Background, Settings
from scripted import Session


class Running(Background):
    """A server in a thread, over a session that is most often a scripted one.

    Attributes:
        http: a client of it.
    """

    def __init__(self, session: Any, settings: Settings, grace: float) -> None:
        self.session = session
        super().__init__(session, settings, grace=grace)
        self.port = int(self.url.rpartition(":")[2])
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def close(self) -> None:
        self.http.close()
        super().close()

    def post(self, path: str, body: Any, **options: Any) -> Any:
        return self.http.post(path, json=body, **options)


def running(session: Any = None, settings: Settings | None = None, *, grace: float = 30) -> Running:
    return Running(session or Session(), settings or Settings(), grace)


def raw(content: bytes, length: bytes | None = None) -> bytes:
    """A request for texts as it is sent, for tests that leave in the middle of it."""
    lines = [
        b"POST /v1/completions HTTP/1.1",
        b"Host: localhost",
        b"Content-Type: application/json",
        b"Content-Length: " + (b"%d" % len(content) if length is None else length),
    ]
    return b"\r\n".join([*lines, b"", content])


def soon(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
