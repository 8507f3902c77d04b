"""Runs the application until it is told to stop, and then lets requests end.

The session is its owner's, who closes it afterwards.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from .app import create_app
from .contract import Session
from .settings import Settings

BACKLOG = 1024  # connections that wait to be taken


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address. It takes no connections before the server has begun.

    Raises:
        OSError: the address is not this machine's, or somebody else is there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise OSError(f"{host}, port {port}: {error.strerror}") from None
    return found


class Server(uvicorn.Server):
    """A server that tells when it has begun.

    Args:
        app: the application.
        grace: seconds that requests have to end in once it is told to stop.
        begun: is called once connections are taken.
    """

    def __init__(self, app: FastAPI, *, grace: float, begun: Callable[[], object]) -> None:
        self.begun = begun
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # `Watch` has a line for each request.
            server_header=False,
            proxy_headers=False,
            ws="none",
            backlog=BACKLOG,
            timeout_graceful_shutdown=max(1, round(grace)),
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.begun()


class Background:
    """A server in a thread of this process, as notebooks and tests need it; a context manager.

    It ends with `close`, which lets requests end first, and leaves the session open.

    Args:
        session: a `crossfade.Session`.
        settings: what the server is told.
        port: 0 takes a free one.
        grace: as of `Server`.

    Attributes:
        url: where it is.
    """

    def __init__(
        self,
        session: Session,
        settings: Settings | None = None,
        *,
        port: int = 0,
        grace: float = 60.0,
    ) -> None:
        self.app = create_app(session, settings)
        self._socket = bind("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        begun = threading.Event()
        self.server = Server(self.app, grace=grace, begun=begun.set)
        self.thread = threading.Thread(
            target=self.server.run, args=([self._socket],), name="crossfade-serve", daemon=True
        )
        self.thread.start()
        while not begun.wait(0.1):
            if not self.thread.is_alive():
                raise RuntimeError("the server could not begin; its log says why")

    def close(self) -> None:
        """Take no more requests, and wait until those under way have ended."""
        self.server.should_exit = True
        self.thread.join()
        self._socket.close()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def run(server: Server, at: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C; a second Ctrl-C does not wait for requests.

    Raises:
        KeyboardInterrupt: it was Ctrl-C, and all has ended.
    """
    # uvicorn raises the signal again when it has ended; SIGTERM is then no reason to die of.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.run(sockets=[at])
    finally:
        signal.signal(signal.SIGTERM, before)
