"""How the demo's fader is chosen: of the ends that keep the bound, the widest comes first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from crossfade.cli import fader

sys.path += [
    str(Path(__file__).parent.parent / "bench"),
    str(Path(__file__).parent.parent / "bench" / "reproduce"),
]

import moods
from reports import demo

RESULTS = Path(__file__).parent.parent / "bench" / "results"


def row(candidate: str, weight: float, sentiment: float, perplexity: float) -> dict[str, Any]:
    return {
        "candidate": candidate,
        "temperature": 0.5,
        "weight": weight,
        "sentiment": sentiment,
        "perplexity": perplexity,
    }


def test_ends_are_measured_against_the_base_at_every_position() -> None:
    rows = [
        row("base", 0, 0.4, 4),
        row("add: a", -2, -0.9, 6),
        row("add: a", -1, 0.0, 8.4),  # too much, between ends that are not
        row("add: a", 1, 0.5, 5),
        row("add: a", 2, 0.9, 5),
        row("add: b", -1, 0.1, 5),
        row("add: b", 1, 0.5, 8),
        row("mix: a", 0, -0.2, 7),
        row("mix: a", 1, 0.6, 5),
    ]
    found = [(e["candidate"], e["from"], e["to"], e["within"]) for e in moods.ends(rows)]
    assert found == [
        ("mix: a", 0, 1, True),
        ("add: b", -1, 1, True),
        ("add: a", -2, 2, False),
        ("add: a", -1, 1, False),
    ]
    best = moods.ends(rows)[0]
    assert best["range"] == pytest.approx(0.8)
    assert best["perplexity_over_base"] == pytest.approx(1.75)


def test_the_demo_is_the_best_that_was_measured_on_other_prompts() -> None:
    assert not set(moods.SUBJECTS) & set(fader.SUBJECTS)
    report = json.loads((RESULTS / "moods.json").read_text())
    best, settings = report["ends"][0], fader.Settings()
    assert best["within"]
    formula, _, pair = best["candidate"].partition(": ")
    assert formula == fader.FORMULA
    assert tuple(moods.PAIRS[pair]) == tuple(fader.MOODS.values())
    assert (best["from"], best["to"]) == (min(settings.weights), max(settings.weights))
    assert best["temperature"] == settings.temperature


def test_the_demos_texts_keep_the_bound_at_every_position() -> None:
    report = json.loads((RESULTS / "demo.json").read_text())
    base = next(p["perplexity"] for p in report["positions"] if p["weight"] == 0)
    assert max(p["perplexity"] for p in report["positions"]) < moods.LIMIT * base
    assert f"| {base:.2f} ±" in demo.render(report)
