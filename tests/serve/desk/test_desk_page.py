"""The mixing desk in Chromium, on a fake server: texts, faders, strips and colours."""

from __future__ import annotations

import pytest
from desk_driver import HOSTILE, SIZES, Desk, until


@SIZES
def test_texts_are_written_and_faders_move_them(desk: Desk, size: tuple[int, int]) -> None:
    """The one test of the page that CI runs: what it is for, at both widths."""
    server = desk.server
    server.words = [" The", " day", f" {HOSTILE}", " was", " fine", "."]
    server.hold = {4}
    desk.open(size=size)
    assert desk.wide() <= size[0], "nothing is wider than the screen"
    desk.type(desk.one("textarea"), "How was it?")
    desk.write()
    a, b = sorted(desk.asked(2), key=lambda body: body["weights"]["w"], reverse=True)
    assert a["weights"] == {"w": 0.8, "v": 0.0}, "strip A stands where the server says"
    assert b["weights"] == {"w": 0.0, "v": 0.0}, "strip B is the base"
    assert a["messages"] == b["messages"] == [{"role": "user", "content": "How was it?"}]
    assert a["seed"] == b["seed"]
    until(lambda: desk.text(0) == desk.text(1) == f" The day {HOSTILE} was", "the first tokens")
    desk.set(desk.fader("w"), 1.5)
    name, weights = until(lambda: server.moves, "the move")[0]
    assert weights == {"w": 1.5, "v": 0.0}
    assert server.weights[name] == weights
    server.hold.clear()
    desk.written(0, 1)
    assert desk.text(0) == f" The day {HOSTILE} was fine."
    assert len(server.moves) == 1
    fine = desk.one(".strip .text [data-at='4']")
    assert desk.hues()[4] == "hue-0 s5", "w pushed it by 2.5 * 1.5 nats"
    desk.tap(fine)
    assert "+3.75" in desk.one(".tip").text
    assert desk.browser.title == "crossfade: mixing desk"
    assert desk.wide() <= size[0]


@pytest.mark.sweep
def test_mute_and_solo_move_the_running_text(desk: Desk) -> None:
    server = desk.server
    server.hold = {2}
    desk.open("#strip=w:0.8,v:-0.5")
    desk.write()
    assert desk.asked(1)[0]["weights"] == {"w": 0.8, "v": -0.5}
    until(lambda: desk.text() == " The weekend")
    for label, w, v in (
        ("Mute w of strip A", 0.0, -0.5),
        ("Mute w of strip A", 0.8, -0.5),
        ("Solo w of strip A", 0.8, 0.0),
        ("Solo v of strip A", 0.8, -0.5),
        ("Mute v of strip A", 0.8, 0.0),
    ):
        before = len(server.moves)
        desk.tap(desk.named(label))
        until(lambda before=before: len(server.moves) > before, label)
        assert server.moves[-1][1] == {"w": w, "v": v}, label
    assert desk.named("Mute v of strip A").get_attribute("aria-pressed") == "true"
    fader = desk.fader("v")
    assert fader.get_attribute("aria-valuetext") == "-0.5, silent"
    server.hold.clear()
    desk.written()


@pytest.mark.sweep
def test_moves_that_follow_closely_become_one_and_the_last_one_counts(desk: Desk) -> None:
    server = desk.server
    server.hold = {3}
    desk.open("#strip=w:0,v:0")
    desk.write()
    until(lambda: desk.text() == " The weekend was")
    fader = desk.fader("w")
    desk.run(
        "for (let x = 1; x <= 40; x++) { arguments[0].value = x / 20; "
        "arguments[0].dispatchEvent(new Event('input', {bubbles: true})) }",
        fader,
    )
    until(lambda: server.moves and server.moves[-1][1]["w"] == 2, "the last move")
    assert len(server.moves) <= 3
    server.hold.clear()
    desk.written()
    assert [x.get_attribute("data-moved") for x in desk.all(".moved b")] == ["w 2"]


@pytest.mark.sweep
def test_a_move_before_the_first_token_is_not_lost(desk: Desk) -> None:
    server = desk.server
    server.hold = {0, 1}
    desk.open("#strip=w:0,v:0")
    desk.write()
    desk.asked(1)
    desk.set(desk.named("Number of w of strip A"), 1.25)
    server.hold.discard(0)
    until(lambda: server.moves, "the move")
    assert server.moves[0][1] == {"w": 1.25, "v": 0.0}
    server.hold.clear()
    desk.written()


@pytest.mark.sweep
def test_a_finished_text_is_written_anew_when_its_fader_moves(desk: Desk) -> None:
    desk.open()
    desk.write()
    desk.written(0, 1)
    desk.set(desk.fader("w"), -1)
    assert desk.asked(3)[2]["weights"]["w"] == -1
    desk.written(0)
    assert desk.server.moves == []
    desk.tap(desk.one(".settings > .check:last-of-type input"))
    desk.set(desk.fader("w"), 1)
    desk.write()
    assert [body["weights"]["w"] for body in desk.asked(5)[3:]] in ([1, 0], [0, 1])
    assert len(desk.server.asked) == 5, "not before it was asked to"


@pytest.mark.sweep
def test_strips_are_added_and_removed(desk: Desk) -> None:
    desk.open()
    desk.tap(desk.button("Add a strip"))
    desk.tap(desk.button("Add a strip"))
    assert [x.text for x in desk.all(".strip h2")] == ["A", "B", "C", "D"]
    assert not [x for x in desk.all("button") if "Add a strip" in x.text]
    desk.set(desk.named("Number of w of strip D"), 2)
    desk.tap(desk.named("Remove strip B"))
    desk.write()
    assert sorted(body["weights"]["w"] for body in desk.asked(3)) == [0, 0.8, 2]
    desk.written(0, 1, 2)
    desk.tap(desk.button("Add a strip"))
    assert [x.text for x in desk.all(".strip h2")] == ["A", "C", "D", "B"]


@pytest.mark.sweep
def test_a_letter_of_several_tokens_is_one_word(desk: Desk) -> None:
    """Its tokens have no texts of their own; what moved them adds up."""
    desk.server.words = [
        " A",
        (" café", ["bytes:\\x20", " caf", "bytes:\\xc3", "bytes:\\xa9"]),
        ".",
    ]
    desk.server.hold = {2}
    desk.open("#strip=w:1")
    desk.write()
    until(lambda: desk.text() == " A café")
    desk.set(desk.fader("w"), 2)
    until(lambda: desk.server.moves)
    desk.server.hold.clear()
    desk.written()
    desk.tap(desk.one("[data-at='1']"))
    said = desk.one(".tip").text.split("\n")
    assert said[:3] == ["café", "moved away from the base, in nats", "w +1.60"]
    assert "tokens\n4" in desk.one(".tip").text.replace(" ", "\n")
    assert [dd.text for dd in desk.all(".measured dd")][2].startswith("6")
    before = desk.run("return document.querySelector('.moved').previousElementSibling.textContent")
    assert before == " café", "the mark stands where the server says that the move counted"
