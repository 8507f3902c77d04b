"""``crossfade generate`` and ``correct`` by a draft: the same lines, which say what it guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from crossfade import cli
from word_models import PROMPTS, trio

WRITES = ["--sample", "--max-new-tokens=9"]
# Of the three models of `trio`: what guesses, and how many tokens at a time.
DRAFTS = [
    ["--draft=prompt"],
    ["--draft=prompt", "--draft-length=4"],
    ["--draft=base", "--draft-length=4"],
    ["--draft=base + 0.8 * (tuned - ref)", "--draft-length=auto"],
]


def without(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines without what a draft adds, and without log-probs, which may differ by a rounding."""
    return [{k: x for k, x in r.items() if k not in ("tokens_by_draft", "logprob")} for r in found]


@pytest.mark.parametrize("draft", DRAFTS, ids=" ".join)
def test_texts_are_the_same(paths, run, draft: list[str]) -> None:
    common = ["generate", *PROMPTS, *trio(paths), *WRITES]
    plain, found = run(*common), run(*common, *draft)
    assert "tokens_by_draft" not in plain[0]
    assert without(found) == without(plain), "also the run, which a draft does not change"
    for r in found:
        assert 0 <= r["tokens_by_draft"] < r["tokens"]
    if "tuned" in draft[0]:  # It is the blend, and draws with the same noise.
        assert any(r["tokens_by_draft"] for r in found)


def test_what_was_guessed_is_said(paths, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", *PROMPTS, *trio(paths), *WRITES]
    draft = ["--draft=base + 0.8 * (tuned - ref)", "--draft-length=4"]
    assert cli.main([*common, *draft]) == 0
    printed = capsys.readouterr()
    right = sum(json.loads(line)["tokens_by_draft"] for line in printed.out.splitlines())
    assert f"tokens/s; 100% of {right} guessed tokens were drawn, in " in printed.err
    assert cli.main(common) == 0
    assert "guessed" not in capsys.readouterr().err
    short = ["generate", "a", f"--model={paths['base']}", "--max-new-tokens=1", "--draft=prompt"]
    assert cli.main(short) == 0
    assert "; no token was guessed" in capsys.readouterr().err, "the last one is read by nobody"


def test_texts_of_prompts_and_streams(paths, run, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["generate", "a b c", *trio(paths), *WRITES]
    draft = ["--draft=tuned", "--draft-length=4"]
    several = run(*common, "--n=3", *draft)[0]["outputs"]
    assert without(several) == without(run(*common, "--n=3")[0]["outputs"])
    assert all("tokens_by_draft" in x for x in several)
    streamed = run(*common, "--stream", *draft, lines=False)
    assert streamed == run(*common, "--stream", lines=False)


def test_a_run_is_gone_on_with_by_another_draft(paths, run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    common = ["generate", *PROMPTS, *trio(paths), *WRITES, f"--output={file}"]
    run(*common)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    run(*common, "--resume", "--draft=prompt", "--draft-length=4")
    found = list(map(json.loads, file.read_text().splitlines()))
    assert without(found) == without(list(map(json.loads, lines)))
    assert ["tokens_by_draft" in r for r in found] == [False, False, True, True]


CORRECTED = [["--draft=answer"], ["--draft=answer", "--draft-length=4"], ["--draft=prompt"]]
CORRECTED += [["--draft=aligner", "--draft-length=4"], ["--model=small={tuned}", "--draft=small"]]


@pytest.fixture
def data(tmp_path: Path) -> str:
    lines = [{"prompt": "a b c", "answer": "d e"}, {"prompt": "g", "answer": "h i j"}]
    (tmp_path / "answers.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    return str(tmp_path / "answers.jsonl")


@pytest.mark.parametrize("draft", CORRECTED, ids=" ".join)
def test_corrections_are_the_same(
    paths, run, data: str, draft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["correct", data, f"--aligner={paths['base']}", "--objective=x=y z", *WRITES]
    plain = run(*common, "--rounds=2")
    assert cli.main([*common, "--rounds=2", *(x.format(**paths) for x in draft)]) == 0
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    assert without(found) == without(plain)
    assert all("tokens_by_draft" in r for r in found)
    assert "guessed" in printed.err


MISTAKES = [
    (["--draft=promt"], "--draft has the unknown name 'promt' (known: base, small); did you mean"),
    (["--draft=tiny"], "(known: base, small); a draft is a model: --model tiny=PATH"),
    (["--draft={base}"], "a folder; it must be a formula: --model small={base} --draft small"),
    (["--draft-length=4"], "--draft-length is given without --draft, which says what guesses"),
    (["--draft=prompt", "--draft-length=0"], "'0' must be a number from 1 to 64, or auto"),
    (["--draft=prompt", "--draft-length=x"], "'x' must be a number from 1 to 64, or auto"),
    (["--model=prompt={base}", "--draft=prompt"], "--draft is 'prompt', and a --model has that"),
    (["--draft=small +"], "--draft: invalid syntax"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=[m[1][:30] for m in MISTAKES])
def test_mistakes(paths, options: list[str], message: str, capsys: Any) -> None:
    models = [f"--model=base={paths['base']}", f"--model=small={paths['tuned']}"]
    argv = ["generate", "a", *models, "--blend=base + small"]
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(cli.main([*argv, *(x.format(**paths) for x in options)]))
    assert stop.value.code == 2
    assert message.format(**paths) in " ".join(capsys.readouterr().err.split())
