"""Servers in threads, on free ports of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from crossfade.serve import Settings, create_app
from crossfade.serve.server import Server, bind
from scripted import Session


class Running:
    """A server that runs in a thread.

    Attributes:
        url: where it is.
        http: a client of it.
    """

    def __init__(self, session: Any, settings: Settings, grace: float) -> None:
        self.session = session
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.app = create_app(session, settings)
        begun = threading.Event()
        self.server = Server(self.app, grace=grace, begun=begun.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        assert begun.wait(30)
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def stop(self) -> None:
        """Tell it to stop, and wait until it has."""
        self.http.close()
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()
        self.socket.close()

    def post(self, path: str, body: Any, **options: Any) -> Any:
        return self.http.post(path, json=body, **options)


@contextmanager
def running(
    session: Any = None, settings: Settings | None = None, *, grace: float = 30
) -> Iterator[Running]:
    server = Running(session or Session(), settings or Settings(), grace)
    try:
        yield server
    finally:
        server.stop()


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
