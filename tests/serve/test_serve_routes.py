"""The other endpoints: models, tokens, health, figures, the page, and their document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade.serve import Settings
from crossfade.serve.keys import Keys
from scripted import BLEND, Session
from servers import Running


def test_the_default_blend_is_the_first_model(server: Running, serve: Any) -> None:
    listed = server.http.get("/v1/models").json()
    assert listed["object"] == "list"
    names = [(m["id"], m["blend"]) for m in listed["data"]]
    assert names == [("crossfade", BLEND), ("base", "base"), ("kind", "kind")]
    session = Session()
    session.blend = "base"
    single = serve(session).http.get("/v1/models").json()
    assert [m["id"] for m in single["data"]] == ["base", "kind"]


def test_models_choose_the_blend(server: Running) -> None:
    def blend(**fields: Any) -> Any:
        assert server.post("/v1/completions", {"prompt": "a", **fields}).status_code == 200
        return server.session.requests[-1].options["blend"]

    assert blend() is blend(model="crossfade") is None
    assert blend(model="kind") == "kind"
    assert blend(model="kind", blend="base - kind") == "base - kind"


def test_a_page_learns_what_there_is(serve: Any) -> None:
    session = Session()
    session.terms, session.values = ("base", "kind", "quality"), ("quality",)
    session.weights = {"w": 0.5, "v": 1.0}
    session.blend = "base + w * (kind - base) + v * quality"
    server = serve(session, Settings(drafts={"small": None}))
    desk = server.http.get("/v1/desk").json()
    limits = desk.pop("limits")
    assert limits["max_tokens"] == 4096
    assert limits["seconds"] is None
    assert desk == {
        "model": "crossfade",
        "terms": ["base", "kind"],
        "values": ["quality"],
        "blend": "base + w * (kind - base) + v * quality",
        "faders": ["v", "w"],
        "weights": {"w": 0.5, "v": 1.0},
        "searches": [],
        "judges": [],
        "drafts": ["prompt", "small"],
        "has_chat_template": True,
        "needs_key": False,
        "version": cf.__version__,
    }


def test_texts_become_tokens_and_texts_again(server: Running) -> None:
    found = server.post("/tokenize", {"prompt": "the film"}).json()
    assert found == {"count": 2, "tokens": [11, 10]}
    assert server.post("/detokenize", {"tokens": [11, 10]}).json() == {"prompt": "the film"}
    chat = {"messages": [{"role": "user", "content": "the film"}]}
    tokens = server.post("/tokenize", chat).json()["tokens"]
    server.post("/v1/chat/completions", chat)
    assert tokens == server.session.requests[-1].prompt_ids


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/detokenize", {"tokens": [61]}, "tokens has 61; ids must be within [0, 61)"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0] is -1"),
        ("/detokenize", {"tokens": "a"}, "tokens is 'a'"),
        ("/tokenize", {"prompt": "a", "model": "x"}, "there is no model 'x'"),
        ("/tokenize", {"prompt": "a", "messages": []}, "messages is []"),
        ("/v1/requests/cmpl-x/cancel", {}, "id is 'cmpl-x'"),
        (f"/v1/requests/cmpl-{'0' * 32}/cancel", {}, "is under way"),
    ],
)
def test_mistakes_are_named(server: Running, path: str, body: Any, says: str) -> None:
    answer = server.post(path, body)
    assert 400 <= answer.status_code < 500
    assert says in answer.json()["error"]["message"]


def test_a_model_without_a_chat_template_has_no_chats(serve: Any) -> None:
    session = Session()
    session.tokenizer.chat_template = None
    server = serve(session)
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = server.post(path, chat)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert server.http.get("/v1/desk").json()["has_chat_template"] is False
    assert server.post("/v1/completions", {"prompt": "a"}).status_code == 200


def test_health_is_that_of_the_engine(server: Running) -> None:
    alive = server.http.get("/health")
    assert (alive.status_code, alive.json()) == (200, {"status": "ok"})
    server.session.alive = False
    dead = server.http.get("/health")
    assert (dead.status_code, dead.json()) == (503, {"status": "dead"})


def test_the_version_is_told(server: Running) -> None:
    assert server.http.get("/version").json() == {"version": cf.__version__}


def test_figures_are_counted(serve: Any) -> None:
    server = serve()
    chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    assert server.post("/v1/chat/completions", {**chat, "n": 2}).status_code == 200
    assert server.post("/v1/chat/completions", {**chat, "n": -1}).status_code == 400
    prompt = len(server.session.requests[0].prompt_ids)
    text = server.http.get("/metrics").text
    for line in (
        'crossfade_http_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'crossfade_http_requests_total{path="/v1/chat/completions",status="400"} 1.0',
        f"crossfade_prompt_tokens_total {prompt}.0",
        "crossfade_generated_tokens_total 6.0",
        "crossfade_time_to_first_token_seconds_count 2.0",
        "crossfade_time_per_token_seconds_count 4.0",
        "crossfade_alive 1.0",
        "crossfade_running 0.0",
        "crossfade_load 0.0",
        "crossfade_session_tokens 6.0",
        'crossfade_session_requests{reason="stop"} 2.0',
    ):
        assert line in text.splitlines()


def test_paths_that_are_not_there(server: Running) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/../pyproject.toml", 404),
        ("GET", "/page/../../settings.py", 404),
        ("GET", "/%2e%2e/settings.py", 404),
    ):
        answer = server.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_folder_is_the_page(serve: Any, tmp_path: Path) -> None:
    files = {
        "index.html": ("<!doctype html><title>desk</title>", "text/html; charset=utf-8"),
        "app.js": ("export {}", "text/javascript; charset=utf-8"),
        "app.css": ("body {}", "text/css; charset=utf-8"),
        "icon.svg": ("<svg/>", "image/svg+xml"),
    }
    for name, (content, _) in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / ".hidden").write_text("no")
    server = serve(settings=Settings(page=tmp_path, keys=Keys(["key-of-somebody"])))
    for name, (content, kind) in files.items():
        answer = server.http.get(f"/{name}")  # without the key, which the page asks for
        assert (answer.text, answer.headers["content-type"]) == (content, kind)
        assert answer.headers["cache-control"] == "no-cache"
        assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert server.http.get("/").text == files["index.html"][0]
    assert server.http.get("/.hidden").status_code == 401
    assert server.http.get("/v1/desk").status_code == 401
