"""Runs the application until it is told to stop, and then lets requests end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

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
