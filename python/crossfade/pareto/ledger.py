"""The file of a sweep: JSON lines of its settings, its texts and what was measured of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .. import reading
from ..bulk.records import BETWEEN, lock
from .weightings import key, said

Place = tuple[str, tuple[tuple[str, float], ...], Any]  # method, weighting, prompt or measure


class Ledger:
    """What a sweep has written, in a file that a later call goes on with: ``with Ledger(...)``.

    The first line has the settings. A line of a text has its method, its weighting and the number
    of its prompt, one of a measure has the scores of all texts of a point. Lines are written as
    they come, and the last one of a text or measure counts. Without a path nothing is written.

    Args:
        path: the file, or None.
        settings: what the texts of all methods depend on, as JSON, by names that errors call them.

    Raises:
        BlockingIOError: another sweep is writing the file. OSError: it cannot be opened.
        ValueError: the file is no sweep's, or that of other settings, which are named; not a byte
            of it is changed.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = dict(settings)
        self.file: BinaryIO | None = None
        self.flushed = time.monotonic()
        self.lines: dict[Place, dict[str, Any]] = {}

    def __enter__(self) -> Ledger:
        if self.path is None:
            return self
        if self.path.is_dir():
            raise IsADirectoryError(f"path is {str(self.path)!r}, a folder; it must be a file")
        if self.path.exists() and not self.path.is_file():  # Opening a pipe or a device may block.
            raise ValueError(f"path is {str(self.path)!r}, which is no plain file")
        made = not self.path.exists()
        try:
            self.file = open(self.path, "x+b" if made else "r+b")
        except FileNotFoundError:
            folder = str(self.path.parent)
            raise FileNotFoundError(f"path is {str(self.path)!r}; no folder {folder!r}") from None
        try:
            lock(self.file, self.path)
            self._read()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self._flush()
            self.file.close()

    def _read(self) -> None:
        assert self.file is not None
        data = self.file.read().rstrip(b"\0")  # A file system may leave zeros after a crash.
        whole = data[: data.rfind(b"\n") + 1]
        rest = data[len(whole) :]
        if rest and _parsed(rest, "") is not None:  # It lacks nothing but its line break.
            whole, rest = data + b"\n", b""
        for number, line in enumerate(whole.splitlines(), 1):
            where = f"{self.path}, line {number}"
            record = _parsed(line, where)
            if record is None:
                raise _not_ours(where)
            if number == 1:
                self._check(record, where)
            else:
                self._take(record, where)
        if not whole and rest and not json.dumps({"sweep": 1}).encode().startswith(rest[:9]):
            raise _not_ours(f"{self.path}, line 1")
        self.file.seek(0)
        if whole != data:
            self.file.write(whole)
        self.file.truncate(len(whole))
        self.file.seek(len(whole))
        if not whole:
            self._write({"sweep": 1, "settings": self.settings})

    def _check(self, record: dict[str, Any], where: str) -> None:
        before = record.get("settings")
        if record.get("sweep") != 1 or not isinstance(before, dict):
            raise _not_ours(where)
        for name in dict.fromkeys((*self.settings, *before)):
            old, new = before.get(name), self.settings.get(name)
            if old != new:
                if isinstance(old, list) and isinstance(new, list):
                    pairs = enumerate(zip(old, new, strict=False))
                    at = next((i for i, (a, b) in pairs if a != b), None)
                    if at is None:
                        old, new = f"{len(old)} of them", f"{len(new)} of them"
                    else:
                        name, old, new = f"{name}[{at}]", old[at], new[at]
                raise ValueError(
                    f"path is {str(self.path)!r}, a sweep that was begun with other settings: "
                    f"{name} was {old!r:.80} and is {new!r:.80}; it must go on as it began, or "
                    "another file be named"
                )

    def _take(self, record: dict[str, Any], where: str) -> None:
        try:
            what = record["prompt"] if "prompt" in record else record["measure"]
            self.lines[record["method"], key(record["weights"]), what] = record
        except (KeyError, TypeError, AttributeError):
            raise _not_ours(where) from None

    def text(self, method: str, weights: Mapping[str, float], prompt: int, run: str) -> Any:
        """The line of a text, or None.

        Raises:
            ValueError: it was written by another blend than the one whose hash is `run`.
        """
        line = self.lines.get((method, key(weights), prompt))
        if line is not None and line.get("run") != run:
            raise ValueError(
                f"path is {str(self.path)!r}, in which {method!r} at {said(weights)} was another "
                "blend, of other models or weights; it must go on as it began, or another file be "
                "named"
            )
        return line

    def measure(self, method: str, weights: Mapping[str, float], name: str, of: str | None) -> Any:
        """The scores of a point by a measure, or None where there are none of this one."""
        line = self.lines.get((method, key(weights), name))
        return None if line is None or of is None or line.get("of") != of else line.get("scores")

    def write(self, record: dict[str, Any]) -> None:
        """Keep a line. It is not lost if the process ends, however that happens."""
        self._take(record, "")
        if self.file is not None:
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        assert self.file is not None
        self.file.write(f"{json.dumps(record, ensure_ascii=False)}\n".encode())
        self.file.flush()
        if time.monotonic() > self.flushed + BETWEEN:
            self._flush()

    def _flush(self) -> None:
        """Bring all lines to the disk, so that not even a power cut loses them."""
        assert self.file is not None
        self.file.flush()
        os.fsync(self.file.fileno())
        self.flushed = time.monotonic()


def _parsed(line: bytes, where: str) -> dict[str, Any] | None:
    """The object of a line, or None."""
    try:
        record = reading.parse_json(reading.decode(line, where), where)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _not_ours(where: str) -> ValueError:
    return ValueError(f"{where}: is not of a sweep that crossfade has written")
