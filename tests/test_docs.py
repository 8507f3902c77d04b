"""The files that the pages of the documentation name are there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ["CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))]
PLACES = [ROOT, ROOT / "python" / "crossfade", ROOT / "python" / "crossfade" / "decoding"]
NAME = r"[\w./-]*(?:\.(?:py|h|cpp|md|svg)|/)"  # the name of a file, or of a folder with its slash


def missing(names: list[str], beside: list[Path]) -> list[str]:
    """The names that are those of no file or folder. A name may leave out the folder of an earlier
    one."""
    found, folders = [], {*PLACES, *beside}
    for name in names:
        there = {path.parent for folder in folders if (path := folder / name).exists()}
        if not there:
            found.append(name)
        folders |= there
    return found


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    code = re.findall(rf"`({NAME})`", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert missing(code, []) == []
    assert missing(links, [(ROOT / page).parent]) == []


def test_files_in_the_picture_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import architecture

    for files, _, _ in [*architecture.DOWN, *architecture.UP]:
        assert missing(files.split(), []) == []
