"""The bench of what searches gain: its bounds, its comparison at equal divergence, its resuming."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import steer
import steered


def test_the_divergence_of_choosing_is_bounded() -> None:
    """Of best of n exactly, where no two texts are alike: the i-th best of n many equal ones."""
    n, many = 4, 100_000
    rank = np.arange(many)
    chosen = ((many - rank) / many) ** n - ((many - rank - 1) / many) ** n
    exact = float((chosen * np.log(chosen * many)).sum())
    value = cf.Reward(lambda prompts, texts: [0.0] * len(texts))
    assert steered.choice_kl(cf.BestOfN(n, value), steer.NEW) == pytest.approx(exact, abs=1e-3)
    assert steered.choice_kl(None, steer.NEW) == 0
    one_chunk = cf.ChunkBeamSearch(2, 4, steer.NEW, value)
    assert steered.choice_kl(one_chunk, steer.NEW) == pytest.approx(math.log(8))
    halves = cf.ChunkBeamSearch(2, 4, steer.NEW // 2, value)
    assert steered.choice_kl(halves, steer.NEW) == pytest.approx(math.log(8) + math.log(4))


def test_the_fader_at_a_divergence() -> None:
    points = [("fader", 0.0, 0.2), ("fader", 2.0, 0.6), ("samples", 1.0, 0.9)]
    rows = [{"group": g, "kl": kl, "reward": r} for g, kl, r in points]
    assert steer.at_kl(rows, 1.0) == pytest.approx(0.4)
    assert steer.at_kl(rows, 2.5) is None
    assert steer.at_kl(rows[2:], 1.0) is None


@pytest.mark.model
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")
def test_a_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steer, "FADER", (0.0, 2.0))
    monkeypatch.setattr(steer, "METHODS", ("base, best of n", "both (IVG)"))
    monkeypatch.setattr(steer, "NEW", 4)
    path = tmp_path / "steer.json"
    arguments = ["--questions", "2", "--json", str(path)]
    first: dict[str, Any] = steer.main(arguments)
    methods = [(r["group"], r["method"]) for r in first["rows"]]
    assert len(methods) == len(set(methods)) == 2 + 2 * len(steer.METHODS)
    assert all(math.isfinite(r["reward"]) and r["perplexity"] > 1 for r in first["rows"])
    assert first["rows"][0]["kl"] == pytest.approx(0, abs=1e-4), "the base does not leave itself"
    path.write_text(json.dumps({**first, "rows": first["rows"][1:]}))
    again = steer.main(arguments)
    assert [r["texts"] for r in again["rows"][:-1]] == [r["texts"] for r in first["rows"][1:]]
    assert again["rows"][-1]["texts"] == first["rows"][0]["texts"], "the one that was missing"
    assert "| both (IVG) | 8 |" in steer.summary(again)
    with pytest.raises(SystemExit):
        steer.main(["--questions", "1", "--json", str(path)])
