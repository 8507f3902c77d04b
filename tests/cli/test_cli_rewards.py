"""Values of searches: reward models and Python functions, alone, and in formulas with others."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from crossfade.bulk.records import seed_of
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast
from word_models import PROMPTS, loaded, save_reward_model

CODE = """
LIKED = "a"

def score(prompts, responses):
    return [float(r.count(LIKED)) - 0.01 * len(p) for p, r in zip(prompts, responses)]

def broken(prompts, responses):
    return [1 / 0 for _ in prompts]

def short(prompts, responses):
    return [0.0]

def one(prompts):
    return [0.0]

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module of rewards, which is no place of Python's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "my_rewards.py").write_text(CODE)
    return tmp_path


@pytest.fixture
def argv(paths: dict[str, str]) -> list[str]:
    models = [f"--model={name}={paths[name]}" for name in ("base", "tuned")]
    return ["generate", *PROMPTS, *models, "--blend=base + 0*tuned", "--max-new-tokens=6"]


def expected(paths: dict[str, str], value: Any, search: Any = None) -> cf.Output:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths["base"])
    base = cf.Model(loaded(paths["base"]), tokenizer=tokenizer, name="base")
    out = cf.generate(
        base,
        PROMPTS,
        search=search or cf.BestOfN(4, value),
        seed=[seed_of(0, i) for i in range(len(PROMPTS))],
        max_new_tokens=6,
    )
    assert isinstance(out, cf.Output)
    return out


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [r.count("a") - 0.01 * len(p) for p, r in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize("how", ["alone", "by its name", "by another"])
def test_a_function_is_a_value(here: Path, argv: list[str], paths, run, how: str) -> None:
    options = {
        "alone": ["--reward=my_rewards:score"],
        "by its name": ["--reward=my_rewards:score", "--value=1 * score"],
        "by another": ["--reward=liked=my_rewards:score", "--value=liked"],
    }
    found = run(*argv, *options[how], "--best-of=4")
    out = expected(paths, cf.Reward(score))
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist())
    assert [r["text"] for r in found] == out.text


def reward_model(path: str, label: int | None = None) -> cf.RewardModel:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    model = LlamaForSequenceClassification.from_pretrained(path).eval()
    return cf.RewardModel(model, tokenizer, label=label)


@pytest.mark.parametrize(("classes", "chosen"), [(["score"], ""), (["bad", "good"], "@good")])
def test_a_reward_model_is_a_value(
    here: Path, argv: list[str], paths, run, classes: list[str], chosen: str
) -> None:
    path = save_reward_model(here / "judge", classes)
    value = reward_model(path, 1 if chosen else None)
    judge = f"--model=judge={path}{chosen}"
    found = run(*argv, judge, "--value=judge", "--search=2,2,3")
    out = expected(paths, None, cf.ChunkBeamSearch(2, 2, 3, value))
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist(), rel=1e-4)
    assert [r["text"] for r in found] == out.text


def test_a_formula_of_values_of_all_kinds(here: Path, argv: list[str], paths, run) -> None:
    path = save_reward_model(here / "judge")
    options = [f"--model=judge={path}", "--reward=my_rewards:score", "--fader=w=2", "--best-of=4"]
    found = run(*argv, *options, "--value=w * judge - 0.5 * score + 0.1 * (tuned - base)")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths["base"])
    tuned, base = (cf.Model(loaded(paths[n]), tokenizer=tokenizer) for n in ("tuned", "base"))
    value = 2 * reward_model(path) - 0.5 * cf.Reward(score) + 0.1 * cf.LogRatio(tuned, base)
    out = expected(paths, value)
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist(), rel=1e-4)


def test_resume_knows_the_code_of_a_reward(
    here: Path, argv: list[str], run, capsys: pytest.CaptureFixture[str]
) -> None:
    argv += ["--reward=my_rewards:score", "--best-of=2", "--output=out.jsonl"]
    run(*argv)
    run(*argv, "--resume")
    sys.modules.pop("my_rewards")
    (here / "my_rewards.py").write_text(CODE.replace('"a"', '"bb"'))
    assert cli.main([*argv, "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("my_rewards:broken", "the reward broken failed (ZeroDivisionError: division by zero)"),
        ("my_rewards:short", "short returned 1 scores; it must return"),
        ("my_rewards:scor", "my_rewards has no 'scor'; did you mean 'score'?"),
        ("my_rewards:number", "my_rewards has no function 'number'"),
        ("my_rewards:one", "with two lists, and cannot be: too many positional arguments"),
        ("needs:score", "needs cannot be imported: No module named 'not_installed'"),
        ("wrong:score", "wrong cannot be imported: SyntaxError"),
    ],
)
def test_mistakes_in_rewards(
    here: Path, argv: list[str], capsys: pytest.CaptureFixture[str], place: str, problem: str
) -> None:
    (here / "needs.py").write_text("import not_installed\n")
    (here / "wrong.py").write_text("def score(:\n")
    assert cli.main([*argv, f"--reward={place}", "--best-of=2"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("crossfade generate: error: ")
    assert problem in error


def test_a_value_that_is_a_path_is_named_first(
    here: Path, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    save_reward_model(here / "judge")
    assert cli.main([*argv, "--value=./judge", "--best-of=2"]) == 2
    error = capsys.readouterr().err
    assert "--value is './judge', a folder; it must be a formula: --model reward=./judge" in error
