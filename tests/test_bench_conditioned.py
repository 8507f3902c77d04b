"""The bench of conditioned policies: its contenders write what they should, and are counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import conditioned
from reports import conditioned as report

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conditioned.json"
    sizes = ["--batch", "1", "3", "--tokens", "4", "--rounds", "1"]
    found = conditioned.main(["--quick", *sizes, "--json", str(path)])
    assert json.loads(path.read_text()) == found
    forwards = {(r["batch"], r["contender"]): r["forwards"] for r in found["rows"]}
    assert forwards == {
        (1, report.ONE): 5,
        (1, report.MERGED): 5,
        (1, report.DERA): 10,
        (3, report.ONE): 5,
        (3, report.MERGED): 5,
        (3, report.DERA): 10,
        (3, report.EACH): 5,
        (3, report.TURNS): 15,
    }
    assert "| 3 | a mix for each request | 5 |" in capsys.readouterr().out


def test_goals_that_are_missed() -> None:
    seconds = {report.ONE: 1.0, report.EACH: 1.2, report.MERGED: 1.0, report.DERA: 1.7}
    rows = [{"batch": 16, "contender": n, "rounds_s": [s] * 3} for n, s in seconds.items()]
    assert list(conditioned.missed(rows)) == [
        "batch 16: DeRa, two separate models takes 1.70 times the time of one mix for all requests",
        "batch 16: a mix for each request takes 1.20 times the time of one mix for all requests",
    ]
