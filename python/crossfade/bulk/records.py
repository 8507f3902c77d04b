"""Files of results, a JSON line for each prompt, which a later run can complete."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .. import reading
from ..checks import warn
from ..progress import print_line

try:
    import fcntl
except ImportError:  # Some platforms have no such module.
    fcntl = None  # type: ignore[assignment]


BETWEEN = 1.0  # how many seconds lines may wait before they are brought to the disk


def seed_of(seed: int, index: int) -> int:
    """The seed of one prompt. By it, a text depends neither on its batch nor on a resumption."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "little")


class Results:
    """A file of results, or stdout, while a run writes it: ``with Results(path) as results``.

    Lines of a file are written as they come, so that none is lost. When all are there, those of
    this run are put in order. On stdout a line waits for those before it. The file is locked until
    the end, so that no two runs write it. The system drops the lock when the process ends, however
    that happens. `begin` reads the whole file before anything in it is changed. A file that was
    made here and got no line is removed again.

    Args:
        path: the file; None is stdout.
        resume: whether the file may exist, and is then completed. Otherwise it must not exist.
        form: what is printed of a result on stdout, if not a JSON line.

    Raises:
        BlockingIOError: another run is writing the file.
        OSError: the file exists, is a folder or cannot be opened.
        ValueError: it is a pipe or a device, which cannot be resumed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        resume: bool = False,
        form: Callable[[dict[str, Any]], str] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.resume = resume
        self.form = form or _printable
        self.made = False
        self.file: BinaryIO | None = None
        self.waiting: dict[int, dict[str, Any]] = {}  # lines for stdout, by their index
        self.next = 0  # the index of the next line for stdout
        self.begun = 0  # bytes that the file had before this run
        self.flushed = time.monotonic()  # when lines were last brought to the disk

    def __enter__(self) -> Results:
        if self.path is None:
            return self
        there = self.resume and self.path.exists()
        if self.path.is_dir():
            raise IsADirectoryError(f"{str(self.path)!r} is a folder; results need a file")
        if there and not self.path.is_file():  # Opening a pipe or a device may block.
            raise ValueError(f"{str(self.path)!r} is no plain file, so that it cannot be resumed")
        self.made = not there
        self.file = open(self.path, "r+b" if there else "x+b")
        try:
            lock(self.file, self.path)
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for index in sorted(self.waiting):  # There are some if the run was cut short.
            self._print(self.waiting.pop(index))
        if self.file is None or self.path is None:
            return
        if self.made and self.file.seek(0, os.SEEK_END) == 0:
            self.path.unlink(missing_ok=True)  # Closing the file then drops the lock.
        self.file.close()

    def begin(
        self,
        prompts: Sequence[Any],
        run: str,
        own: Sequence[Mapping[str, Any]] | None = None,
        seen: Callable[[dict[str, Any]], object] | None = None,
    ) -> set[int]:
        """Read what the file has, and give back the indices of the prompts that are in it.

        If a crash has cut the last line, it is taken off the file, and so are the zeros that a file
        system may leave after it. A last line that lacks nothing but its line break gets one.

        Args:
            run: names the blend and all settings. Every line of the file must have the same name.
            own: what the line of each prompt has after the prompt, such as settings of its own, by
                names that are the same for all. It must be what the line of the file has.
            seen: is called with each line that the file has.

        Raises:
            ValueError: the file has a line of another run; not a byte of the file is changed.
            TypeError, ValueError: names a prompt that cannot be written as JSON.
        """
        more = own or [{} for _ in prompts]
        starts = [_start(i, *pair) for i, pair in enumerate(zip(prompts, more, strict=True))]
        names = {name for each in more for name in each} | {"settings"}
        if self.file is None:
            return set()
        self.file.seek(0)
        found: dict[int, int] = {}  # the line of each index
        whole, ended = 0, True
        for number, line in enumerate(self.file, 1):
            where = f"{self.path}, line {number}"
            written = line.rstrip(b"\0")
            if not line.endswith(b"\n") and (found or written) and _is_cut(written, starts):
                break
            if line.strip():
                record = _record(line, where, starts, names, run)
                index = record["index"]
                if index in found:
                    raise ValueError(f"{where}: has index {index}, as line {found[index]} has")
                found[index] = number
                if seen is not None:
                    try:
                        seen(record)
                    except (KeyError, TypeError, ValueError):
                        raise _not_ours(where) from None
            whole, ended = whole + len(line), line.endswith(b"\n")
        self.file.seek(whole)
        self.file.truncate()
        if not ended:
            self.file.write(b"\n")
        self.begun = self.file.tell()
        return set(found)

    def write(self, record: dict[str, Any]) -> None:
        """Write one line. It is not lost if the process ends, however that happens."""
        if self.file is None:
            self.waiting[record["index"]] = record
            while self.next in self.waiting:
                self._print(self.waiting.pop(self.next))
                self.next += 1
            return
        self.file.write(f"{_json(record)}\n".encode())
        self.file.flush()
        if time.monotonic() > self.flushed + BETWEEN:
            self.flush()

    def _print(self, record: dict[str, Any]) -> None:
        print_line(self.form(record))

    def flush(self) -> None:
        """Bring all lines to the disk, so that not even a power cut loses them."""
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.flushed = time.monotonic()

    def finish(self) -> None:
        """Put the lines of this run, which are all there, in the order of their indices."""
        self.flush()
        if self.file is None or self.path is None:
            return
        self.file.seek(0)
        before = self.file.read(self.begun)
        lines = list(self.file)
        ordered = sorted(lines, key=lambda line: json.loads(line)["index"])
        if ordered == lines:
            return
        path = self.path.resolve()  # so that a link stays one
        beside = path.with_name(f".{path.name}.ordered")
        with open(beside, "wb") as file:
            file.write(before)
            file.writelines(ordered)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, beside)
        os.replace(beside, path)  # The file is whole, whenever the process ends.


def lock(file: BinaryIO, path: Path) -> None:
    """Lock the open file itself: a lock file of its own would be left behind by a crash.

    Raises:
        BlockingIOError: another run holds the lock, or has removed this very file meanwhile.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        free = False
    except OSError as error:
        reason = error.strerror
        warn(
            f"{str(path)!r} cannot be locked here ({reason}); no other run may write it meanwhile",
            RuntimeWarning,
        )
        free = True
    if not free:
        raise BlockingIOError(
            f"{str(path)!r} is being written by another run; wait for it, or name another file"
        )


