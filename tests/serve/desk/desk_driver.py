"""Drives the desk's page in Chromium as somebody at it would."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from browser import resize

DESKTOP, PHONE = (1280, 900), (375, 740)
SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
HOSTILE = "<img src=x onerror=\"document.title='bad'\">"
PATIENCE = 20.0  # seconds for which the page may take what takes it milliseconds


def until(found: Callable[[], Any], what: str = "it") -> Any:
    """What is found, as soon as it is true."""
    end = time.monotonic() + PATIENCE
    while not (seen := found()):
        assert time.monotonic() < end, f"{what} did not come; last seen: {seen!r}"
        time.sleep(0.02)
    return seen


class Desk:
    """The page, opened on a server: a fake one, or the real one."""

    def __init__(self, browser: Any, server: Any) -> None:
        self.browser, self.server = browser, server

    def open(self, hash_: str = "", size: tuple[int, int] = DESKTOP, ready: bool = True) -> Desk:
        resize(self.browser, *size)
        self.browser.get("about:blank")  # Else another hash alone would not load the page.
        self.browser.get(f"{self.server.url}/{hash_}")
        if ready:
            until(lambda: self.all(".strip"), "the desk")
        return self

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return until(lambda: self.all(selector), selector)[0]

    def named(self, label: str) -> Any:
        """The element that a screen reader calls so."""
        return self.one(f'[aria-label="{label}"]')

    def fader(self, name: str, strip: str = "A") -> Any:
        return self.one(f'[aria-label^="{name} of strip {strip}"] input[type=range]')

    def button(self, text: str) -> Any:
        found = [x for x in self.all("button") if text in x.text]
        assert found, f"no button has {text!r}"
        return found[0]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def tap(self, element: Any) -> None:
        """Click it where nothing lies over it: a phone has buttons at its foot."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self) -> None:
        self.tap(self.button("Write"))

    def text(self, strip: int = 0) -> str:
        """What a strip shows, with its spaces."""
        return str(self.run("return arguments[0].textContent", self.all(".strip > .text")[strip]))

    def hues(self) -> list[str]:
        """The colour and the strength of each token of the first strip; "" where it has none."""
        script = (
            "return [...document.querySelector('.text').querySelectorAll('[data-at]')]"
            ".map((x) => x.firstElementChild?.className ?? '')"
        )
        return list(self.run(script))

    def state(self, strip: int = 0) -> str:
        return str(self.all(".strip .state")[strip].text)

    def type(self, element: Any, text: str) -> None:
        """Put a text in the place of what is in a field."""
        element.clear()
        element.send_keys(text)

    def set(self, element: Any, value: Any) -> None:
        """Move a range, or set a field, at once."""
        script = (
            "const [x, v] = arguments; x.value = v; "
            "x.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        self.run(script, element, str(value))

    def asked(self, n: int) -> list[dict[str, Any]]:
        """The bodies of the first n requests for texts, once they have come."""
        until(lambda: len(self.server.asked) >= n, f"request {n}")
        return [body for _, body in self.server.asked[:n]]

    def written(self, *strips: int) -> None:
        """Wait until these strips have ended their texts."""
        until(
            lambda: all(
                "ended" in self.state(k) or "limit" in self.state(k) for k in strips or (0,)
            ),
            "the end of the texts",
        )

    def wide(self) -> int:
        return int(self.run("return document.documentElement.scrollWidth"))

    def emulate(self, **features: str) -> None:
        media = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def complaints(self) -> list[str]:
        """What the browser has to say: errors of scripts, and what the policy has stopped."""
        return [str(entry["message"]) for entry in self.browser.get_log("browser")]
