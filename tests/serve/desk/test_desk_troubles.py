"""What the desk does when something goes wrong, or means harm."""

from __future__ import annotations

from typing import Any

import pytest
from desk_driver import HOSTILE, Desk, until
from fake_desk import serving

pytestmark = pytest.mark.sweep


def test_an_error_within_a_stream(desk: Desk) -> None:
    error = {"message": "logits have NaN", "type": "server_error", "param": None}
    desk.server.breaks = (3, error)
    desk.open("#strip=w:1")
    desk.write()
    until(lambda: desk.state() == "logits have NaN")
    assert desk.text() == " The weekend was", "what was written stays"
    assert desk.one(".state").get_attribute("role") == "alert"
    assert desk.one(".connection").text.startswith("connected"), "the server is well"


def test_a_stream_that_breaks_off(desk: Desk) -> None:
    desk.server.breaks = (3, None)
    desk.open("#strip=w:1")
    desk.write()
    until(lambda: desk.state() == "The connection ended before the text did.")
    assert desk.text() == " The weekend was"
    until(lambda: desk.one(".connection").text.startswith("connected"), "it is back")


def test_a_server_that_goes_and_comes_back(window: Any) -> None:
    with serving() as server:
        desk = Desk(window, server).open("#strip=w:1")
        desk.type(desk.one("textarea"), "Still here?")
        port = server.server_port
    desk.write()
    until(lambda: "cannot be reached" in desk.one(".banner").text)
    assert not desk.button("Write").is_enabled()
    with serving(port) as server:
        until(lambda: not desk.all(".banner"), "the connection")
        assert desk.one("textarea").get_attribute("value") == "Still here?"
        desk.write()
        desk.written()
        assert server.asked[0][1]["messages"][0]["content"] == "Still here?"


def test_a_full_server_is_asked_again(desk: Desk) -> None:
    full = (429, {"message": "as many requests wait as may"}, {"Retry-After": "1"})
    desk.server.refusals = [full]
    desk.open("#strip=w:1")
    desk.write()
    until(lambda: desk.state() == "The server is full; asking again in 1 s.")
    desk.written()
    assert len(desk.server.asked) == 2
    desk.server.refusals = [(*full[:2], {"Retry-After": "30"})]
    desk.write()
    until(lambda: desk.state() == "The server is full; asking again in 30 s.")
    desk.tap(desk.button("Stop"))
    until(lambda: desk.state() == "Stopped.")
    desk.server.refusals = [(*full[:2], {"Retry-After": "0"})] * 5
    desk.write()
    until(lambda: desk.state() == "as many requests wait as may")


def test_the_key_is_asked_for_and_kept_in_memory(desk: Desk) -> None:
    desk.server.key = "right-key"
    desk.open(ready=False)
    dialog = desk.one("dialog")
    field = dialog.find_element("css selector", "input[type=password]")
    field.send_keys("wrong-key\n")
    until(lambda: "the key is wrong" in desk.one("dialog").text)
    desk.one("dialog input[type=password]").send_keys("right-key\n")
    until(lambda: desk.all(".strip"))
    desk.write()
    desk.written(0, 1)
    assert set(desk.server.keys[2:]) == {"Bearer right-key"}
    kept = desk.run(
        "return JSON.stringify([{...localStorage}, {...sessionStorage}, location.href])"
    )
    assert "right-key" not in kept
    desk.run("document.querySelector('.code').open = true")
    assert "right-key" not in desk.one(".code").text
    assert "$CROSSFADE_API_KEY" not in desk.one(".code").text, "the server did not say it needs one"


def test_a_key_can_be_kept_for_the_tab(desk: Desk) -> None:
    desk.server.key, desk.server.desk = "right-key", {**desk.server.desk, "needs_key": True}
    desk.open(ready=False)
    desk.tap(desk.one("dialog .check input"))
    desk.one("dialog input[type=password]").send_keys("right-key\n")
    until(lambda: desk.all(".strip"))
    desk.browser.refresh()
    until(lambda: desk.all(".strip"))
    assert desk.all("dialog") == []
    desk.run("document.querySelector('.code').open = true")
    assert "$CROSSFADE_API_KEY" in desk.one(".code").text
    desk.run("sessionStorage.clear()")


def test_hostile_texts_stay_texts(desk: Desk) -> None:
    bad = HOSTILE.replace('"', "'").replace("'bad'", "1")
    desk.server.desk = {
        **desk.server.desk,
        "terms": ["base", bad],
        "version": bad,
        "weights": {"w": 1.0},
        "blend": "base + w * base",
    }
    desk.server.words = [HOSTILE, "<script>document.title='bad'</script>", "&amp;", "\u202e‮"]
    desk.server.desk["searches"] = [bad]
    desk.server.scores = {bad: 1.0}
    desk.open(f"#prompt={bad}&strip={bad}:1")
    desk.write()
    desk.written()
    assert desk.text() == "".join(desk.server.words)
    desk.run("for (const x of document.querySelectorAll('details')) x.open = true")
    desk.tap(desk.button("Sweep"))
    until(lambda: "18 of 18" in desk.one(".sweep").text)
    desk.tap(desk.one(".text [data-at='0']"))
    assert HOSTILE in desk.one(".tip").text
    assert desk.browser.title == "crossfade: mixing desk"
    assert desk.all("#desk img, #desk script") == []


def test_what_the_server_cannot_tell_is_left_out(desk: Desk) -> None:
    """A power mean has no pushes: its texts come without colours."""
    desk.server.refusals = [(400, {"message": "no pushes", "param": "return_pushes"}, {})]
    desk.open("#strip=w:1")
    desk.write()
    desk.written()
    first, second = desk.asked(2)
    assert first["return_pushes"]
    assert "return_pushes" not in second
    assert second["return_kl_to_base"]
    assert desk.all(".text [class*='hue-']") == []


def test_what_the_server_says_of_the_formula_stands_beside_it(desk: Desk) -> None:
    said = "blend: unknown name 'knd' (known: base, kind) at column 8\n  base + knd\n         ^"
    desk.server.refusals = [(400, {"message": said, "param": "blend"}, {})]
    desk.open("#strip=w:1")
    desk.write()
    until(lambda: "unknown name 'knd'" in desk.one("#blend-help").text)
    assert desk.one("#blend").get_attribute("aria-invalid") == "true"
    desk.write()
    desk.written()
    assert desk.one("#blend").get_attribute("aria-invalid") == "false"


def test_a_hostile_address_changes_only_what_it_may(desk: Desk) -> None:
    desk.open(
        "#temperature=NaN&seed=-1&max_tokens=1e9&top_p=7&strip=w:Infinity,v:1e999,__proto__:1"
        "&strip=x&strip=w:2&strip=&strip=&strip=&system.__proto__=x&constructor=1&blend=base%2Bw*kind"
    )
    desk.write()
    bodies = desk.asked(4)
    assert [b["weights"] for b in bodies].count({"w": 2}) == 1
    assert bodies[0]["temperature"] == 0.7
    assert bodies[0]["seed"] == 7
    assert bodies[0]["max_tokens"] == 120
    assert "systems" not in bodies[0]
