"""The bench of forks: what it times is right, and its table shows who took part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import fork
from crossfade.bench import timing


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize("parents", fork.PARENTS)
def test_a_small_case(parents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders that take a second each, over two tensors whose last two positions are forked."""
    monkeypatch.setattr(fork, "TENSORS", 2)
    case = fork.Case(parents, live=6, start=4)
    row = fork.measure(case, "cpu", seconds=0.0)
    assert row["ms"] == {"copy": 1000, "ours": 1000, "index_select": 1000}
    assert row["over_copy"] == row["index_select_over_ours"] == 1
    report = {"rows": [row], "machine": {"device": "a CPU", "threads": 2}, "command": "c"}
    head, _, line, _, where = fork.render(report).splitlines()
    assert head.startswith("| parents | positions | copy, ms | ours, ms | index_select, ms |")
    assert line.startswith(f"| {parents} | 4 to 6 |")
    assert where == "a CPU, 2 threads; `c`."


def test_bytes_of_a_fork() -> None:
    """Each row that changes is written, and each row that is a parent of another one is read."""
    number = fork.TENSORS * fork.HEADS * fork.DIM * 4
    rows = {"beam": 16 - sum(p == row for row, p in enumerate(fork.PARENTS["beam"])) + 4}
    rows["permutation"] = 2 * sum(p != row for row, p in enumerate(fork.PARENTS["permutation"]))
    for parents, count in rows.items():
        assert fork.Case(parents, live=30, start=10).bytes == count * 20 * number


def test_what_beats_the_copy_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    beaten = {"ours": timing.Timing(us=5.0, floor_us=10.0, floor_quarter_us=10.0)}
    monkeypatch.setattr(fork, "cpu_times", lambda *_: beaten)
    case = fork.Case("beam", live=2, start=0)
    with pytest.raises(timing.FasterThanItsFloor, match=r"parents='beam', live=2.*: 'ours' takes"):
        fork.measure(case, "cpu", seconds=0.0)
