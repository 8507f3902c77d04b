"""Runs the examples of pages and writes what they print: ``python docs/examples.py PAGE...``

A page's blocks of ``python`` run one after the other, in one namespace. Of a block of ``bash`` the
lines that call ``crossfade`` run. A block of ``text`` right after one of these is what it prints;
``text sampled`` says that a model wrote it, whose words may differ on another processor. A block
whose first line names a file, as ``jsonl pairs.jsonl`` does, is that file's content. Examples run
in an empty folder that holds these files.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(?ms)^```(\w+)((?: [^\n]*)?)\n(.*?)^```$")


@dataclass
class Example:
    """Code, and what the page says that it prints; None if the page does not say it."""

    language: str
    code: str
    said: str | None = None
    sampled: bool = False


def examples(page: str) -> Iterator[Example | tuple[str, str]]:
    """The examples of a page in their order, and its files, each a name and its content."""
    found: Example | None = None
    end = 0
    for block in BLOCK.finditer(page):
        language, settings, content = block[1], block[2].split(), block[3]
        after = page[end : block.start()].strip() == ""
        end = block.end()
        if language == "text" and found is not None and after:
            found.said, found.sampled = content, settings == ["sampled"]
        if found is not None:
            yield found
            found = None
        if language in ("python", "bash") and not settings:
            found = Example(language, content)
        elif settings and language != "text":
            yield settings[0], content
    if found is not None:
        yield found


def outputs(page: str, name: str) -> Iterator[tuple[Example, str]]:
    """Run a page's examples; each of them, and what it printed."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    modules = [Path(e[0]).stem for e in examples(page) if isinstance(e, tuple)]
    _forget(modules)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for example in examples(page):
                if isinstance(example, tuple):
                    Path(example[0]).write_text(example[1])
                    continue
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    if example.language == "python":
                        exec(compile(example.code, name, "exec"), names)
                    else:
                        _run_commands(example.code)
                yield example, out.getvalue()
        finally:
            os.chdir(before)
            _forget(modules)


def _forget(modules: list[str]) -> None:
    """A page's modules are its own, whatever another page or program has called its modules."""
    for name in modules:
        sys.modules.pop(name, None)


def _run_commands(code: str) -> None:
    from crossfade import cli

    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("crossfade ") and (status := cli.main(shlex.split(line)[1:])) != 0:
            raise RuntimeError(f"{line} ended with {status}")


def written(page: str, name: str) -> str:
    """The page with what its examples print now."""
    printed = [out for example, out in outputs(page, name) if example.said is not None]
    found = iter(printed)
    last: str | None = None
    end = 0

    def block(match: re.Match[str]) -> str:
        nonlocal last, end
        after = page[end : match.start()].strip() == ""
        end = match.end()
        shown = match[1] == "text" and last in ("python", "bash") and after
        last = match[1]
        if not shown:
            return match[0]
        lines = [line.rstrip() for line in next(found).splitlines()]
        return f"```text{match[2]}\n" + "".join(f"{line}\n" for line in lines) + "```"

    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(written(path.read_text(), str(path)))
