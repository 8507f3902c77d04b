"""Chromium without a window, for tests of pages: the fixture `browser` is one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """Chromium without a window.

    Where it is missing, the test is skipped, or fails if `CROSSFADE_REQUIRE_BROWSER` is set, as it
    is where all tests must have run.
    """
    places = shutil.which("chromium"), shutil.which("chromedriver")
    if None in places:
        required = os.environ.get("CROSSFADE_REQUIRE_BROWSER", "") not in ("", "0")
        (pytest.fail if required else pytest.skip)("chromium and chromedriver are not both there")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(places[1]))
    try:
        yield found
    finally:
        found.quit()


def resize(browser: Any, width: int, height: int) -> None:
    """Give the page a screen of this size; a narrow one is a phone's."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 400}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
