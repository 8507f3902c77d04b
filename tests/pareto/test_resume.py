"""A sweep goes on from its file, loses nothing that was written, and refuses what is another's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade.bulk import decode as bulk
from crossfade.decoding.search.finished import TextValuer
from sweep_cases import PROMPTS, REWARDS, ones, short


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The place of each text that is decoded; `stop` ends the process's patience after so many."""
    found: list[int] = []
    decode = bulk.decode

    def counted(*arguments: Any, **options: Any) -> Any:
        for place, out in decode(*arguments, **options):
            if len(found) == STOP[0]:
                raise KeyboardInterrupt
            found.append(place)
            yield place, out

    monkeypatch.setattr(bulk, "decode", counted)
    return found


STOP = [10**6]


@pytest.fixture(autouse=True)
def no_stop() -> None:
    STOP[0] = 10**6


def shorter(prompts: list[Any], responses: list[str]) -> list[float]:
    return [2 * x for x in short(prompts, responses)]


def test_a_stopped_sweep_keeps_its_points_and_goes_on(
    blended: Any,
    sweep: Any,
    written: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "sweep.jsonl"
    whole = sweep({"b": blended})
    written.clear()
    STOP[0] = 7
    with pytest.warns(RuntimeWarning, match="interrupted when . of 3 points were done"):
        part = sweep({"b": blended}, path=path)
    assert part.interrupted
    assert 0 < len(part.points) < 3
    for point in part.points:
        assert point in whole.points
    STOP[0] = 10**6
    with path.open("ab") as file:
        file.write(b'{"method": "b", "weights": {"sho')  # as a crash leaves it
    rest = sweep({"b": blended}, path=path)
    assert len(written) == 9 == len(set(written))
    assert (rest.points, rest.texts, rest.scores) == (whole.points, whole.texts, whole.scores)
    asked: list[int] = []
    call = TextValuer.__call__
    monkeypatch.setattr(
        TextValuer, "__call__", lambda *args: (asked.append(len(args[2])), call(*args))[1]
    )
    again = sweep({"b": blended}, path=path)
    assert (again.points, len(written), asked) == (whole.points, 9, [])
    mended = {"short": shorter, "ones": ones}
    assert sweep({"b": blended}, path=path, rewards=mended).points != whole.points
    assert asked == [3, 3, 3]  # the reward is another function, and scores the texts again
    sweep({"b": blended}, path=path, rewards=mended)
    assert len(asked) == 3
    json_lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(json_lines) == 1 + 9 + 2 * 3 + 3


def test_methods_and_weightings_can_be_added(
    blended: Any, terms: list[cf.Model], sweep: Any, written: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep({"b": blended}, path=path)
    front = sweep({"b": blended, "c": lambda w: terms[1]}, path=path, weights=5, max_batch=2)
    assert len(written) == 9 + 2 * 3 + 5 * 3
    assert len(front.points) == 10
    assert front.points[0] in sweep({"b": blended}).points


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "other settings: seed was 0 and is 1"),
        ({"max_new_tokens": 6}, "max_new_tokens was 5 and is 6"),
        ({"temperature": 0.5}, "temperature was None and is 0.5"),
        ({"prompts": [*PROMPTS[:2], "a"]}, r"prompts\[2\] was 'a very dull cast' and is 'a'"),
        ({"prompts": PROMPTS[:2]}, "prompts was '3 of them' and is '2 of them'"),
        ({"methods": "other"}, "in which 'b' at short=0, ones=1 was another blend"),
    ],
)
def test_other_settings_are_refused_by_name(
    options: dict[str, Any],
    message: str,
    blended: Any,
    terms: list[cf.Model],
    sweep: Any,
    tmp_path: Path,
) -> None:
    path = tmp_path / "sweep.jsonl"
    sweep({"b": blended}, path=path, weights=2)
    before = path.read_bytes()
    method = (lambda w: terms[1]) if options.pop("methods", None) else blended
    with pytest.raises(ValueError, match=message):
        sweep({"b": method}, path=path, weights=2, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"hello\n", b'{"index": 0}\n', b"x", b'{"sweep": 1}\n'])
def test_a_file_of_something_else_is_refused_unchanged(
    content: bytes, blended: Any, sweep: Any, tmp_path: Path
) -> None:
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not of a sweep that crossfade has written"):
        sweep({"b": blended}, path=path)
    assert path.read_bytes() == content


def test_a_folder_and_a_missing_folder_are_named(blended: Any, sweep: Any, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="a folder; it must be a file"):
        sweep({"b": blended}, path=tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        sweep({"b": blended}, path=tmp_path / "none" / "x.jsonl")


@pytest.mark.parametrize("end", [b"", b"\0\0\0"])
def test_the_last_line_may_lack_its_break(
    end: bytes, blended: Any, sweep: Any, written: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "sweep.jsonl"
    front = sweep({"b": blended}, path=path, weights=2)
    path.write_bytes(path.read_bytes().rstrip(b"\n") + end)
    assert sweep({"b": blended}, path=path, weights=2).points == front.points
    assert len(written) == 6
    assert path.read_bytes().endswith(b"\n")


def test_what_no_other_process_could_compare_is_named(
    terms: list[cf.Model], sweep: Any, tmp_path: Path
) -> None:
    with (tmp_path / "f").open("w") as file:

        def writer(prompts: list[Any], **generation: Any) -> list[str]:
            file.write("x")
            return ["w1"] * len(prompts)

        with pytest.raises(TypeError, match=r"methods\['w'\] is or holds a TextIOWrapper"):
            sweep({"w": lambda w: writer}, path=tmp_path / "s.jsonl", rewards=REWARDS)