def _json(x: Any) -> str:
    return json.dumps(x, ensure_ascii=False)


def _printable(x: Any) -> str:
    """JSON that stdout can write, whatever its encoding."""
    utf8 = "utf" in (sys.stdout.encoding or "utf-8").lower()
    return json.dumps(x, ensure_ascii=not utf8)


def _start(index: int, prompt: Any, own: Mapping[str, Any]) -> bytes:
    """The beginning of the line of a prompt: its index, its text and what it has of its own, which
    all runs write alike."""
    try:
        return _json({"index": index, "prompt": prompt, **own})[:-1].encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"prompt {index} has half of a surrogate pair, which is no character: {prompt!a:.80}"
        ) from None
    except (TypeError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise TypeError(f"prompt {index} cannot be written as JSON: {reason}") from None


def _record(
    line: bytes, where: str, starts: Sequence[bytes], names: Collection[str], run: str
) -> dict[str, Any]:
    """What a line of the file has. `names` are those that a prompt may have of its own.

    Raises:
        ValueError: the line is not of this run.
    """
    try:
        record = reading.parse_json(reading.decode(line, where), where)
        index, prompt, made_with = record["index"], record["prompt"], record["run"]
    except (ValueError, KeyError, TypeError):
        raise _not_ours(where) from None
    if type(index) is not int:
        raise ValueError(f"{where}: has the index {index!r:.40}; it must be a whole number")
    if not 0 <= index < len(starts):
        differs = f"its index is {index!r:.40}, and there are {len(starts)} prompts"
    elif not starts[index].startswith(_start(index, prompt, {})):
        differs = f"its prompt is not prompt {index}"
    elif _start(index, prompt, {k: x for k, x in record.items() if k in names}) != starts[index]:
        differs = f"its prompt is the same, but not what prompt {index} has of its own"
    elif made_with != run:
        differs = "its prompt is the same, but not the blend or a setting"
    else:
        return record
    raise ValueError(
        f"{where}: comes from other prompts, another blend or other settings ({differs}); a file "
        "must be resumed with those that it was begun with"
    )


def _not_ours(where: str) -> ValueError:
    return ValueError(
        f"{where}: is not a result that crossfade has written; take the line out, or name another "
        "file"
    )


def _is_cut(line: bytes, starts: Sequence[bytes]) -> bool:
    """Whether a last line without an end is the beginning of one that this run would write."""
    head = b'{"index": '
    if not line.startswith(head):
        return head.startswith(line)
    digits = line[len(head) :].split(b",")[0]
    if len(digits) > 18 or not digits.isdigit():
        return line == head
    if line == head + digits:
        return int(digits) < len(starts)
    index = int(digits)
    if index >= len(starts) or _is_json(line):
        return False
    return line.startswith(starts[index]) or starts[index].startswith(line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """`indices` in pieces of `size`."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def number(x: Any) -> float | None:
    """A float; None in place of NaN and infinities, which JSON does not have."""
    return float(x) if math.isfinite(float(x)) else None
