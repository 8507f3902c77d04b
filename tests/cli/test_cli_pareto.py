"""`crossfade pareto`: a sweep from a settings file, its files, and mistakes in the settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from crossfade import cli
from crossfade.pareto import Front
from word_models import save_reward_model

REWARDS = """\
def short(prompts, responses):
    return [-float(len(text.split())) for text in responses]


def vowels(prompts, responses):
    return [float(sum(text.count(x) for x in "aeiou")) for text in responses]
"""
GOOD = {"short": "rewards:short", "vowels": "rewards:vowels"}


@pytest.fixture
def config(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    Path("rewards.py").write_text(REWARDS)
    Path("prompts.txt").write_text("a b c\nd\n")
    return {
        "models": dict(paths),
        "methods": {
            "blend": "base + w_short * (tuned - base) + w_vowels * (ref - base)",
            "mod": "w_short * tuned + w_vowels * ref",
        },
        "rewards": dict(GOOD),
        "prompts": "prompts.txt",
        "weights": 3,
        "kl_to": "base",
        "reference": {"short": -9, "vowels": -1},
        "generation": {"max_new_tokens": 4, "do_sample": True},
    }


def pareto(config: Any, *options: str) -> int:
    Path("pareto.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return cli.main(["pareto", "--config=pareto.yaml", "--output=out", *options])


def test_a_sweep_leaves_its_files_and_goes_on(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert pareto(config) == 0
    said = capsys.readouterr().out
    assert "blend: 3 points" in said
    assert "hypervolume of mod: " in said
    front = Front.load("out/front.json")
    assert [p["weights"]["short"] for p in front.points] == [0.0, 0.5, 1.0] * 2
    assert Path("out/front.png").stat().st_size > 1000
    assert "tap it" in Path("out/front.html").read_text()
    assert pareto(config) == 2
    assert "which has texts.jsonl; give --resume to go on" in capsys.readouterr().err
    written = Path("out/texts.jsonl").read_bytes()
    assert pareto(config, "--resume", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"] == front.points
    assert found["hypervolume"]["mod"]["value"] > 0
    assert Path("out/texts.jsonl").read_bytes() == written
    assert pareto({**config, "seed": 1}, "--resume") == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err


def test_a_reward_model_scores_and_one_reward_is_drawn_over_its_weight(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    config["rewards"] = {"good": save_reward_model(tmp_path / "good")}
    config["methods"] = {"dera": "(1 - w_good) * base + w_good * (0.5 * tuned + 0.5 * ref)"}
    config["weights"] = [{"good": 0.0}, {"good": 1.0}]
    del config["reference"], config["kl_to"]
    config["prompts"] = ["a b", "c"]
    assert pareto(config) == 0, capsys.readouterr().err
    assert len(Front.load("out/front.json").whole("dera")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {}}, "has the key 'model'; the keys are .*; did you mean 'models'?"),
        ({"max_new_tokens": 3}, "what generate takes goes under generation"),
        ({"rewards": None}, "rewards is None; it must be a mapping of names to texts"),
        ({"models": {"base": 3}}, "models.base is 3; it must be a text"),
        ({"methods": {"a": "base + w_shrt * tuned"}}, "methods.a has the unknown name 'w_shrt' "
         "(known: base, ref, tuned, w_short, w_vowels); did you mean 'w_short'?"),
        ({"methods": {"a": "base +"}}, "methods.a is 'base +', which is no formula"),
        ({"methods": {"a": "w_short * base"}}, "models.ref is given, but no formula of methods"),
        ({"kl_to": "w_short * base"}, "kl_to has the unknown name 'w_short'"),
        ({"rewards": {**GOOD, "short": "rewards:shrt"}}, "rewards is 'short=rewards:shrt'"),
        ({"rewards": {**GOOD, "short": "nowhere"}}, "there is no folder 'nowhere'"),
        ({"generation": {"seed": 3}}, "generation.seed is given; it must be the key seed"),
        ({"generation": {"max_tokens": 3}}, "how many new tokens a response may have is"),
        ({"prompts": "none.txt"}, "there is no file 'none.txt'"),
        ({"prompts": []}, "prompts is []; it must be a file or a list of texts"),
        ({"weights": [{"shrt": 1}]}, "weights[0] has 'shrt'; the rewards are short, vowels"),
        ({"chat": "maybe"}, "chat is 'maybe'; it must be true or false"),
        ({"dtype": "half"}, "dtype is 'half'; it must be auto"),
        ({"reference": {"short": 1}}, "reference has no 'vowels'"),
    ],
)  # fmt: skip
def test_mistakes_in_the_settings_are_named(
    change: dict[str, Any],
    message: str,
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    assert pareto({**config, **change}) == 2
    error = capsys.readouterr().err
    at = 0
    for part in message.split(".*"):
        at = error.find(part, at)
        assert at >= 0, error


def test_a_file_without_a_key_or_settings_is_named(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    del config["rewards"]
    assert pareto(config) == 2
    assert "pareto.yaml has no key 'rewards'" in capsys.readouterr().err
    for text, message in (("", "is empty"), ("[1]", "has a list at its top")):
        assert pareto(text) == 2
        assert message in capsys.readouterr().err
