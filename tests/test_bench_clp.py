"""The reproduction of conditioned policies: its stages, its figures, and how it is resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")  # TRL needs Python 3.11
pytest.importorskip("textstat")
pytest.importorskip("wordfreq")
sys.path += [str(Path(__file__).parent.parent / "bench" / "reproduce")]

import clp
import clp_figures as figures
import stages
from crossfade import pareto
from reports import clp as report
from tiny_models import make, make_tokenizer


def test_each_stage_comes_after_what_it_reads() -> None:
    names = list(clp.stages())
    for name, stage in clp.stages().items():
        seed = getattr(stage, "keywords", {}).get("seed")
        if name.startswith(("front-two", "front-three")):
            setting = stage.keywords["setting"]  # type: ignore[attr-defined]
            rewards = stage.keywords["rewards"]  # type: ignore[attr-defined]
            told = ("prompt",) if setting == "two" else ()
            needed = [f"{setting}-{scope}-{seed}" for scope in (*clp.SCOPES, *told)]
            needed += [f"expert-{reward}-{seed}" for reward in rewards]
            assert all(names.index(x) < names.index(name) for x in needed)


def a_front(shift: float) -> pareto.Front:
    """Two methods at two weightings; the second one's rewards are lower by `shift`."""
    points, texts, scores = [], [], []
    for method, less in (("full", 0.0), ("soup", shift)):
        for w in (0.0, 1.0):
            own = {"a": [[w - less], [w + 0.1 - less]], "b": [[1 - w - less], [0.9 - w - less]]}
            mean = {name: sum(x[0] for x in s) / 2 for name, s in own.items()}
            points.append(
                {"method": method, "weights": {"a": w, "b": 1 - w}, "rewards": mean, "kl": 1.0}
            )
            texts.append([["x"], ["y"]])
            scores.append(own)
    prompts = [[{"role": "user", "content": str(i)}] for i in range(2)]
    return pareto.Front(("a", "b"), prompts, points, texts, scores)


def test_differences_are_resolved_where_all_seeds_agree_and_0_is_outside() -> None:
    reference = {"a": -1.0, "b": -1.0}
    better = [a_front(0.5), a_front(0.4)]
    found = figures.differences(better, reference, "full")["soup"]
    volumes = [f.hypervolume(reference) for f in better]
    expected = sum(v["full"].value - v["soup"].value for v in volumes) / 2
    assert found["difference"] == pytest.approx(expected)
    assert found["interval"][0] > 0
    assert found["resolved"]
    mixed = figures.differences([a_front(0.5), a_front(-0.4)], reference, "full")["soup"]
    assert not mixed["resolved"]
    same = figures.differences([a_front(0.0)], reference, "full")["soup"]
    assert same["difference"] == 0
    assert not same["resolved"]
    of = figures.of_fronts(better, reference)["full"]
    assert of["steerability"] == pytest.approx([1.0, 1.0])
    assert of["ends"] == {"a": pytest.approx(1.05), "b": pytest.approx(0.95)}
    assert of["interval"][0] <= of["volume"] <= of["interval"][1]


def test_a_run_of_tiny_models_is_reported(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """All stages of one seed; those that are there are skipped, and the tables can be made."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    monkeypatch.setattr(stages, "base", lambda dtype: (make().eval(), tokenizer))
    for name, x in {
        **{
            "SEEDS": (0,),
            "STEPS": 1,
            "PROMPTS": 2,
            "RESPONSES": 2,
            "NEW": 3,
            "HELD_OUT": dict.fromkeys(clp.HELD_OUT, 2),
        },
        **{"GRID": {"two": 2, "three": 2}, "KL_WEIGHTS": (0.0, 1.0), "LAYERS": [0, 1]},
        "LORA": {"r": 2},
    }.items():
        monkeypatch.setattr(clp, name, x)
    monkeypatch.setattr(pareto.Front, "plot", lambda self, path: None)
    told = tmp_path / "clp.json"
    arguments = ["--work", str(tmp_path / "work"), "--json", str(told)]
    assert clp.main([*arguments, "--only", "expert-brevity-0"]) is None
    assert "missing: front-base" in capsys.readouterr().out
    found = clp.main(arguments)
    assert found is not None
    assert "expert-brevity-0: there already" in capsys.readouterr().out
    assert report.render(json.loads(told.read_text())) == report.render(found)
    assert "| rewarded soup |" in report.summary(found)
    assert list(found["fronts"]["two"]) == ["full", "attention", "head", "soup", "mod", "prompt"]
    assert list(found["fronts"]["kl"]) == ["full", "attention", "head", "soup", "dera"]
    assert found["parameters"]["soup"] == found["parameters"]["full"]
