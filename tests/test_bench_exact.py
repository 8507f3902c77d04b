"""The bench of exactness: it passes with the reference, goes on, and refuses a wrong sampler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import ops

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import exact

OPTIONS = ["--backend", "reference", "--draws", "1500"]


def test_a_small_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exact, "CHUNK", 1000)  # two calls, of which one is shorter
    path = tmp_path / "exact.json"
    options = [*OPTIONS, "--only", ", 257 tokens", "--json", str(path)]
    assert exact.main(options) == 0
    report = json.loads(path.read_text())
    assert [*report["cases"]] == [f"{cut}, 257 tokens" for cut in exact.CUTS]
    assert {*report["cases"]["plain, 257 tokens"]["p"]} == {"tokens", "groups", "within", "places"}
    assert "the smallest of 28 p-values" in capsys.readouterr().out

    report["cases"].pop("all, 257 tokens")
    report["cases"]["plain, 257 tokens"]["p"]["groups"] = 1e-9
    path.write_text(json.dumps(report))
    assert exact.main(options) == 1, "what was finished is kept"
    assert "(plain, 257 tokens: groups)" in capsys.readouterr().out
    assert "all, 257 tokens" in json.loads(path.read_text())["cases"]
    assert exact.main([*options, "--draws", "1499"]) == 0, "of other draws nothing is kept"


def test_draws_that_tell_of_one_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler that gives each step the noise of the even step before it."""
    options = [*OPTIONS, "--only", "lattice, along steps"]
    assert exact.main(options) == 0
    sample = ops.blend_sample

    def stuck(*args: Any, step: torch.Tensor, **settings: Any) -> Any:
        return sample(*args, step=step // 2 * 2, **settings)

    monkeypatch.setattr(ops, "blend_sample", stuck)
    assert exact.main(options) == 1


def test_only_must_name_cases() -> None:
    with pytest.raises(SystemExit):
        exact.main(["--only", "nothing"])
