"""``crossfade bench ops``: a table and a file with the time of every contender."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from crossfade import bench
from crossfade.bench import contenders, ops


def test_a_table_is_printed_and_the_figures_are_kept(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [
        contenders.Case("float32", 2, 4099, "plain"),
        contenders.Case("bfloat16", 1, 4098, "top-k 50, top-p 0.9"),
    ]
    monkeypatch.setattr(ops, "cases", lambda *_: cases)
    monkeypatch.setattr(contenders, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(ops, "cpu_times", lambda calls, _: bench.cpu_times(calls, 0.0))
    printed = run("bench", "ops", "--quick", "--json", str(tmp_path / "ops.json"), lines=False)
    report = json.loads((tmp_path / "ops.json").read_text())
    assert printed.splitlines() == list(bench.table(report))
    assert report["versions"]["torch"] == torch.__version__
    assert [r["vocab"] for r in report["results"]] == [4099, 4098]
    for result in report["results"]:
        assert {"read", "ours", "torch chain"} <= set(result["us"])
        assert min(result["us"].values()) > 0
    assert printed.splitlines()[2].startswith("| float32 2 x 4,099 | plain | ")
