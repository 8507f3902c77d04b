"""The DPO bench: its pairs are right, both trainers have one curve, and its table shows both."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")
sys.path.append(str(Path(__file__).parent.parent / "bench"))

import dpo
from sweeps import every
from tiny_models import make, make_tokenizer


def test_pairs() -> None:
    rows = dpo.pairs(20, tokens=60)
    assert rows == dpo.pairs(20, tokens=60)
    for kind in ("chosen", "rejected"):
        texts = [row[kind][0]["content"] for row in rows]
        assert len(set(texts)) == 20
        assert all(30 < len(text.split()) < 80 for text in texts)
        other = next(k for k in dpo.WORDS if k != kind)
        assert not any(word in text for text in texts for word in dpo.WORDS[other])


@pytest.mark.parametrize("case", every(2, dpo.CASES))
def test_curves_and_table(case: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("CI", "1")  # with this TRL sends no telemetry
    args = argparse.Namespace(steps=3, pairs=6, tokens=9, batch=2)
    runs = {name: [dpo.train(case, name, args, make(), make_tokenizer())] for name in dpo.TRAINERS}
    assert all(len(r[0][key]) == 3 for r in runs.values() for key in ("loss", "margin", "seconds"))
    row = dpo.row_of(case, runs)
    assert row["largest_difference"] < 1e-5
    report = {
        "rows": [row],
        "machine": {"device": "a CPU", "threads": 2},
        "sizes": vars(args),
        "versions": {"trl": "1.16.0"},
        "command": "python bench/dpo.py",
    }
    lines = dpo.render(report).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [
        [f"| {dpo.CASES[case]}", name] for name in dpo.TRAINERS
    ]
    assert lines[2].count("|") == lines[0].count("|")
    assert "a CPU, 2 threads" in lines[-1]
