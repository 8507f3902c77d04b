"""Who is let in: keys, hosts, origins, bodies, and what others may not see."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crossfade.serve import Settings
from crossfade.serve.keys import Keys, read_keys
from crossfade.serve.limits import Limits
from crossfade.serve.settings import LOOPBACK, check_host
from servers import Running, raw, running, soon

ONE, TWO = "key-of-one-0001", "key-of-two-0002"
TEXT = {"prompt": "the film"}
SMALL = Limits(body=2000, body_seconds=0.2, load=5)


@pytest.fixture(scope="module")
def standing() -> Iterator[Running]:
    settings = Settings(keys=Keys([ONE, TWO]), hosts=frozenset({*LOOPBACK, "desk.example.org"}))
    with running(settings=settings) as found:
        yield found


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# ---- Keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/desk", "/metrics", "/v1/requests/a/cancel", "/nothing", "/V1/models"],
)
def test_all_but_a_few_paths_need_a_key(server: Running, path: str) -> None:
    for headers in (
        {},
        as_("key-of-one-0003"),
        {"Authorization": ONE},
        {"Authorization": "Bearer"},
    ):
        answer = server.http.get(path, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get(path, headers=as_(TWO)).status_code != 401


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_nothing_is_read_of_a_request_without_a_key(server: Running, path: str) -> None:
    assert server.http.post(path, content=b"{").status_code == 401
    assert server.post(path, TEXT, headers={"Authorization": b"Bearer \xe9"}).status_code == 401
    assert server.session.requests == []


@pytest.mark.parametrize("path", ["/health", "/version", "/openapi.json"])
def test_some_paths_are_open(server: Running, path: str) -> None:
    assert server.http.get(path).status_code == 200


def test_prefixes_are_reused_by_one_key_alone(server: Running) -> None:
    for key in (ONE, TWO, ONE):
        assert server.post("/v1/completions", TEXT, headers=as_(key)).status_code == 200
    one, two, again = (r.options["scope"] for r in server.session.requests)
    assert one == again != two
    assert ONE not in one
    assert len(one) == 32


def test_a_request_is_its_owners_alone(server: Running) -> None:
    server.session.paused = True
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True}
    path = "/v1/chat/completions"
    with server.http.stream("POST", path, json=body, headers=as_(ONE)) as stream:
        lines = stream.iter_lines()
        id = json.loads(next(lines).removeprefix("data: "))["id"]
        for what, more in (("weights", {"weights": {"w": 1}}), ("cancel", {})):
            answer = server.post(f"/v1/requests/{id}/{what}", more, headers=as_(TWO))
            assert answer.status_code == 404
        assert server.session.requests[0].changes == []
        assert not server.session.requests[0].cancelled
        moved = server.post(f"/v1/requests/{id}/weights", {"weights": {"w": 1}}, headers=as_(ONE))
        assert moved.status_code == 200


def test_keys_come_from_options_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# of the team\nkey-of-a-file-1\n\nkey-of-a-file-2  \n")
    monkeypatch.setenv("CROSSFADE_API_KEY", "key-of-the-environment")
    keys = ["key-of-an-option", "key-of-a-file-1", "key-of-a-file-2", "key-of-the-environment"]
    assert read_keys(["key-of-an-option"], file) == keys
    for given in ("short", "with a space", "umläute-sind-keine"):
        with pytest.raises(ValueError, match="--api-key number 1 is no key") as error:
            read_keys([given])
        assert given not in str(error.value)
    monkeypatch.setenv("CROSSFADE_API_KEY", "")
    with pytest.raises(ValueError, match="the variable CROSSFADE_API_KEY is no key"):
        read_keys()
    file.write_text("# nobody\n")
    with pytest.raises(ValueError, match="which has no key"):
        read_keys(file=file)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "desk.example.org"])
def test_other_machines_are_let_in_with_a_key_alone(host: str) -> None:
    with pytest.raises(ValueError, match="which other machines reach, and there is no key"):
        check_host(host, Keys())
    check_host(host, Keys([ONE]))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST"])
def test_this_machine_needs_none(host: str) -> None:
    check_host(host, Keys())


# ---- Hosts and origins --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("desk.example.org", 200),
        ("evil.example.org", 403),
        ("localhost.evil.example.org", 403),
        ("127.0.0.1.evil.example.org:8000", 403),
        ("", 403),
    ],
)
def test_the_host_must_be_this_server(server: Running, host: str, status: int) -> None:
    answer = server.http.get("/health", headers={"Host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "wrong_host"


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:8000", "http://localhost:8000", 200),
        ("desk.example.org", "https://desk.example.org", 200),
        ("desk.example.org:443", "https://desk.example.org", 200),
        ("localhost:8000", "http://localhost:9000", 403),
        ("localhost", "http://evil.example.org", 403),
        ("desk.example.org", "https://desk.example.org.evil.org", 403),
        ("localhost", "null", 403),
        ("localhost", "", 403),
    ],
)
def test_scripts_of_other_pages_are_refused(
    server: Running, host: str, origin: str, status: int
) -> None:
    headers = {"Host": host, "Origin": origin, **as_(ONE)}
    for answer in (
        server.http.get("/v1/models", headers=headers),
        server.post("/v1/completions", TEXT, headers=headers),
    ):
        assert answer.status_code == status
        assert "access-control-allow-origin" not in answer.headers
    if status == 403:
        assert server.session.requests == []


def test_no_page_of_another_server_may_ask_beforehand(server: Running) -> None:
    headers = {
        "Origin": "http://evil.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    answer = server.http.options("/v1/completions", headers=headers)
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_pages_that_are_named_may_ask(serve: Any) -> None:
    server = serve(settings=Settings(keys=Keys([ONE]), origins=("https://notes.example.org",)))
    for origin, allowed in (("https://notes.example.org", True), ("https://evil.org", False)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        before = server.http.options("/v1/completions", headers=asked)
        answer = server.post("/v1/completions", TEXT, headers={"Origin": origin, **as_(ONE)})
        assert (before.status_code == 200) == allowed
        assert answer.status_code == (200 if allowed else 403)
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed


# ---- Bodies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_must_say_that_it_is_json(server: Running, kind: str) -> None:
    answer = server.http.post(
        "/v1/completions", content=json.dumps(TEXT), headers={"Content-Type": kind, **as_(ONE)}
    )
    assert answer.status_code == 415
    right = {"Content-Type": "Application/JSON; charset=utf-8", **as_(ONE)}
    content = json.dumps(TEXT)
    assert server.http.post("/v1/completions", content=content, headers=right).status_code == 200


@pytest.fixture
def small(serve: Any) -> Running:
    return serve(settings=Settings(limits=SMALL))


def test_a_large_body_is_refused(small: Running) -> None:
    text = json.dumps({"prompt": "a" * 2000})

    def pieces() -> Iterator[bytes]:
        for i in range(0, len(text), 100):
            yield text[i : i + 100].encode()

    for content in (text, pieces()):  # with its length, and without
        answer = small.http.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
    assert small.session.requests == []


@pytest.mark.parametrize("length", [b"-1", b"abc", b"1e3"])
def test_a_length_must_be_a_number(small: Running, length: bytes) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as sock:
        sock.sendall(raw(b"{}", length))
        assert sock.recv(100).startswith(b"HTTP/1.1 4")


def test_a_body_that_does_not_come_is_not_waited_for(small: Running) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=10) as sock:
        sock.sendall(raw(b'{"prompt"', b"100"))
        answer = http.client.HTTPResponse(sock)
        answer.begin()
        assert answer.status == 408
        assert json.loads(answer.read())["error"]["code"] == "body_too_slow"


def test_all_requests_together_may_cost_so_much(small: Running) -> None:
    small.session.paused = True
    body = {"messages": [{"role": "user", "content": "a"}], "stream": True, "n": 2}
    with small.http.stream("POST", "/v1/chat/completions", json=body) as stream:
        soon(lambda: small.session.running == 2)
        answer = small.post("/v1/completions", TEXT)
        assert answer.status_code == 429
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["code"] == "overloaded"
        small.session.paused = False
        assert small.post("/v1/completions", {**TEXT, "model": "base"}).status_code == 200
        stream.read()
    soon(lambda: small.app.state.service.calls.load == 0)
    assert small.post("/v1/completions", TEXT).status_code == 200


# ---- Headers ------------------------------------------------------------------------------------


def test_a_request_keeps_its_id(server: Running) -> None:
    for given, kept in (
        ("abc-1._Z", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("a b", False),
        ("<script>", False),
        ("", False),
    ):
        answer = server.http.get("/health", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) == kept
        assert answer.headers["x-request-id"].replace("-", "").replace(".", "").replace("_", "")
    first, second = (server.http.get("/nothing").headers["x-request-id"] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/models", "/openapi.json"])
def test_every_answer_says_how_little_a_page_may_do(server: Running, path: str) -> None:
    headers = server.http.get(path).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


def test_what_nobody_foresaw_is_an_answer_and_a_line_in_the_log(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise KeyError("the secret of somebody")

    monkeypatch.setattr(server.session, "stats", broken)
    answer = server.http.get("/metrics", headers={"X-Request-Id": "mine", **as_(ONE)})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine"
    assert any("mine: KeyError" in record.getMessage() for record in caplog.records)


def test_logs_have_no_texts(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "crossfade.serve")
    server.post("/v1/completions", {"prompt": "cast cast"}, headers=as_(ONE))
    server.session.fails_at = 1
    server.post("/v1/completions", {"prompt": "cast cast"}, headers=as_(ONE))
    soon(lambda: len(caplog.records) >= 3)
    assert "cast" not in caplog.text
    assert ONE not in caplog.text
    assert "POST /v1/completions 200" in caplog.text
