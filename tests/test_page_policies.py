"""The HTML of the package has a strict content security policy, and keeps to it."""

from __future__ import annotations

import re
from pathlib import Path

import crossfade
import pytest

PACKAGE = Path(crossfade.__file__).parent
PAGES = sorted(PACKAGE.rglob("*.html"))


def test_the_pages_are_found() -> None:
    found = {path.relative_to(PACKAGE).as_posix() for path in PAGES}
    assert found >= {"pareto/page.html", "dynamics/page.html", "serve/page/index.html"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_a_page_lets_nothing_run_but_its_own_script(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    policies = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', text)
    assert len(policies) == 1
    rules = dict(rule.strip().split(" ", 1) for rule in policies[0].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules.get("script-src", "'none'") in ("'none'", "'self'", "'sha256-@HASH@'")
    before = text[: text.index(policies[0])]
    assert not re.search("<(script|style|link|img)", before), "what is before it is not bound by it"
    assert not re.search(r"<[^>]+\son\w+\s*=", text), "handlers in attributes would not run"
