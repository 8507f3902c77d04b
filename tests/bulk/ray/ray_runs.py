"""What the tests of Ray share: saved models, prompts, results, and the actors of a cluster."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossfade import cli
from tiny_models import make, make_tokenizer

ACTOR = b"ray::MapWorker(MapBatches(LineDecoder))"
FORMULA = "base + w * (tuned - base)"


def save_models(folder: Path) -> dict[str, str]:
    """Two models of a few words, as options name them."""
    paths = {}
    for seed, name in enumerate(("base", "tuned")):
        make("llama", seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
        paths[name] = str(folder / name)
    return paths


def options(paths: dict[str, str], *more: str) -> list[str]:
    models = [f"--model={name}={path}" for name, path in paths.items()]
    return [*models, "--blend", FORMULA, "--fader", "w=0.8", "--max-new-tokens=12", *more]


def prompts(count: int) -> list[dict[str, Any]]:
    """Prompts, of which some have settings of their own."""
    found = []
    for i in range(count):
        item: dict[str, Any] = {"prompt": f"the w{i % 40} was w{i % 7} very", "id": f"row {i}"}
        item |= {"weights": {"w": i / count}} if i % 3 == 0 else {}
        item |= {"temperature": 0.5 + i / count} if i % 4 == 0 else {}
        item |= {"max_new_tokens": 1 + i % 30} if i % 5 == 0 else {}
        found.append(item)
    return found


def write(file: Path, items: list[Any]) -> Path:
    file.write_text("".join(f"{json.dumps(item)}\n" for item in items))
    return file


def one_process(file: Path, paths: dict[str, str], *more: str) -> dict[int, str]:
    """The lines of ``crossfade generate`` without Ray, by their index."""
    out = file.with_suffix(".one")
    asked = ["generate", "--prompts", str(file), *options(paths, *more), "--output", str(out)]
    assert cli.main(asked) == 0
    return by_index(out.read_text())


def results(folder: Path) -> dict[int, str]:
    """The lines of all parts, by their index; none may be there twice."""
    parts = sorted((folder / "parts").glob("*.jsonl"))
    return by_index("".join(part.read_text() for part in parts))


def by_index(text: str) -> dict[int, str]:
    lines = text.splitlines()
    found = {json.loads(line)["index"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def actors(parent: int | None = None) -> list[int]:
    """The processes of decoders among the descendants of a process, by default of this one."""
    parent = os.getpid() if parent is None else parent
    return [pid for pid, title in _processes() if title.startswith(ACTOR) and _is_of(pid, parent)]


def _processes() -> Iterator[tuple[int, bytes]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes()
            except OSError:  # It has ended.
                continue


def _is_of(pid: int, parent: int) -> bool:
    while pid not in (0, 1):
        if pid == parent:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return False
