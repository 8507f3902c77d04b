"""The page on the server itself, over a scripted session: what one asks, the other answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crossfade.serve import Settings
from crossfade.serve.keys import Keys
from desk_driver import Desk, until


def test_the_page_and_the_server_speak_of_the_same_things(
    window: Any, serve: Callable[..., Any]
) -> None:
    server = serve(settings=Settings(keys=Keys(["secret"])))
    session = server.session
    session.weights = {"w": 0.8}
    session.length, session.paused = 12, True
    window.get_log("browser")
    desk = Desk(window, server).open("#prompt=Hello&seed=3", ready=False)
    desk.one("dialog input[type=password]").send_keys("secret\n")
    until(lambda: len(desk.all(".strip")) == 2, "the desk")
    desk.write()
    first, second = until(lambda: len(session.requests) == 2 and session.requests)
    weights = [request.options["weights"]["w"] for request in (first, second)]
    assert sorted(weights) == [0.0, 0.8]
    a = first if weights[0] else second
    assert a.options["seed"] == 3
    desk.set(desk.fader("w"), 1.5)
    until(lambda: a.changes, "the move")
    assert a.changes[0][1] == {"w": 1.5}
    session.paused = False
    desk.written(0, 1)
    words = desk.text().split()
    assert len(words) == 12
    assert desk.hues()[:12] == ["hue-0 s2"] * 12, "the session says that w pushed each by 0.5 nats"
    assert [x.get_attribute("data-moved") for x in desk.all(".moved b")] == ["w 1.5"]
    session.paused = True
    desk.write()
    until(lambda: len(session.requests) == 4)
    desk.tap(desk.button("Stop"))
    until(lambda: all(request.cancelled for request in session.requests[2:]), "the end of both")
    session.paused, session.fails_at = False, 3
    desk.write()
    until(lambda: "a NaN" in desk.state(0) and "a NaN" in desk.state(1), "what went wrong")
    assert len(desk.text().split()) == 3
    desk.type(desk.one("#blend"), "base + w * (knd(base))")
    desk.write()
    until(lambda: "unknown function 'knd'" in desk.one("#blend-help").text)
    said = [x for x in desk.complaints() if "Failed to load resource" not in x]
    assert said == []
