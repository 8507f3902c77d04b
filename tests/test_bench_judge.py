"""The bench of judgments: its contenders agree, and read as many tokens as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import judge
from reports import OURS
from reports import judge as report

pytestmark = pytest.mark.usefixtures("ticking")


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "EVERY", 1)
    path = tmp_path / "judge.json"
    sizes = ["--answers", "4", "--context", "40", "--answer", "9", "--rounds", "1"]
    found = judge.main(["--quick", *sizes, "--batch", "2", "--json", str(path)])
    assert json.loads(path.read_text()) == found
    rows = {(r["task"], r["contender"]): r for r in found["rows"]}
    tasks = list(dict.fromkeys(task for task, _ in rows))
    assert len(tasks) == 2
    for task in tasks:
        own = rows[task, OURS]
        others = [r for (t, name), r in rows.items() if t == task and name != OURS]
        assert len(others) == 2
        # the context and first answers are read once, so that a good part of all tokens is not read
        assert all(r["tokens"] > 1.5 * own["tokens"] for r in others)
        assert report.allowed(found["rows"], others[0]) > 1.5
    assert "| a tournament, 3 | crossfade |" in report.render(found)
