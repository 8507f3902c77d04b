"""The bench of prompts of any number, on its smallest sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import bulk  # noqa: E402


def test_both_ways_give_the_same_and_the_figures_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bulk.json"
    argv = ["bulk.py", "--prompts=20", "--batch=2", "--new=6", "--rounds=2", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", argv)
    bulk.main()
    found = json.loads(file.read_text())
    assert bulk.render(found) in capsys.readouterr().out
    assert found["prompts_equal"] == found["prompts"] == 20
    assert len(found["ratios"]) == 2
    assert found["steps_ratio"] >= 1.0
