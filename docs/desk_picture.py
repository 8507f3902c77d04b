"""Draws desk.png: the mixing desk of a running server, with a fader moved in the middle of a text.

python docs/desk_picture.py http://127.0.0.1:8000

The server is the one that docs/desk.md starts. Needs Chromium, its driver, selenium
and Pillow.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

WIDTH, HEIGHT = 1280, 790
COLORS = 256  # of the file, which is half as large so
LINK = "#prompt=How+was+the+weekend%3F&max_tokens=48&seed=7&strip=w:0.8,v:0&strip=w:0,v:0"
MOVED, TO = 14, 1.8  # after so many tokens the first fader of strip A is moved there
MOVE = """
const fader = document.querySelector(".strip input[type=range]");
fader.value = arguments[0];
fader.dispatchEvent(new Event("input", {bubbles: true}));
"""
WRITTEN = "return document.querySelectorAll('.strip:first-child [data-at]').length"
STATES = (
    "return [...document.querySelectorAll('.state')].every((x) => x.classList.contains('done'))"
)


def picture(address: str, path: Path) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in (
        "--headless=new",
        "--no-sandbox",
        "--hide-scrollbars",
        f"--window-size={WIDTH},{HEIGHT + 150}",
    ):
        options.add_argument(option)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        screen = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

        def wait(condition: Callable[[Any], Any]) -> None:
            WebDriverWait(browser, 300, poll_frequency=0.02).until(condition)

        browser.get(address.rstrip("/") + "/" + LINK)
        wait(lambda b: b.find_elements("css selector", ".strip"))
        browser.find_element("css selector", ".transport .main").click()
        wait(lambda b: b.execute_script(WRITTEN) >= MOVED)
        browser.execute_script(MOVE, TO)
        wait(lambda b: b.execute_script(STATES))
        shown = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        shown.quantize(COLORS).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of a running crossfade serve")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("desk.png"))
    arguments = parser.parse_args()
    picture(arguments.address, arguments.output)
