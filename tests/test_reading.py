"""Text, JSON and YAML that users write are read, or an error says where the mistake is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from crossfade import reading
from hypothesis import given, settings
from hypothesis import strategies as st

DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP, "here is nested more than 100 levels deep"),
        ("[" * 101 + "]" * 101, "here is nested more than 100 levels deep"),
        ('{"a": ' * 101 + "1" + "}" * 101, "here is nested more than 100 levels deep"),
        ('{"a": "\\ud83d"}', r"here: '\\ud83d' has half of a surrogate pair"),
        ('{"\\ud83d": 1}', r"here: '\\ud83d' has half of a surrogate pair"),
        ("1" * 5000, "here: not JSON that can be read"),
        ('{"a" 1}', r"here: not JSON \(Expecting ':' delimiter at column 6\)"),
        ('{\n"a" 1}', r"here: not JSON \(Expecting ':' delimiter at line 2, column 5\)"),
        ("", "here: not JSON"),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_json_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reading.parse_json(text, "here")


def test_json_that_can() -> None:
    assert reading.parse_json('{"a": "\\ud83d\\ude00 \\n"}', "here") == {"a": "😀 \n"}
    assert reading.parse_json("[" * 100 + "]" * 100, "here")
    many = [[1, {"a": []}]] * 1000
    assert reading.parse_json(json.dumps(many), "here") == many


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP, "here is nested more than 100 levels deep"),
        ("- " * 1000 + "1", "here is nested more than 100 levels deep"),
        ("- " * 101 + "1", "here is nested more than 100 levels deep"),
        ("a: &x [*x]", "here is nested more than 100 levels deep"),
        ("a: 2024-13-45", "here is not YAML: month must be"),
        ("a: !!bool maybe", "here is not YAML"),
        ("a: !!timestamp x", "here is not YAML"),
        ("a: !!int x", "here is not YAML"),
        ("a: !!python/object:os.system x", "here is not YAML"),
        ("? [1]\n: 2", "here is not YAML"),
        ("a: [", "here is not YAML"),
        ('a: "\\ud83d"', "half of a surrogate pair"),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_yaml_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reading.parse_yaml(text, "here")


def test_yaml_whose_aliases_are_many_is_read_at_once() -> None:
    """By their aliases the 40 lists here stand for 2^40, which nobody could read one by one."""
    lines = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert reading.parse_yaml("\n".join(lines), "here")["a0"] == [1]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert reading.read_text(file) == '{"a": 1}\n'
    file.write_bytes(b"a\nb\xff\n")
    with pytest.raises(ValueError, match=r"a.jsonl is not UTF-8 text: .* in line 2"):
        reading.read_text(file)


def test_errors_of_json_lines_name_the_line() -> None:
    with pytest.raises(ValueError, match="rows, line 3 is nested"):
        reading.parse_json_lines(["{}", "", "[" * DEEP], "rows")


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(), st.text('[]{}",:0123456789.eE+-\\u d8!&*?|>#\n'), st.binary()))
def test_anything_is_read_or_refused(data: str | bytes) -> None:
    with contextlib.suppress(ValueError):
        data = data if isinstance(data, str) else reading.decode(data, "here")
    for parse in (reading.parse_json, reading.parse_yaml) if isinstance(data, str) else ():
        with contextlib.suppress(ValueError):
            parse(data, "here")
