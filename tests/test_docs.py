"""The pages say what is true: their examples run, and the files that they name are there."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "bench/RESULTS.md", *DOCS]
EXAMPLES = [p for p in PAGES if re.search(r"(?m)^```(python|bash)$", (ROOT / p).read_text())]
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
    prose = re.sub(r"(?ms)^```.*?^```$", "", text)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert missing(code, []) == []
    assert missing(links, [(ROOT / page).parent]) == []


@pytest.mark.model
@pytest.mark.filterwarnings("default")  # other packages warn, as they do for a reader
@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_print_what_their_page_says(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model wrote may differ on another processor, so its lines are counted alone."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    import examples

    for example, printed in examples.outputs((ROOT / page).read_text(), page):
        if example.said is None:
            continue
        said, found = ([*map(str.rstrip, x.splitlines())] for x in (example.said, printed))
        if example.sampled:
            assert len(found) == len(said) > 0, example.code
        else:
            assert found == said, example.code


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_page_begins_with_an_example() -> None:
    """All but those that are tables made from results, and the two that walk through the code."""
    others = {"docs/README.md", "docs/architecture.md", "docs/families.md", "docs/mistakes.md"}
    for page in set(DOCS) - others:
        first = re.search(r"(?m)^```(\w+)", (ROOT / page).read_text())
        assert first is not None, page
        assert first[1] in ("python", "bash", "jsonl"), page


def test_files_in_the_picture_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])
    import architecture

    for files, _, _ in [*architecture.DOWN, *architecture.UP]:
        assert missing(files.split(), []) == []
