"""Prompts: whatever a file or stdin holds is read, or refused by an error that names its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crossfade.bulk.prompts import read_prompts
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

fuzzed = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
ROWS = st.dictionaries(st.sampled_from(["prompt", "messages", "response", "role"]), JSON)


def read(file: Path, content: bytes) -> list[Any] | None:
    file.write_bytes(content)
    try:
        return [line.prompt for line in read_prompts([], str(file))]
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return None


@fuzzed
@given(st.binary() | st.text().map(str.encode), st.sampled_from(["jsonl", "txt"]))
@example(b"\xef\xbb\xbf", "txt")
@example(b"\xef\xbb\xbf\xef\xbb\xbfa", "txt")
def test_any_bytes_are_prompts_or_an_error(tmp_path: Path, content: bytes, kind: str) -> None:
    for prompt in read(tmp_path / f"prompts.{kind}", content) or []:
        assert isinstance(prompt, (str, list))
        json.dumps(prompt, ensure_ascii=False).encode()


@fuzzed
@given(st.lists(ROWS, min_size=1, max_size=4))
def test_any_rows_are_prompts_or_an_error(tmp_path: Path, rows: list[Any]) -> None:
    content = "\n".join(map(json.dumps, rows)).encode()
    prompts = read(tmp_path / "prompts.jsonl", content)
    if prompts is not None:
        given_back = [json.dumps(row.get("prompt") or row.get("messages")) for row in rows]
        assert [json.dumps(prompt) for prompt in prompts] == given_back


@pytest.mark.parametrize("source", [None, "-"])
def test_a_closed_stdin_has_no_prompts(monkeypatch: pytest.MonkeyPatch, source: str | None) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match=r"no prompts are given|stdin is closed"):
        read_prompts([], source)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": ""}', 'the "prompt" of prompt 0 is empty'),
        ("p.jsonl", '{"messages": []}', 'the "messages" of prompt 0 is empty'),
        ("p.jsonl", '{"id": 3}', r"prompt 0 has the keys \['id'\]; it must have a \"prompt\" or"),
        ("p.csv", "prompt,id\n", "p.csv is a table; it must be a .jsonl file with an object on ea"),
        ("p.TSV", "prompt", "p.TSV is a table; it must be"),
        ("p.json", "[]", "p.json is JSON; it must be a .jsonl file"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        read_prompts([], str(tmp_path / name))
