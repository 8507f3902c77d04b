"""``crossfade bench ops``: a table and a file with the time of every contender."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import bench
from crossfade.bench import ops, timing
from crossfade.bench.contenders import ROWS, Case
from crossfade.bench.ops import cases

CASES = [
    Case("float32", 2, 4099, "plain"),
    Case("bfloat16", 1, 4098, "top-k 50, top-p 0.9", "real"),
    Case("float16", 1, 4097, "top-p 0.9", "flat"),
]


@pytest.fixture(autouse=True)
def few_cases(monkeypatch: pytest.MonkeyPatch, ticking: None) -> None:
    monkeypatch.setattr(ops, "cases", lambda *_: CASES)


def test_a_table_is_printed_and_the_figures_are_kept(run, tmp_path: Path) -> None:
    printed = run("bench", "ops", "--quick", "--json", str(tmp_path / "ops.json"), lines=False)
    report = json.loads((tmp_path / "ops.json").read_text())
    assert printed.splitlines() == list(bench.table(report))
    assert report["versions"]["torch"] == torch.__version__
    assert report["inputs"] == ops.INPUTS["cpu"]
    assert [(r["vocab"], r["rows"]) for r in report["results"]] == [
        (c.vocab, c.rows) for c in CASES
    ]
    for result, case in zip(report["results"], CASES, strict=True):
        assert result["us"] == {"read": 1e6, "ours": 1e6, "torch chain": 1e6}
        assert result["warm_us"] == {"read": 1e6, "ours": 1e6}
        assert result["interrupted"] == {"read": 0, "ours": 0}
        assert result["read_gb_per_s"] == round(case.bytes / 1e9, 1)
    lines = printed.splitlines()
    assert lines[0].endswith("| ours / read | the same, warm | torch chain / ours |")
    second = "1,000,000 | 1,000,000 | 1.00 | 1.00 | 1.0 |"
    assert lines[2:] == [
        f"| float32 2 x 4,099 | plain | {second}",
        f"| bfloat16 1 x 4,098 | top-k 50, top-p 0.9, real rows | {second}",
        f"| float16 1 x 4,097 | top-p 0.9, flat rows | {second}",
    ]


@pytest.mark.parametrize("cold", [True, False])
def test_what_beats_the_read_fails(cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in the times of cold inputs and once in those of warm ones."""
    times = ops.cpu_times

    def cheated(*given: Any, **options: Any) -> dict[str, timing.Timing]:
        found = times(*given, **options)
        if options.get("cold", True) == cold:
            found["ours"] = timing.Timing(us=5e5, floor_us=1e6, floor_quarter_us=1e6)
        return found

    monkeypatch.setattr(ops, "cpu_times", cheated)
    state = "cold" if cold else "warm"
    with pytest.raises(timing.FasterThanItsFloor, match=rf"vocab=4099.*, {state}: 'ours' takes"):
        ops.run_ops(quick=True, device="cpu")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases(device: str) -> None:
    """Top-p alone is measured on all rows; a quick run has the same of fewer inputs."""
    all_cases, quick = cases(device, quick=False), cases(device, quick=True)
    assert set(quick) < set(all_cases)
    assert len(set(all_cases)) == len(all_cases)
    for found in (all_cases, quick):
        for inputs in {(c.dtype, c.batch) for c in found}:
            mine = [c for c in found if (c.dtype, c.batch) == inputs]
            assert {c.setting for c in mine} == {"plain", "top-p 0.9", "top-k 50, top-p 0.9"}
            assert {c.rows for c in mine if c.setting == "top-p 0.9"} == set(ROWS)


def test_a_report_of_a_gpu_has_no_warm_inputs() -> None:
    """Nor do older ones name their rows."""
    result = {"dtype": "bfloat16", "batch": 1, "vocab": 8, "setting": "plain"}
    report = {"results": [result | {"us": {"read": 2.0, "ours": 5.0, "ours, Triton": 10.0}}]}
    assert list(bench.table(report)) == [
        "| inputs | sampling | read, us | ours, us | ours / read | ours, Triton / ours |",
        "|---|---|---|---|---|---|",
        "| bfloat16 1 x 8 | plain | 2 | 5 | 2.50 | 2.0 |",
    ]
