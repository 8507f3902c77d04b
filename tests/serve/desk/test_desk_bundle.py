"""The desk's page that ships is made of the sources that are there, and asks for nothing else."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import crossfade
import pytest

DESK = Path(__file__).parents[3] / "desk"
PAGE = Path(crossfade.__file__).parent / "serve" / "page"
FILES = {"index.html", "app.js", "app.css", "NOTICES.txt"}


def hash_of_sources() -> str:
    """As `desk/build.mjs` makes it: a line a file with its own hash, sorted by name."""
    inside = (path for path in (DESK / "src").rglob("*") if path.is_file())
    made_by = (DESK / name for name in ("build.mjs", "package-lock.json", "package.json"))
    names = sorted(path.relative_to(DESK).as_posix() for path in [*inside, *made_by])
    lines = [f"{hashlib.sha256((DESK / x).read_bytes()).hexdigest()}  {x}\n" for x in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", sorted(FILES - {"NOTICES.txt"}))
def test_the_bundle_is_made_of_these_sources(name: str) -> None:
    """If this fails: ``cd desk && npm ci && npm run build``, and commit what it wrote."""
    assert hash_of_sources() in (PAGE / name).read_text(encoding="utf-8")


def test_the_package_has_the_page_and_the_licences_of_what_is_in_it() -> None:
    assert {path.name for path in PAGE.iterdir()} == FILES
    said = (PAGE / "NOTICES.txt").read_text(encoding="utf-8")
    used = json.loads((DESK / "package.json").read_text())["dependencies"]
    for name, version in {**used, "@preact/signals-core": ""}.items():
        assert f"\n{name} {version}" in said
    assert said.count("Permission is hereby granted") + said.count("Apache License") >= len(used)


def test_versions_are_pinned() -> None:
    package = json.loads((DESK / "package.json").read_text())
    lock = json.loads((DESK / "package-lock.json").read_text())
    wanted = {**package["dependencies"], **package["devDependencies"]}
    for name, version in wanted.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), name
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
    assert all("integrity" in x for name, x in lock["packages"].items() if name)


class Tags(HTMLParser):
    """What could run a script, hold a style or load a file."""

    def __init__(self) -> None:
        super().__init__()
        self.inline: list[str] = []
        self.loads: list[str] = []
        self.policy = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag == "style" or (tag == "script" and "src" not in named):
            self.inline.append(tag)
        self.inline += [name for name in named if name.startswith("on") or name == "style"]
        self.loads += [named[name] for name in ("src", "href") if name in named]
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"]


def test_the_page_is_strict_and_loads_only_what_is_beside_it() -> None:
    tags = Tags()
    tags.feed((PAGE / "index.html").read_text(encoding="utf-8"))
    assert tags.inline == []
    assert {x for x in tags.loads if not x.startswith("data:")} == {"app.js", "app.css"}
    assert tags.policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in tags.policy
    css = (PAGE / "app.css").read_text(encoding="utf-8")
    assert "url(" not in css
    assert "@import" not in css


@pytest.mark.sweep
def test_a_build_gives_the_same_bytes() -> None:
    if shutil.which("npm") is None or not (DESK / "node_modules").is_dir():
        pytest.skip("needs npm, and `npm ci` in desk/")
    before = {name: (PAGE / name).read_bytes() for name in FILES}
    subprocess.run(["npm", "run", "build"], cwd=DESK, check=True, capture_output=True)
    assert {name: (PAGE / name).read_bytes() for name in FILES} == before
