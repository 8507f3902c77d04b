"""The bench of more than one process, on its smallest sizes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import scale  # noqa: E402


def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, texts: dict[str, str]
) -> list[list[str]]:
    """Let commands decode a prompt a second, and two with Ray, and take a second to begin."""
    asked: list[list[str]] = []

    def run(argv: list[str], output: Path, threads: int) -> tuple[float, float, dict[int, str]]:
        asked.append(argv)
        count = len(Path(argv[argv.index("--prompts") + 1]).read_text().splitlines())
        which = "ray" if "--ray" in argv else "one"
        rate = {"one": 1.0, "ray": 2.0}[which]
        return 1 + count / rate, rate, dict.fromkeys(range(count), texts[which])

    monkeypatch.setattr(scale, "run", run)
    file = tmp_path / "scale.json"
    file.write_text('{"other": {"kept": true}}')
    argv = ["scale.py", "ray", "--prompts=6", "--sizes=tiny", f"--json={file}"]
    monkeypatch.setattr(sys, "argv", argv)
    scale.main()
    return asked


def test_the_figures_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = measured(monkeypatch, tmp_path, {"one": "x", "ray": "x"})
    found = json.loads((tmp_path / "scale.json").read_text())
    assert found["other"] == {"kept": True}
    page = scale.render(found, "ray")
    assert page in capsys.readouterr().out
    assert "6 prompts | one process, 1 thread | 7.0 | 1 | 1.00 | 1.0 | 6 |" in page
    assert "6 prompts | --ray 2 | 4.0 | 2 | 2.00 | 1.0 | 6 |" in page
    assert sum("--ray" in argv for argv in asked) == 2


def test_other_texts_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="--ray 1 gave 6 prompts other texts"):
        measured(monkeypatch, tmp_path, {"one": "x", "ray": "y"})


def test_the_rate_of_parts_is_that_after_the_first(tmp_path: Path) -> None:
    parts = {tmp_path / f"{i}.jsonl": [{}] * count for i, count in enumerate((5, 3, 4))}
    for i, file in enumerate(parts):
        file.touch()
        os.utime(file, (100 + 2 * i, 100 + 2 * i))
    assert scale._rate(parts) == pytest.approx(7 / 4)


@pytest.mark.sweep
def test_a_command_is_run() -> None:
    """Without Ray, whose tests are those of `crossfade generate --ray`."""
    args = argparse.Namespace(prompts=3, batch=2, actors=[], sizes=["tiny"])
    ways = scale.ray(args)["sizes"]["tiny"]["ways"]
    assert {x["equal"] for x in ways.values()} == {3}
    assert all(x["rate"] > 0 for x in ways.values())


def test_shards_against_one_process() -> None:
    """The formula, the figures beside it, and what goes between ranks."""
    report = {
        "command": "python bench/scale.py shards",
        "hardware": {"device": "X", "threads": 1, "isa": "avx2"},
        "shape": [8, 1024, 49152],
        "ranks": 2,
        "weights": 5e8,
        "alone": {"1": {"1": 0.1}, "2": {"1": 0.08}},
        "in ranks": {
            "steps": {"1": {"in shards": 0.07, "gathered": 0.09}},
            "sums": {"1": 1e-3},
            "small": {"1": 4e-3},
            "rows": {"1": 2e-3},
        },
        "draws": [{"rows": 1, "draw": "plain", "seconds": {"1": 1e-3, "2": 2e-3, "4": 3e-3}}],
    }
    page = scale.render({"shards": report}, "shards")
    assert "| 1 | one process, 2 threads | 80.0 | 1.25 |" in page
    assert "| 1 | 2 ranks, by the formula | 70.0 | 1.43 |" in page  # 50 + 16 sums of 1 + 4
    assert "| 1 | 2 ranks, head in shards | 70.0 | 1.43 |" in page
    assert "192 B in 4000 us | 98,304 B in 2000 us |" in page
    assert "| 1 | plain | 1.00 | 2.00 | 3.00 |" in page


@pytest.mark.sweep
def test_draws_from_parts() -> None:
    found = scale.draws([1])
    assert {x["draw"] for x in found} == set(scale.DRAWS)
    assert all(x["seconds"].keys() == {1, 2, 4} for x in found)
