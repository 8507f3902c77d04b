"""A server that answers as `crossfade serve` does, by a script: the desk's page is tested on it."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import crossfade

PAGE = Path(crossfade.__file__).parent / "serve" / "page"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:"
)
TEXT = " The weekend was a quiet mix of rest, walks and a film that I would gladly see again."
# By how many nats a fader at 1 pushes a word, one after the other.
PUSHES = {"w": [0.02, 0.4, -0.3, 1.0, 2.5], "v": [0.0, 0.1, 0.9, -1.5, 0.2]}
DESK = {
    "terms": ["base", "kind", "short"],
    "values": [],
    "blend": "base + w * (kind - base) + v * (short - base)",
    "weights": {"w": 0.8, "v": 0.0},
    "faders": ["w", "v"],
    "has_chat_template": True,
    "limits": {"max_tokens": 512},
    "version": "0.1.0",
    "needs_key": False,
}


class FakeDesk(ThreadingHTTPServer):
    """What it was asked, and how it answers.

    Attributes:
        desk: what it says that it has.
        key: the key that it asks for, if any.
        words: the texts that it writes, the same for each request; those of a text's tokens in the
            place of a text where it has several.
        hold: before the tokens of these places each text waits, until they are taken out of it.
        pause: seconds between tokens.
        refusals: answers to the next requests for texts, each a status, an error and headers.
        breaks: after how many tokens a stream ends, and the error that it ends with; None as the
            error breaks the connection off.
        scores: by the name of a value, what it says of a text for each unit of the fader w.
        asked: the paths and bodies of the requests for texts.
        moves: the requests that were moved, and where to.
        cancelled: the requests that were cancelled.
        keys: the Authorization headers that were sent.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Answers)
        self.desk: dict[str, Any] = dict(DESK)
        self.key = ""
        self.words: list[str | tuple[str, list[str]]] = [*re.findall(r" \w+|[,.]", TEXT)]
        self.hold: set[int] = set()
        self.pause = 0.0
        self.refusals: list[tuple[int, dict[str, Any] | None, dict[str, str]]] = []
        self.breaks: tuple[int, dict[str, Any] | None] | None = None
        self.scores: dict[str, float] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.moves: list[tuple[str, dict[str, float]]] = []
        self.cancelled: list[str] = []
        self.keys: list[str | None] = []
        self.weights: dict[str, dict[str, float]] = {}  # of each request, as they stand
        self.sent: dict[str, int] = {}  # tokens of each request

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: FakeDesk

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.strip("/") or "index.html"
        if name == "v1/desk":
            if self.let_in():
                self.say(200, self.server.desk)
            return
        file = PAGE / name
        if "/" in name or not file.is_file():
            self.say(404, {"error": {"message": f"there is no {name}"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", f"{TYPES[file.suffix]}; charset=utf-8")
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(file.read_bytes())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.let_in():
            return
        match self.path.strip("/").split("/"):
            case ["v1", "requests", name, "weights"]:
                server.moves.append((name, body["weights"]))
                server.weights[name] = body["weights"]
                changes = [{"tokens": server.sent[name], "weights": body["weights"]}]
                self.say(200, {"id": name, "changes": [changes]})
            case ["v1", "requests", name, "cancel"]:
                server.cancelled.append(name)
                self.say(200, {})
            case ["v1", "chat", "completions"] | ["v1", "completions"]:
                self.write_text(body)
            case _:
                self.say(404, {"error": {"message": f"there is no {self.path}"}})

    def let_in(self) -> bool:
        self.server.keys.append(self.headers["Authorization"])
        if not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.say(401, {"error": {"message": "the key is wrong", "param": None}})
        return False

    def say(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def write_text(self, body: dict[str, Any]) -> None:
        server = self.server
        server.asked.append((self.path, body))
        if server.refusals:
            status, error, headers = server.refusals.pop(0)
            self.say(status, {"error": error}, headers)
            return
        name = f"cmpl-{len(server.asked)}"
        server.weights[name], server.sent[name] = body["weights"], 0
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.stream(name, body)
        except (BrokenPipeError, ConnectionResetError):
            server.cancelled.append(name)  # as the server does where a client goes away

    def stream(self, name: str, body: dict[str, Any]) -> None:
        server = self.server
        words = server.words[: body["max_tokens"]]
        for i, word in enumerate(words):
            if server.breaks is not None and i == server.breaks[0]:
                if server.breaks[1] is not None:
                    self.event({"error": server.breaks[1]})
                return
            while i in server.hold and name not in server.cancelled:
                time.sleep(0.01)
            if name in server.cancelled:
                return
            self.event(self.chunk(name, body, i, word, last=i + 1 == len(words)))
            server.sent[name] += 1 if isinstance(word, str) else len(word[1])
            time.sleep(server.pause)
        self.wfile.write(b"data: [DONE]\n\n")

    def chunk(
        self,
        name: str,
        body: dict[str, Any],
        i: int,
        word: str | tuple[str, list[str]],
        *,
        last: bool,
    ) -> dict[str, Any]:
        """A word's chunk. All of its tokens have the same figures."""
        server, chat = self.server, "messages" in body
        text, tokens = (word, [word]) if isinstance(word, str) else word
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if last else None}
        choice |= {"delta": {"content": text}} if chat else {"text": text}
        logprob = -0.1 * (i % 5)
        if chat and body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": t, "logprob": logprob} for t in tokens]}
        elif not chat and body.get("logprobs") is not None:
            each = [logprob] * len(tokens)
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": each}
        weights = server.weights[name]
        if body.get("return_pushes"):
            pushes = {f: round(w * PUSHES.get(f, [1.0] * 5)[i % 5], 4) for f, w in weights.items()}
            choice["pushes"] = [pushes] * len(tokens)
        if body.get("return_kl_to_base"):
            size = sum(w * w for w in weights.values())
            choice["kl_to_base"] = [round(0.3 * size * (1 + i % 3), 4)] * len(tokens)
        if last and "search" in body:
            choice["value"] = server.scores[body["search"]["value"]] * weights.get("w", 1.0)
        return {"id": name, "object": "chat.completion.chunk", "choices": [choice]}

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
        self.wfile.flush()


@contextmanager
def serving(port: int = 0) -> Iterator[FakeDesk]:
    """A fake server that answers until the block ends."""
    with FakeDesk(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.hold.clear()
            server.shutdown()
            thread.join()
