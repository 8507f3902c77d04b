"""The bench of corrections: its contenders write the same, and what differs is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import correct
from decode_peers import Wrong
from reports import OURS
from reports import correct as report

pytestmark = pytest.mark.usefixtures("ticking")
QUICK = ["--quick", "--batch", "3", "--query", "9", "--answer", "4", "9", "--new-tokens", "5"]


def test_a_run(tmp_path: Path) -> None:
    path = tmp_path / "correct.json"
    found = correct.main([*QUICK, "--rounds", "1", "--json", str(path)])
    assert json.loads(path.read_text()) == found
    rows: dict[str, Any] = {r["contender"]: r for r in found["rows"]}
    assert list(rows) == [OURS, correct.PADDED, correct.LOOP]
    assert all(r["equal"] == 3 and r["tokens"] == 15 for r in rows.values())
    least, most = found["settings"]["prompts"]
    assert least < most, "the prompts are padded"
    assert "| crossfade | 3 of 3 | 15 |" in report.render(found)


def test_another_text_is_told_but_where_two_tokens_are_as_likely() -> None:
    model, tokenizer = correct.model_of("cpu", True)
    aligner = cf.MetaAligner(model, tokenizer)
    task = correct.task_of(tokenizer, 2, 9, (4, 9), 5)
    truth = correct.generated(aligner, model, 1, task)
    other = truth._replace(tokens=[[7] * 5, truth.tokens[1]], texts=["other", truth.texts[1]])
    assert correct.equal("x", aligner, task, truth, truth, 0.0) == 2
    assert correct.equal("x", aligner, task, other, truth, 99.0) == 1
    with pytest.raises(Wrong, match="x leaves text 0 at token"):
        correct.equal("x", aligner, task, other, truth, 0.01)
    short = other._replace(tokens=[truth.tokens[0][:2], truth.tokens[1]])
    with pytest.raises(Wrong, match="x ends text 0 after 2 tokens, not 5"):
        correct.equal("x", aligner, task, short, truth, 99.0)


def test_a_goal_that_was_missed_is_told() -> None:
    def rows(loop: float) -> list[dict[str, Any]]:
        times = {OURS: 2.0, correct.PADDED: 1.0, correct.LOOP: loop}
        return [{"contender": n, "rounds_s": [s, s]} for n, s in times.items()]

    assert [*correct.missed(rows(8.0))] == []
    (line,) = correct.missed(rows(7.0))
    assert line == "the official loop, one at a time: 3.50 times as fast; the goal is 4.0"
