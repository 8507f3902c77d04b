"""Streams as bytes, clients that go away, faders that move, and how a server stops."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest
from crossfade.serve import Settings
from crossfade.serve.limits import Limits
from scripted import Session
from servers import Running, raw, running, soon

CHAT = {"messages": [{"role": "user", "content": "the film"}], "model": "base"}


def events(text: str) -> list[Any]:
    """The data of a stream's events, the last of which must be [DONE]."""
    assert text.endswith("data: [DONE]\n\n")
    parts = text.split("\n\n")[:-2]
    assert all(part.startswith(("data: {", ": waiting")) for part in parts)
    return [json.loads(part.removeprefix("data: ")) for part in parts if part[0] == "d"]


def test_a_stream_is_server_sent_events(server: Running) -> None:
    answer = server.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-store"
    chunks = events(answer.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    # The end has no text, and nobody asked for its log-prob, so that it has no chunk.
    assert len(chunks) == 2 + server.session.length


def test_tokens_without_text_are_told_where_their_figures_are_asked_for(server: Running) -> None:
    for asked in ({"logprobs": True}, {"return_pushes": True}):
        chunks = events(server.post("/v1/chat/completions", {**CHAT, "stream": True, **asked}).text)
        assert len(chunks) == 3 + server.session.length
        told = [c["choices"][0] for c in chunks[1:-1]]
        assert all(len(c.get("pushes") or c["logprobs"]["content"]) == 1 for c in told)


def test_an_error_in_a_stream_is_an_event(server: Running) -> None:
    server.session.fails_at = 3
    answer = server.post("/v1/completions", {"prompt": "a", "stream": True, "n": 2})
    assert answer.status_code == 200
    found = events(answer.text)
    assert found[-1]["error"]["message"] == "request 0: a NaN"
    assert found[-1]["error"]["type"] == "server_error"
    assert all("error" not in chunk for chunk in found[:-1])
    soon(lambda: server.session.running == 0)  # the other text is cancelled
    soon(lambda: server.app.state.service.calls.load == 0)


def test_a_mistake_is_told_before_a_stream_begins(server: Running) -> None:
    body = {"prompt": "a", "stream": True, "weights": {"v": 1}}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "weights"


def test_a_stream_says_that_it_waits(serve: Any) -> None:
    server = serve(settings=Settings(pulse=0.02))
    server.session.delay = 0.1
    text = server.post("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True}).text
    assert text.count(": waiting\n\n") >= 2
    assert len(events(text)) == 3


def test_stops_and_limits_have_their_reasons(server: Running) -> None:
    def choice(**fields: Any) -> Any:
        answer = server.post("/v1/completions", {"prompt": "a", "seed": 1, **fields})
        return answer.json()["choices"][0]

    words = choice()["text"].split()
    assert choice(max_tokens=2)["finish_reason"] == "length"
    place = next(i for i, word in enumerate(words) if word not in words[:i] and i > 1)
    stopped = choice(stop=words[place])
    assert (stopped["text"].split(), stopped["finish_reason"]) == (words[:place], "stop")


def test_a_text_may_take_so_long(serve: Any) -> None:
    server = serve(Session(length=1000), Settings(limits=Limits(seconds=0.1)))
    server.session.delay = 0.005
    body = {"prompt": "a", "max_tokens": 900}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert (choice["finish_reason"], choice["cut"]) == ("length", "timeout")
    assert choice["text"]


# ---- Clients that go away -----------------------------------------------------------------------


def leave(server: Running, body: dict[str, Any], until: Any) -> None:
    """Ask, wait until something is so, and close the connection."""
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(raw(content))
        soon(until)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_cancels_what_was_asked(server: Running, stream: bool) -> None:
    server.session.length = 100_000  # There is always a next token, which must not get in the way.
    body = {"prompt": ["a", "the"], "n": 2, "max_tokens": 4000, "stream": stream}
    leave(server, body, lambda: sum(len(r.written) > 3 for r in server.session.requests) == 4)
    soon(lambda: server.session.running == 0)
    assert [r.reason for r in server.session.requests] == ["cancelled"] * 4
    soon(lambda: server.app.state.service.calls.load == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_before_the_first_token_cancels_too(server: Running, stream: bool) -> None:
    server.session.paused = True
    body = {"prompt": "a", "stream": stream}
    leave(server, body, lambda: server.session.requests)
    soon(lambda: server.session.requests[0].reason == "cancelled")


def test_who_goes_away_while_a_prompt_is_read_cancels_too(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that submits goes on; what it gets is cancelled at once."""
    entered, go_on = threading.Event(), threading.Event()
    submit = server.session.submit

    def slow(*args: Any, **options: Any) -> Any:
        entered.set()
        assert go_on.wait(10)
        return submit(*args, **options)

    monkeypatch.setattr(server.session, "submit", slow)
    leave(server, {"prompt": "a"}, entered.is_set)
    soon(lambda: server.app.state.service.calls.load == 0)
    go_on.set()
    soon(lambda: server.session.requests and server.session.requests[0].cancelled)


def test_after_many_that_gave_up_a_fresh_one_is_answered(server: Running) -> None:
    server.session.paused = True
    socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    content = json.dumps({"prompt": "a"}).encode()
    for sock in socks:
        sock.sendall(raw(content))
    soon(lambda: len(server.session.requests) == 200, 30)
    for sock in socks:
        sock.close()
    soon(lambda: server.session.running == 0, 30)
    server.session.paused = False
    begun = time.monotonic()
    assert server.post("/v1/completions", {"prompt": "a"}).status_code == 200
    assert time.monotonic() - begun < 5


# ---- What is asked of a request that is under way -----------------------------------------------


class Stream:
    """A stream that is read event by event."""

    def __init__(self, server: Running, body: dict[str, Any], **options: Any) -> None:
        self.opened = server.http.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}, **options
        )
        self.lines = self.opened.__enter__().iter_lines()

    def next(self) -> Any:
        line = next(line for line in self.lines if line)
        return None if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))

    def rest(self) -> list[Any]:
        found = []
        while (chunk := self.next()) is not None:
            found.append(chunk)
        self.opened.__exit__(None, None, None)
        return found


def test_faders_move_while_a_text_is_written(server: Running) -> None:
    server.session.paused = True
    stream = Stream(server, {**CHAT, "n": 2})
    id = stream.next()["id"]
    moved = server.post(f"/v1/requests/{id}/weights", {"weights": {"w": 1.5}})
    assert moved.json() == {"id": id, "changes": [[{"tokens": 0, "weights": {"w": 1.5}}]] * 2}
    refused = server.post(f"/v1/requests/{id}/weights", {"weights": {"v": 1.5}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "weights")
    assert server.post(f"/v1/requests/{id}/weights", {"weights": {}}).status_code == 400
    server.session.paused = False
    ends = [c["choices"][0] for c in stream.rest() if c["choices"][0]["finish_reason"]]
    assert [e["changes"] for e in ends] == [[{"tokens": 0, "weights": {"w": 1.5}}]] * 2
    over = server.post(f"/v1/requests/{id}/weights", {"weights": {"w": 1.5}})
    assert (over.status_code, over.json()["error"]["code"]) == (404, "not_found")


def test_a_text_can_be_ended(server: Running) -> None:
    server.session.length, server.session.delay = 100_000, 0.001
    stream = Stream(server, {**CHAT, "max_tokens": 4000})
    id = stream.next()["id"]
    stream.next()
    assert server.post(f"/v1/requests/{id}/cancel", {}).json() == {"id": id, "cancelled": True}
    last = stream.rest()[-1]["choices"][0]
    assert (last["finish_reason"], last["cut"]) == ("stop", "cancelled")


# ---- How a server stops -------------------------------------------------------------------------


def test_a_server_that_stops_lets_requests_end() -> None:
    with running() as server:
        server.session.paused = True
        stream = Stream(server, CHAT)
        stream.next()
        server.server.should_exit = True
        soon(lambda: not server.server.servers or not server.server.servers[0].is_serving())
        with pytest.raises(OSError, match=r"refused|reset"):
            socket.create_connection(("127.0.0.1", server.port)).close()
        server.session.paused = False
        chunks = stream.rest()
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        server.thread.join(30)
        assert server.session.closed is None  # It is its owner's.


def test_what_does_not_end_in_time_is_cancelled() -> None:
    with running(grace=1) as server:
        server.session.paused = True
        stream = Stream(server, CHAT)
        stream.next()
        server.server.should_exit = True
        server.thread.join(30)
        assert not server.thread.is_alive()
        assert server.session.requests[0].cancelled
