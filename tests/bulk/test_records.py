"""Files of results: no line is lost, no other file is touched, and one run writes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crossfade.bulk import records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PROMPTS: list[Any] = ["a", [{"role": "user", "content": "\N{SNOWMAN} b"}], [3, 4], "a"]
RUN = "0123456789abcdef"


def line(index: Any, run: str = RUN, **more: Any) -> bytes:
    prompt = PROMPTS[index] if type(index) is int and 0 <= index < len(PROMPTS) else "a"
    record = {"index": index, "prompt": prompt, "text": "t\N{SNOWMAN}", "run": run, **more}
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def begin(path: Path) -> set[int]:
    with records.Results(path, resume=True) as results:
        return results.begin(PROMPTS, RUN)


FOREIGN = {
    "text": b"shopping list",
    "text lines": b"bread\nmilk\n",
    "binary": bytes(range(256)),
    "one number": b"1",
    "zeros": b"\0" * 100,
    "other JSON lines": b'{"prompt": "a"}\n{"prom',
    "one other object": b'{"a": 1}',
    "a list": b"[1]\n",
    "text behind a row": line(0) + b"and so on",
    "another prompt's cut row": line(0) + b'{"index": 1, "prompt": "c',
    "a cut row beyond the prompts": b'{"index": 9, "prompt": "a", "te',
    "a cut row of a huge index": b'{"index": 99999999999999999999999, "pro',
    "a row without a run": b'{"index": 0, "prompt": "a", "text": "t"}\n',
    "a cut row before another": line(0)[:20] + b"\n" + line(1),
    "nothing but spaces in JSON's place": b'{"index":    ',
    "UTF-16": line(0).decode().encode("utf-16"),
    "twice": line(0) + line(1) + line(0),
    "deep": b"[" * 100_000,
    "deep in a row": line(0)[:-2] + b', "a": ' + b"[" * 100_000 + b"\n",
}
ODD_INDICES = [-1, 4, 10**30, 0.0, 1e300, True, False, None, "0", [0], {"a": 0}, float("nan")]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_no_result_file_keeps_every_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / "precious"
    path.write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match=r"precious, line \d: "):
        begin(path)
    assert path.read_bytes() == FOREIGN[name]


@pytest.mark.parametrize("index", ODD_INDICES, ids=repr)
def test_a_row_of_an_odd_index_is_named(tmp_path: Path, index: Any) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(line(1) + line(index))
    with pytest.raises(ValueError, match=r"out\.jsonl, line 2: "):
        begin(path)
    assert path.read_bytes() == line(1) + line(index)


@pytest.mark.parametrize(
    ("content", "has", "then"),
    [
        (b"", set(), b""),
        (line(2) + line(0), {0, 2}, line(2) + line(0)),
        (line(1)[:-1], {1}, line(1)),  # Nothing but the line break is missing.
        (b"\xef\xbb\xbf" + line(1), {1}, b"\xef\xbb\xbf" + line(1)),
        (line(1).replace(b"\n", b"\r\n") + b"\r\n", {1}, line(1).replace(b"\n", b"\r\n") + b"\r\n"),
    ],
    ids=["empty", "whole", "no line break", "a byte order mark", "Windows"],
)
def test_a_file_of_this_run_is_gone_on_with(
    tmp_path: Path, content: bytes, has: set[int], then: bytes
) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    assert begin(path) == has
    assert path.read_bytes() == then


@pytest.mark.parametrize("zeros", [b"", b"\0" * 4096], ids=len)
@pytest.mark.parametrize("whole", [b"", line(2)], ids=len)
def test_a_row_that_was_cut_anywhere_is_taken_off(
    tmp_path: Path, whole: bytes, zeros: bytes
) -> None:
    path = tmp_path / "out.jsonl"
    for end in range(0 if whole else 1, len(line(1)) - 1):
        path.write_bytes(whole + line(1)[:end] + zeros)
        assert begin(path) == ({2} if whole else set())
        assert path.read_bytes() == whole


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.sampled_from([line(0), line(1), line(2, run="x"), b"\n", b'{"index": 3', b"{"])),
    st.binary(max_size=20),
)
def test_whatever_a_file_holds_rows_are_kept(
    tmp_path: Path, parts: list[bytes], end: bytes
) -> None:
    path, content = tmp_path / "out.jsonl", b"".join(parts) + end
    path.write_bytes(content)
    try:
        has = begin(path)
    except ValueError:
        assert path.read_bytes() == content
    else:
        kept = [json.loads(x)["index"] for x in path.read_bytes().splitlines() if x.strip()]
        assert sorted(kept) == sorted(has)
        assert content.startswith(path.read_bytes()[:-1])


def test_what_cannot_be_a_file_of_results(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"), records.Results(tmp_path):
        pass
    os.mkfifo(tmp_path / "pipe")
    with (
        pytest.raises(ValueError, match="is no plain file"),
        records.Results(tmp_path / "pipe", resume=True),
    ):
        pass
    (tmp_path / "there").touch()
    with pytest.raises(FileExistsError, match="there"), records.Results(tmp_path / "there"):
        pass


@pytest.mark.parametrize(
    ("prompt", "kind"), [("\ud800", ValueError), ({1, 2}, TypeError), ([float], TypeError)]
)
def test_a_prompt_that_cannot_be_written_is_named_before_it_is_decoded(
    tmp_path: Path, prompt: Any, kind: type[Exception]
) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(kind, match="prompt 1 "), records.Results(path) as results:
        results.begin(["a", prompt], RUN)
    assert not path.exists()


def test_a_link_is_written_through(tmp_path: Path) -> None:
    path, link = tmp_path / "out.jsonl", tmp_path / "link"
    path.write_bytes(line(0) + line(1)[:9])
    link.symlink_to(path)
    assert begin(link) == {0}
    assert link.is_symlink()
    assert path.read_bytes() == line(0)
    with records.Results(link, resume=True) as results:
        results.begin(PROMPTS, RUN)
        for i in (2, 1, 3):
            results.write(json.loads(line(i)))
        results.finish()
    assert link.is_symlink()
    assert path.read_bytes() == b"".join(map(line, range(4)))
    assert sorted(tmp_path.iterdir()) == [link, path]


@pytest.mark.parametrize("other", ["out.jsonl", "link", "./out.jsonl"])
def test_one_run_writes_a_file_at_a_time(
    tmp_path: Path, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("out.jsonl")
    path.write_bytes(line(0))
    Path("link").symlink_to(path)
    with records.Results(path, resume=True) as first:
        with (
            pytest.raises(BlockingIOError, match="is being written by another run"),
            records.Results(other, resume=True),
        ):
            pass
        first.begin(PROMPTS, RUN)
        first.write(json.loads(line(1)))
    assert begin(Path(other)) == {0, 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out.jsonl"]  # no lock


HOLD = """
import sys, time
from crossfade.bulk import records
with records.Results(sys.argv[1], resume=True) as results:
    results.begin(["a", "b", "c"], "r")
    results.write({"index": 2, "prompt": "c", "run": "r"})
    results.write({"index": 0, "prompt": "a", "run": "r"})
    print("written", flush=True)
    time.sleep(600)
