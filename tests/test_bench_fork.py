"""The bench of forks: what it times is right, and its table shows who took part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import fork


@pytest.mark.parametrize("parents", fork.PARENTS)
def test_a_small_case(parents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of each contender over two tensors, of which a tail of two positions is forked."""
    monkeypatch.setattr(fork, "TENSORS", 2)
    monkeypatch.setattr(fork, "COLD_BYTES", 1)
    case = fork.Case(parents, live=6, start=4)
    row = fork.measure(case, "cpu", seconds=0.0)
    assert set(row["ms"]) == {"copy", "ours", "index_select"}
    report = {"rows": [row], "machine": {"device": "a CPU", "threads": 2}, "command": "c"}
    head, _, line, _, where = fork.summary(report).splitlines()
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
