"""What is set at the desk: formulas, addresses, sweeps, and the code that says the same."""

from __future__ import annotations

import ast
import json
import shlex

import pytest
from desk_driver import SIZES, Desk, until

pytestmark = pytest.mark.sweep


@SIZES
def test_a_sweep_is_drawn(desk: Desk, size: tuple[int, int]) -> None:
    desk.server.desk["searches"] = ["mood"]
    desk.server.scores = {"mood": 0.25}
    desk.open("#strip=w:0.8,v:0.5", size)
    desk.tap(desk.one(".sweep summary"))
    fields = {
        x.text: x.find_element("css selector", "input, select")
        for x in desk.all(".sweep .range .field")
    }
    for name, value in (("From", -1), ("To", 1), ("Positions", 3), ("Texts each", 2)):
        desk.set(next(x for label, x in fields.items() if label.startswith(name)), value)
    desk.tap(desk.button("Sweep"))
    until(lambda: "6 of 6 texts." in desk.one(".sweep").text)
    asked = desk.asked(6)
    assert sorted({(b["weights"]["w"], b["weights"]["v"]) for b in asked}) == [
        (-1, 0.5),
        (0, 0.5),
        (1, 0.5),
    ]
    assert sorted({b["seed"] for b in asked}) == [7, 8]
    rows = [x.text for x in desk.all(".points summary")]
    assert [row.split("\n")[0] for row in rows] == ["w = -1", "w = 0", "w = 1"]
    assert "0.25 mood" in rows[2]
    assert all(body["search"] == {"best_of": 1, "value": "mood"} for body in asked)
    label = desk.one(".sweep .chart").get_attribute("aria-label")
    assert label == "mood against divergence from the base, nats a token, at 3 positions of w"
    drawn = (
        "const c = document.querySelector('.sweep canvas'); "
        "return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    until(lambda: desk.run(drawn) > 10, "the picture")
    measure = desk.all(".sweep .range select")[1]
    desk.run(
        "arguments[0].value = 'length'; "
        "arguments[0].dispatchEvent(new Event('change', {bubbles: true}))",
        measure,
    )
    until(lambda: "20 tokens" in desk.one(".points summary").text)
    desk.tap(desk.one(".points summary"))
    desk.tap(desk.button("Open as a strip"))
    assert desk.named("Number of w of strip B").get_attribute("value") == "-1"
    assert desk.wide() <= size[0]


def test_settings_are_in_the_address(desk: Desk) -> None:
    prompt = "Why & how? 100 % <sure>"
    desk.open()
    desk.type(desk.one("textarea"), prompt)
    desk.set(desk.named("Number of w of strip A"), -1.25)
    desk.tap(desk.named("Mute v of strip A"))
    desk.run("document.querySelector('.settings details').open = true")
    desk.type(desk.all(".settings details textarea")[1], "Be odd.")
    hash_ = until(lambda: "Be+odd." in (x := desk.browser.current_url) and x).split("#")[1]
    desk.open(f"#{hash_}")
    assert desk.one("textarea").get_attribute("value") == prompt
    desk.write()
    bodies = desk.asked(2)
    assert sorted(b["weights"]["w"] for b in bodies) == [-1.25, 0]
    assert bodies[0]["systems"] == {"base": "Be odd."}
    assert desk.named("Mute v of strip A").get_attribute("aria-pressed") == "true"


def test_the_code_says_what_is_sent(desk: Desk) -> None:
    desk.open('#strip=w:-0.5,v:2&prompt=It\'s "so" 100%25 ⏎&system.kind=Be kind.&temperature=0.5')
    desk.run("document.querySelector('.code').open = true")
    formula, python, session, curl = (x.text for x in desk.all(".code pre"))
    assert formula == "base + (-0.5) * (kind - base) + 2 * (short - base)"
    for code in (python, session):
        ast.parse(code)
        assert "temperature=0.5" in code
        assert "seed=7" in code
    call = ast.parse(python).body[-2].value  # type: ignore[attr-defined]
    assert "kind=replace(kind, system='Be kind.')" in ast.unparse(call)
    chat = ast.literal_eval(call.args[1])
    assert chat == [[{"role": "user", "content": 'It\'s "so" 100% ⏎'}]]
    desk.write()
    (body,) = desk.asked(1)
    words = shlex.split(curl)
    assert words[:3] == ["curl", "-N", f"{desk.server.url}/v1/chat/completions"]
    said = json.loads(words[-1])
    told = ("logprobs", "return_pushes", "return_kl_to_base")
    assert said == {name: x for name, x in body.items() if name not in told}


def test_plain_texts_are_completed(desk: Desk) -> None:
    desk.server.desk = {**desk.server.desk, "has_chat_template": False}
    desk.open("#prompt=Once&strip=w:1")
    desk.write()
    desk.written()
    path, body = desk.server.asked[0]
    assert path == "/v1/completions"
    assert body["prompt"] == "Once"
    assert "messages" not in body
    assert desk.text().startswith(" The weekend")
    assert [x.text for x in desk.all(".settings summary")] == []


def test_a_single_model_has_no_faders(desk: Desk) -> None:
    desk.server.desk = {**desk.server.desk, "terms": ["base"], "blend": "base", "weights": {}}
    desk.open()
    assert "has no faders" in desk.one(".channels").text
    assert len(desk.all(".strip")) == 1
    desk.write()
    desk.written()
    assert desk.asked(1)[0]["weights"] == {}


@pytest.mark.parametrize(
    ("formula", "faders"),
    [
        ("base + w * (kind - base)", {"w": "kind - base"}),
        ("(1 - lam) * base + lam * kind", {"lam": "kind"}),
        ("base + (kind - base).clamp(min=-2) * push", {"push": "(kind - base).clamp(min=-2)"}),
        ("power_mean([base, kind], weights=[a, b], r=-1)", {"a": "", "b": ""}),
        ("cfg(base, s, negative_system='Be rude, w * x.')", {"s": ""}),
        ("base + w1 * (w2 * (kind - base))", {"w1": "w2 * (kind - base)", "w2": "kind - base"}),
        ("base + 1e-3 * größe * kind", {"größe": "kind"}),
        ("base.within(Support(term=0, top_k=5)) + inf * 0", {}),
    ],
)
def test_faders_are_the_free_names_of_the_formula(
    desk: Desk, formula: str, faders: dict[str, str]
) -> None:
    desk.open("#strip=x:0")
    desk.type(desk.one("#blend"), formula)
    found = [
        (
            x.find_element("css selector", ".name code").text,
            [y.text for y in x.find_elements("css selector", ".name small")],
        )
        for x in desk.all(".channel")
    ]
    assert found == [
        (name, [what.replace(" - ", " \u2212 ")] if what else []) for name, what in faders.items()
    ]


def test_a_formula_that_cannot_be_is_not_sent(desk: Desk) -> None:
    desk.open("#strip=w:1")
    for formula, said in (("base + (kind", "A ( is not closed."), ("base)", "A ) is too many.")):
        desk.type(desk.one("#blend"), formula)
        assert desk.one("#blend-help").text == said
        assert not desk.button("Write").is_enabled()
    desk.tap(desk.button("One fader for each"))
    want = "base + w_kind * (kind - base) + w_short * (short - base)"
    assert desk.one("#blend").get_attribute("value") == want
    assert desk.button("Write").is_enabled()
