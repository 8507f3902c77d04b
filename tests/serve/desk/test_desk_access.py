"""The desk by keys, by ear, in the dark and on a phone."""

from __future__ import annotations

import re

import pytest
from desk_driver import DESKTOP, PHONE, SIZES, Desk, until

pytestmark = pytest.mark.sweep


@SIZES
def test_the_numbers_of_a_token_by_mouse_tap_and_keys(desk: Desk, size: tuple[int, int]) -> None:
    from selenium.webdriver import ActionChains, Keys

    desk.open("#strip=w:1,v:1", size)
    desk.write()
    desk.written()
    assert desk.hues()[:5] == ["", "hue-0 s2", "hue-1 s3", "hue-1 s4 against", "hue-0 s5"]
    text = desk.one(".text")
    desk.run("arguments[0].scrollIntoView({block: 'center'})", text)
    if size == DESKTOP:
        ActionChains(desk.browser).move_to_element(desk.one("[data-at='3']")).perform()
        tip = desk.one(".tip").text
        assert "a" in tip
        assert "\u22121.50" in tip
        assert "+1.00" in tip
        ActionChains(desk.browser).move_to_element(desk.one("h1")).perform()
        until(lambda: not desk.all(".tip"), "it closes")
    desk.tap(desk.one("[data-at='2']"))
    box = desk.run("return arguments[0].getBoundingClientRect()", desk.one(".tip"))
    assert box["left"] >= 0
    assert box["right"] <= size[0]
    assert box["bottom"] <= size[1]
    ActionChains(desk.browser).send_keys(Keys.ESCAPE).perform()
    until(lambda: not desk.all(".tip"), "it closes")
    text.send_keys(Keys.HOME)
    text.send_keys(Keys.ARROW_RIGHT)
    said = desk.one("[role=status]")
    until(lambda: "weekend: w for it by 0.40 nats" in said.get_attribute("textContent"))
    assert "probability 90 %" in said.get_attribute("textContent")
    assert len(desk.all(".text .current")) == 1
    text.send_keys(Keys.TAB)
    until(lambda: not desk.all(".tip"), "it closes when it is left")


def test_the_live_region_says_little(desk: Desk) -> None:
    desk.server.pause = 0.01
    desk.open("#strip=w:1")
    desk.run(
        "window.heard = []; new MutationObserver(() => heard.push(document.querySelector("
        "'[role=status]').textContent)).observe(document.querySelector('[role=status]'), "
        "{childList: true, characterData: true, subtree: true})"
    )
    desk.write()
    desk.written()
    heard = desk.run("return heard")
    assert heard == ["Writing.", "Strip A: 20 tokens. It ended by itself."]
    assert desk.all(".text [aria-live]") == []


def test_keys_write_and_stop(desk: Desk) -> None:
    from selenium.webdriver import ActionChains, Keys

    server = desk.server
    server.hold = {2}
    desk.open("#strip=w:1")
    keys = ActionChains(desk.browser)
    desk.one("textarea").send_keys(" ")
    assert server.asked == [], "a space in a field is a space"
    desk.one("textarea").send_keys(Keys.CONTROL, Keys.ENTER)
    desk.asked(1)
    until(lambda: desk.text() == " The weekend")
    keys.send_keys(Keys.ESCAPE).perform()
    until(lambda: desk.state() == "Stopped.")
    until(lambda: "cmpl-1" in server.cancelled, "the server is told")
    assert desk.text() == " The weekend", "what was written stays"
    desk.run("document.activeElement.blur()")
    ActionChains(desk.browser).send_keys(" ").perform()
    desk.asked(2)
    desk.tap(desk.button("Stop"))
    until(lambda: "cmpl-2" in server.cancelled)
    fader = desk.fader("w")
    fader.send_keys(Keys.ARROW_UP)
    assert desk.named("Number of w of strip A").get_attribute("value") == "1.05"


def test_everything_that_is_tapped_is_large_and_everything_has_a_name(desk: Desk) -> None:
    desk.open(size=PHONE)
    desk.write()
    desk.written(0, 1)
    desk.run("for (const x of document.querySelectorAll('details')) x.open = true")
    small = desk.run(
        "return [...document.querySelectorAll('button, select, textarea, summary, label.check, "
        "input:not([type=checkbox])')].filter((x) => x.getBoundingClientRect().height < 40 || "
        "x.getBoundingClientRect().width < 40).map((x) => x.outerHTML.slice(0, 90))"
    )
    assert small == []
    nameless = [
        x.get_attribute("outerHTML")[:90]
        for x in desk.all("button, input, select, textarea, [role]:not([role=status])")
        if not x.accessible_name
    ]
    assert nameless == []
    assert desk.wide() <= PHONE[0]
    said = desk.run("return document.getElementById('desk').innerText")
    assert re.findall(r"[a-z][.,;:][A-Z]\w*", said) == [], "templates drop spaces at line breaks"
    ids = desk.run("return [...document.querySelectorAll('[id]')].map((x) => x.id)")
    assert len(ids) == len(set(ids))


CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
const over = (colours) => {
  for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = (rgb) => {
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const [r, g, b] = rgb.map((x) => linear(x / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const found = [];
for (const x of document.querySelectorAll("#desk *")) {
  const own = [...x.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !x.checkVisibility() || x.closest(":disabled, .silent, .unseen, noscript")) continue;
  const behind = [];
  for (let y = x; y; y = y.parentElement) behind.unshift(getComputedStyle(y).backgroundColor);
  const back = over(["#fff", ...behind]);
  const ink = over([`rgb(${back})`, getComputedStyle(x).color]);
  const [a, b] = [light(ink), light(back)].sort((p, q) => q - p);
  found.push([(a + 0.05) / (b + 0.05), `${x.tagName}.${x.className}: ${x.textContent.trim()}`]);
}
return found.sort((p, q) => p[0] - q[0]);
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(desk: Desk, scheme: str) -> None:
    """All texts, and tokens in each colour at its strongest, are at least 4.5 to 1."""
    names = [f"w{i}" for i in range(8)]
    desk.server.words = [f" word{i}" for i in range(8)]
    formula = " + ".join(["base", *(f"{name} * kind" for name in names)])
    desk.emulate(prefers_color_scheme=scheme)
    desk.open(f"#blend={formula.replace('+', '%2B')}&strip=" + ",".join(f"{n}:1" for n in names))
    desk.tap(desk.named("Mute w1 of strip A"))
    desk.tap(desk.named("Mute w1 of strip A"))
    desk.write()
    desk.written()
    desk.run(
        "document.querySelectorAll('.text [data-at] > *').forEach((x, i) => "
        "{ x.className = `hue-${i} s5` }); "
        "for (const x of document.querySelectorAll('details')) x.open = true"
    )
    found = desk.run(CONTRAST)
    assert len(found) > 60
    assert found[0][0] >= 4.5, found[:8]
    back = desk.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 300) == (scheme == "dark")


def test_nothing_moves_by_itself_where_that_is_not_wanted(desk: Desk) -> None:
    desk.emulate(prefers_reduced_motion="reduce")
    desk.server.hold = {2}
    desk.open("#strip=w:1")
    desk.write()
    until(lambda: desk.text() == " The weekend")
    moving = desk.run(
        "return [...document.querySelectorAll('*')].filter((x) => { const s = getComputedStyle(x); "
        "return s.animationName !== 'none' || s.transitionDuration !== '0s' }).length"
    )
    assert moving == 0
    desk.server.hold.clear()
    desk.written()
