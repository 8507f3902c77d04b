"""Result files of JSON lines, one a prompt, that an interrupted run can go on with."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from . import reading


@contextmanager
def opened(path: str | None, *, append: bool = False) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with open(path, "a" if append else "x", encoding="utf-8") as file:
        yield file


def seed_of(seed: int, index: int) -> int:
    """A prompt's own seed, so that no text depends on the batch size or on a resumption."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "little")


def run_of(blend: Any, *settings: Any) -> str:
    """A hash of a blend, of its models by the first numbers of each parameter, and of settings."""
    prints = []
    for member in (*blend.terms, *blend.values):
        digest = hashlib.sha256()
        for name, p in member.model.named_parameters():
            few = p.detach().flatten()[:16].float().cpu().numpy()
            digest.update(f"{name} {p.dtype} {list(p.shape)}".encode() + few.tobytes())
        prints.append(digest.hexdigest()[:12])
    asked = json.dumps([blend.to_dict(), prints, *settings], sort_keys=True, default=repr)
    return hashlib.sha256(asked.encode()).hexdigest()[:12]


def finished_indices(path: Path, prompts: Sequence[Any], run: str) -> set[int]:
    """Indices that the file has, all of one run: of one blend, seed and settings.

    A last line that was cut by a crash is taken off the file.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    found = set()
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            i, prompt, made_with = record["index"], record["prompt"], record["run"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: not a line of such a file") from None
        if not 0 <= i < len(prompts) or prompt != prompts[i] or made_with != run:
            raise ValueError(
                f"{path}, line {number}: comes from other prompts, another blend or other "
                "settings; a file is gone on with by those that it was begun with"
            )
        found.add(i)
    return found


def objects(lines: Sequence[str], where: str) -> list[dict[str, Any]]:
    """The objects of JSON lines, empty ones left out; errors name the line of `where`."""
    found = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = reading.parse_json(line, f"{where}, line {i}")
        if not isinstance(item, dict):
            raise ValueError(f"{where}, line {i}: must be an object, not {line[:40]!r}")
        found.append(item)
    return found


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def number(x: Any) -> float | None:
    """A float that JSON has: NaN and infinities are none."""
    return float(x) if math.isfinite(float(x)) else None


def write(file: TextIO, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
