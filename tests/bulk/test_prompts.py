"""Prompts and model specs of the command line: whatever is given is read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crossfade import models
from crossfade.bulk.prompts import read_prompts
from crossfade.loading import Spec
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
        return read_prompts([], str(file), chat=False)
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


@fuzzed
@given(st.text(st.characters() | st.sampled_from("=@/~.ab")), st.sampled_from([None, "model"]))
@example("a=/x@", None)
@example("a=@x", None)
@example("a=~x@sentiment", None)
def test_any_spec_is_one_or_an_error(text: str, name: str | None) -> None:
    try:
        spec = Spec.read(text, name)
    except (ValueError, OSError) as error:
        assert "\n" not in str(error) or "\n" in text  # noqa: PT017
    else:
        assert spec.name.isidentifier()
        assert spec.path


@pytest.mark.parametrize("source", [None, "-"])
def test_a_closed_stdin_has_no_prompts(monkeypatch: pytest.MonkeyPatch, source: str | None) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ValueError, match=r"no prompts are given|stdin is closed"):
        read_prompts([], source, chat=False)


@pytest.mark.parametrize("name", ["a@b", "a@b@c"])
def test_a_folder_may_have_the_sign_of_a_guide_in_its_name(tmp_path: Path, name: str) -> None:
    folder, guide = tmp_path / name, tmp_path / "g@h"
    for made in (folder, guide):
        made.mkdir()
    (guide / "value_head.json").touch()
    assert Spec.read(f"x={folder}") == Spec("x", str(folder))
    assert Spec.read(f"x={folder}@{guide}") == Spec("x", str(folder), guide)
    assert Spec.read(f"x={folder}@sentiment").guide == models.guide("sentiment")
