"""The bench of drafts: its tasks, its intervals, and what it lets count as the same."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft")
sys.path.append(str(Path(__file__).parent.parent / "bench"))

import speculation
from decode_peers import Wrong
from reports import OURS
from reports import speculation as report

pytestmark = [
    pytest.mark.usefixtures("ticking"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speculation.json"
    tasks = [report.EDITS, report.FREE, report.FIXED]
    arguments = ["--quick", "--rounds", "1", "--batch", "1", "--json", str(path)]
    found = speculation.main([*arguments, "--only", *tasks[:2]])
    found = speculation.main([*arguments, "--only", *tasks])  # It goes on.
    assert json.loads(path.read_text()) == found
    rows = [r for r in found["rows"] if r["contender"] == OURS]
    assert [r["task"] for r in rows] == tasks
    assert all(r["same"] == r["rows"] == 1 for r in rows)
    text = report.render(found)
    assert f"| {report.EDITS} | 1 | {OURS} |" in text
    assert "1 of 1" in text


def test_intervals_are_of_the_order() -> None:
    values = [float(x) for x in range(9)]
    assert speculation.interval(values) == (1.0, 7.0)  # 96.1 % of the medians of nine
    assert speculation.interval(values[:5]) == (0.0, 4.0)


def test_edits() -> None:
    text = "One. Two! Three? Four. Five."
    assert "".join(speculation.sentences(text)) == text
    (new,) = speculation.edited([text], ["Other."], random.Random(0))
    kept = [s for s in speculation.sentences(text) if s.strip() in new]
    assert 2 <= len(kept) <= 4
    ids = list(range(100, 160))
    assert (
        1
        <= sum(
            a != b for a, b in zip(speculation.respanned(ids, random.Random(1)), ids, strict=True)
        )
        <= 36
    )


def test_rows_that_differ_must_be_alike_until_then() -> None:
    contest = speculation.Contest("cpu", quick=True)
    task = contest.task(report.FREE, 0, 2)
    plain: Any = speculation.ours(task, None)
    assert speculation.check("ours", plain, plain) == 2
    sequences = plain.sequences.clone()
    sequences[1, -1] += 1
    assert speculation.check("ours", plain, replace(plain, sequences=sequences)) == 1
    off = plain.logprobs.clone()
    off[0, 0] += 0.1
    with pytest.raises(Wrong, match=r"row 0 is off by 0\.1 nats"):
        speculation.check("ours", plain, replace(plain, logprobs=off))
