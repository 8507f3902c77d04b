"""`crossfade serve`: what its options mean, and how it begins and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from crossfade import cli, training
from crossfade.loading import ServerPlan
from crossfade.serve import server as serving
from word_models import loaded

BLEND = "base + w * (tuned - ref)"


def models(paths: dict[str, str]) -> list[str]:
    return [x for name, path in paths.items() for x in ("--model", f"{name}={path}")]


class Visitor(threading.Thread):
    """Waits until a server is there, asks it something, and tells the process to stop."""

    def __init__(self, ask: Callable[[httpx.Client], Any], stop: signal.Signals) -> None:
        super().__init__()
        self.ask, self.stop_by, self.found = ask, stop, None
        self.socket: socket.socket | None = None

    def bind(self, host: str, port: int) -> socket.socket:
        self.socket = BIND(host, port)
        return self.socket

    def run(self) -> None:
        try:
            while self.socket is None:
                time.sleep(0.01)
            with httpx.Client(base_url=f"http://127.0.0.1:{self.socket.getsockname()[1]}") as http:
                while True:
                    try:
                        http.get("/health")
                        break
                    except httpx.ConnectError:
                        time.sleep(0.05)
                self.found = self.ask(http)
        finally:
            os.kill(os.getpid(), self.stop_by)


BIND = serving.bind


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Runs the command until a visitor has asked, and gives its status and the answers."""

    def run(ask: Any, *argv: str, stop: signal.Signals = signal.SIGTERM) -> tuple[int, Any]:
        visitor = Visitor(ask, stop)
        monkeypatch.setattr(serving, "bind", visitor.bind)
        visitor.start()
        # A shell lets what it starts in the background ignore Ctrl-C.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            status = cli.main(["serve", "--port", "0", *argv])
        finally:
            signal.signal(signal.SIGINT, before)
        visitor.join()
        return status, visitor.found

    return run


def test_models_blends_and_names_are_served(
    visited: Any, paths: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    def ask(http: httpx.Client) -> Any:
        desk = http.get("/v1/desk").json()
        body = {"prompt": "a b c", "max_tokens": 5, "seed": 1}
        plain = http.post("/v1/completions", json=body).json()
        searched = {**body, "search": {"best_of": 3, "value": "likely"}, "draft": "small"}
        refused = http.post("/v1/completions", json={**body, "max_tokens": 9})
        searched.pop("draft")
        return desk, plain, http.post("/v1/completions", json=searched).json(), refused

    argv = [*models(paths), "--blend", BLEND, "--fader", "w=0.8", "--name", "mine"]
    argv += ["--value", "likely=tuned - ref", "--draft", "small=ref", "--max-tokens", "8"]
    status, (desk, plain, searched, refused) = visited(ask, *argv)
    assert status == 0
    assert (desk["model"], desk["blend"], desk["weights"]) == ("mine", BLEND, {"w": 0.8})
    assert (desk["terms"], desk["faders"]) == (["base", "tuned", "ref"], ["w"])
    assert (desk["searches"], desk["drafts"]) == (["likely"], ["prompt", "small"])
    assert plain["choices"][0]["text"]
    assert isinstance(searched["choices"][0]["value"], float)
    assert refused.status_code == 400
    err = capsys.readouterr().err
    assert "at http://127.0.0.1:" in err
    assert "(Ctrl-C stops)" in err
    assert err.count("loading ") == 3
    assert "POST /v1/completions 200" in err


def test_value_heads_are_values_of_searches_and_of_blends(
    visited: Any, paths: dict[str, str], tmp_path: Path
) -> None:
    """Wherever they stand among the options, the base is the first model that writes."""
    head = training.value_model(loaded(paths["base"]), "q", rank=2)
    torch.nn.init.normal_(head.get_output_embeddings().b)
    training.save_value_head(head, tmp_path / "head")

    def ask(http: httpx.Client) -> Any:
        body = {"prompt": "a b c", "max_tokens": 5, "seed": 1, "blend": "base + 0.5 * joy"}
        blended = http.post("/v1/completions", json=body)
        body = {"prompt": "a b c", "max_tokens": 5, "seed": 1, "search": {"best_of": 2}}
        return http.get("/v1/desk").json(), blended, http.post("/v1/completions", json=body)

    argv = ["--model", f"joy={paths['base']}@{tmp_path / 'head'}", *models(paths)]
    status, (desk, blended, searched) = visited(ask, *argv)
    assert status == 0
    assert (desk["blend"], desk["terms"]) == ("base", ["base", "tuned", "ref"])
    assert desk["values"] == desk["searches"] == ["joy"]
    assert blended.status_code == 200, blended.text
    assert isinstance(searched.json()["choices"][0]["value"], float), searched.text


def test_ctrl_c_lets_a_stream_end(visited: Any, paths: dict[str, str]) -> None:
    found = []

    def ask(http: httpx.Client) -> Any:
        body = {"prompt": "a b", "max_tokens": 100, "stream": True, "logit_bias": {"1": -100}}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = (line for line in stream.iter_lines() if line)
            found.append(next(lines))
            os.kill(os.getpid(), signal.SIGINT)
            found.extend(lines)

    argv = ["--model", paths["base"], "--quiet", "--max-body", "1"]
    status, _ = visited(ask, *argv, stop=signal.SIGURG)  # a signal that does nothing
    assert status == 130
    *_, last, done = found
    assert done == "data: [DONE]"
    assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--host", "0.0.0.0"], "--host is '0.0.0.0', which other machines reach, and there is"),
        (["--host", "no.such.host.invalid", "--api-key", "a-long-key"], "--host and --port: "),
        (["--api-key", "short"], "--api-key number 1 is no key"),
        (["--blend", "base + v * x"], "--blend has the unknown name"),
        (["--blend", "base +"], "--blend: invalid syntax"),
        (["--value", "v"], "--value is 'v'; it must be NAME=FORMULA"),
        (["--value", "v=tuned - raf"], "--value has the unknown name 'raf'"),
        (["--value", "v=base", "--value", "v=ref"], "--value v=... is given twice"),
        (["--judge", "fair=nobody"], "--judge has the unknown name 'nobody'"),
        (
            ["--draft", "prompt=ref"],
            "--draft prompt=... is given; every server has a draft of that name",
        ),
        (["--name", "ref"], "--name is 'ref', which is a --model"),
    ],
)
def test_mistakes_are_found_before_models_are_loaded(
    paths: dict[str, str],
    argv: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ServerPlan, "load", None)
    assert cli.main(["serve", "--port", "0", *models(paths), *argv]) == 2
    assert f"crossfade serve: error: {error}" in capsys.readouterr().err


def test_a_port_that_is_taken_is_found_first(
    paths: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerPlan, "load", None)
    with BIND("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "--port", port, "--model", paths["base"]]) == 2
    assert f"port {port}: Address already in use" in capsys.readouterr().err


def test_without_models_the_moods_of_the_demo_are_served() -> None:
    from crossfade.cli import serve
    from crossfade.cli.main import parser

    plan = serve._plan(parser().parse_args(["serve"]))
    plan.check()
    assert plan.plan.blend == "base + w * (cheerful - gloomy)"
    assert list(plan.plan.specs) == ["base", "cheerful", "gloomy"]
    assert plan.plan.faders == {"w": 0.0}
    assert set(plan.plan.systems) == {"cheerful", "gloomy"}
