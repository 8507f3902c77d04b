"""The bench of guides: all ways write the same tokens, and its table has a line for each."""

from __future__ import annotations

import sys
from pathlib import Path

import crossfade as cf
from tiny_models import make

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import guides


def test_a_small_run() -> None:
    expert, amateur = (cf.Model(make("llama", seed), name=f"m{seed}") for seed in range(2))
    blend = (1.5 * expert - 0.5 * amateur).within(cf.Support(min_p=0.1))
    rows = guides.measure(blend, [[5, 6, 7], [8, 9]], new=6, rounds=1)
    asked = {row["way"]: row["guide_forwards"] for row in rows}
    assert list(asked) == list(guides.WAYS)
    assert asked["neither"] == asked["restricted heads"] == 1
    assert asked["skipped steps"] == asked["both"] <= 1
    assert {row["over_neither"] for row in rows if row["way"] == "neither"} == {1}
    report = {"rows": rows, "machine": {"device": "a CPU", "threads": 2}, "command": "c"}
    head, _, *lines, _, where = guides.render(report).splitlines()
    assert "batch 2: ms a step" in head
    assert [line.split(" | ")[0].strip("| ") for line in lines] == list(guides.WAYS)
    assert where == "a CPU, 2 threads; `c`."