"""


def test_a_killed_run_leaves_its_rows_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        with pytest.raises(BlockingIOError), records.Results(path, resume=True):
            pass
    finally:
        process.kill()
        process.communicate()
    with records.Results(path, resume=True) as results:
        assert results.begin(["a", "b", "c"], "r") == {0, 2}


def test_what_was_flushed_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    path = tmp_path / "out.jsonl"
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path.read_bytes()))
    with records.Results(path) as results:
        results.begin(PROMPTS, RUN)
        results.write(json.loads(line(0)))
        results.flush()
    assert synced == [line(0)]


def test_a_file_without_a_row_is_not_left(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with pytest.raises(ZeroDivisionError), records.Results(path):
        1 / 0  # noqa: B018
    assert not path.exists()
    path.touch()  # It was there before.
    with records.Results(path, resume=True):
        pass
    assert path.exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_stdout_of_any_encoding_gets_json(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    with records.Results(None) as results:
        results.begin(PROMPTS, RUN)
        results.write({"index": 0, "text": "\N{SNOWMAN}"})
        results.flush()
        assert json.loads(written.getvalue()) == {"index": 0, "text": "\N{SNOWMAN}"}


def test_lines_are_put_in_order_when_all_are_there(tmp_path: Path) -> None:
    """Lines that were there before stay where they are; a run that is cut short moves none."""
    path = tmp_path / "out.jsonl"
    with records.Results(path) as results:
        results.begin(PROMPTS, RUN)
        results.write(json.loads(line(2)))
    for written, finished in ((1, False), (0, True)):
        with records.Results(path, resume=True) as results:
            results.begin(PROMPTS, RUN)
            results.write(json.loads(line(written)))
            if finished:
                results.write(json.loads(line(3)))
                results.finish()
    assert path.read_bytes() == line(2) + line(1) + line(0) + line(3)
    path.unlink()
    with records.Results(path) as results:
        results.begin(PROMPTS, RUN)
        for i in (3, 0, 2, 1):
            results.write(json.loads(line(i)))
        results.finish()
    assert path.read_bytes() == b"".join(map(line, range(4)))
    assert list(tmp_path.iterdir()) == [path]


def test_lines_on_stdout_wait_for_those_before_them(capsys: pytest.CaptureFixture[str]) -> None:
    with records.Results(None) as results:
        results.begin(PROMPTS, RUN)
        results.write(json.loads(line(1)))
        assert capsys.readouterr().out == ""
        results.write(json.loads(line(0)))
        assert len(capsys.readouterr().out.splitlines()) == 2
        results.write(json.loads(line(3)))  # A run that is cut short has such lines left.
    assert json.loads(capsys.readouterr().out)["index"] == 3
