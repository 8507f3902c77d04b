"""Text, JSON and YAML of users. What cannot be read is a ValueError that says where it is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

DEPTH = 100  # how deep lists and objects may be nested: far from where Python's stack would end


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, without the byte order mark that some editors put before it.

    Raises:
        ValueError: the file is not UTF-8. OSError: it is not there, or cannot be read.
    """
    try:
        return decode(Path(path).read_bytes(), str(path))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{str(path)!r} is a folder; it must be a file") from None


def decode(data: bytes, where: str) -> str:
    """The text of UTF-8 bytes, as `read_text` reads a file; an error says they are of `where`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{where} is not UTF-8 text: {error.reason} in line {line}") from None


def parse_json(
    text: str,
    where: str,
    *,
    unique: bool = False,
    finite: bool = False,
    most_keys: int | None = None,
) -> Any:
    """The value of a JSON text. Errors begin with `where`, which names a file and a line, say.

    Args:
        unique: refuse a key that an object has twice, of which JSON keeps the last one.
        finite: refuse NaN and infinity, which JSON does not have and Python reads.
        most_keys: with `unique`, refuse an object that has more keys.

    Raises:
        ValueError: the text is not JSON, or is nested more than `DEPTH` levels deep, or has a
            number with more digits than Python reads or a string that UTF-8 cannot write.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=partial(_unique, most_keys) if unique else None,
            parse_constant=_infinite if finite else None,
        )
    except _RefusedError as error:
        raise ValueError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{where}: not JSON ({error.msg} at {line}column {error.colno})") from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # a number has more digits than Python reads
        raise ValueError(f"{where}: not JSON that can be read ({error})") from None
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(value, where)
    if "\\u" in text:  # only an escape can write half of a surrogate pair, such as "\ud83d"
        check_unicode(value, where)
    return value


class _RefusedError(ValueError):
    """A text is JSON that Python reads, and is not to be read here."""


def _infinite(name: str) -> float:
    raise _RefusedError(f"{name} is no number of JSON")


def _unique(most: int | None, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if most is not None and len(pairs) > most:
        raise _RefusedError(f"an object has {len(pairs)} keys; it must have at most {most}")
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _RefusedError(f"the key {key!r:.80} is there twice")
        found[key] = value
    return found


def parse_json_lines(lines: Sequence[str], where: str) -> list[dict[str, Any]]:
    """The objects of JSON lines; empty lines are left out. Errors name the line of `where`.

    Raises:
        ValueError: as `parse_json`, or a line is JSON but no object.
    """
    found = []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = parse_json(line, f"{where}, line {i}")
        if not isinstance(item, dict):
            raise ValueError(f"{where}, line {i}: must be an object, not {line[:40]!r}")
        found.append(item)
    return found


class _Loader(yaml.SafeLoader):
    """Reads YAML of plain data. 1e-4 is a number here; YAML 1.1 takes it for a text."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """As in PyYAML, but refuse a key that is there twice, as one of the two would be lost."""
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    said = f"the key {key.value!r} is there twice"
                    raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("+-0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text of plain data; errors are as those of `parse_json`."""
    try:
        value = yaml.load(text, _Loader)  # which is safe, as _Loader is a SafeLoader
    except RecursionError:
        raise _too_deep(where) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{where} is not YAML: {_marked(error, text)}") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML raises the last four at `!!int x`, `!!bool x`, `!!timestamp x` and 2024-13-01.
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    check_depth(value, where)
    check_unicode(value, where)
    return value


def _marked(error: yaml.MarkedYAMLError, text: str) -> str:
    """What a YAML error says, and the line of the text that it is about."""
    mark = error.problem_mark or error.context_mark
    said = " ".join(str(error.problem or error.context).split())
    if mark is None:
        return said
    lines = text.splitlines() or [""]
    line = lines[min(mark.line, len(lines) - 1)].strip()
    return f"{said} (line {mark.line + 1}, column {mark.column + 1}: {line!r:.60})"


def check_depth(value: Any, where: str) -> None:
    """Refuse lists and mappings that are nested more than `DEPTH` levels deep, or in themselves."""
    level = [value]
    for _ in range(DEPTH):
        below: dict[int, Any] = {}  # by identity, as YAML may have one list in many places
        for x in level:
            for y in _children(x):
                below[id(y)] = y
        if not below:
            return
        level = list(below.values())
    raise _too_deep(where)


def check_unicode(value: Any, where: str) -> None:
    """Refuse texts in `value` that have half of a surrogate pair, which UTF-8 cannot write."""
    seen, left = set(), [value]
    while left:
        x = left.pop()
        if isinstance(x, str):
            try:
                x.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{where}: {x!a:.80} has half of a surrogate pair, which is no character"
                ) from None
        elif isinstance(x, (dict, list)) and id(x) not in seen:
            seen.add(id(x))
            left.extend([*x, *x.values()] if isinstance(x, dict) else x)


def _children(x: Any) -> list[Any]:
    inside = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return [y for y in inside if isinstance(y, (dict, list))]


def _too_deep(where: str) -> ValueError:
    return ValueError(f"{where} is nested more than {DEPTH} levels deep")
