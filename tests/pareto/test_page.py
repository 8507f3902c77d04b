"""The page of a front in Chromium: the texts of what is pointed at, tapped or gone to are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from browser import resize
from crossfade.pareto import Front

LONG = "long " * 300 + "without" * 60  # more than a screen, and wider than a phone


def front(tmp_path: Path) -> str:
    """The address of the page of two methods at three weightings, with three rewards."""
    points, texts, scores = [], [], []
    for k, method in enumerate(("first", "second")):
        for i in range(3):
            of = {"kind": i / 2 - 0.1 * k, "brief": 1 - i / 2, "plain": float(i * k)}
            points.append(
                {"method": method, "weights": {"kind": i / 2, "brief": 1 - i / 2}, "rewards": of}
                | {"intervals": dict.fromkeys(of, 0.1), "kl": None, "perplexity": None}
            )
            texts.append([[f"<b>{method}</b> {i}"], [LONG]])
            scores.append({name: [[x], [x]] for name, x in of.items()})
    rewards = ("kind", "brief", "plain")
    made = Front(rewards, ["a prompt", "another"], points, texts, scores, interrupted=True)
    made.to_html(tmp_path / "front.html")
    return (tmp_path / "front.html").as_uri()


def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def all_of(selector: str) -> Any:
        return browser.find_elements("css selector", selector)

    def at(place: int) -> ActionChains:
        ring = f".point[data-place='{place}'] .ring"
        return ActionChains(browser).move_to_element(all_of(ring)[0])

    def said() -> str:
        return str(all_of("#detail .text")[0].text)

    for width, height in ((1280, 800), (390, 844)):
        resize(browser, width, height)
        browser.get(front(tmp_path))
        assert "The sweep was interrupted." in all_of("body")[0].text
        assert len(all_of(".point")) == 3 * 6
        at(1).perform()
        assert said() == "<b>first</b> 1"
        at(2).click().perform()
        at(0).perform()
        assert said() == "<b>first</b> 2", "what was tapped stays"
        box = browser.execute_script(
            "return arguments[0].getBoundingClientRect()", *all_of("#detail")
        )
        assert 0 < box["top"] < 0.7 * height, "its texts are in sight"
        inner = browser.execute_script("return document.documentElement.scrollWidth")
        assert inner <= width, "nothing is wider than the screen"
        all_of(".point[tabindex='0']")[0].send_keys(Keys.ARROW_RIGHT)
        assert said() == "<b>first</b> 1", "the keys go from point to point"
        all_of("#legend input")[0].click()
        assert len(all_of(".point")) == 3 * 3
        at(4).perform()
        assert said() == "<b>second</b> 1"
    assert browser.get_log("browser") == []
    # The page's policy lets no other script run, should a text ever get into its HTML.
    hostile = "<img src='data:,' onerror='document.title = 1'>"
    browser.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", hostile)
    stopped = WebDriverWait(browser, 20).until(lambda browser: browser.get_log("browser"))
    assert "Content Security Policy" in stopped[0]["message"]
    assert browser.title == "Fronts"
