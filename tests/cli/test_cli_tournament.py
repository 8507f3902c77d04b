"""``crossfade generate --tournament``: a judge, or a value, decides which text stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from crossfade.bulk.records import seed_of
from word_models import PROMPTS, TEMPLATE, WORDS, loaded, make_tokenizer, save_model

LETTERS = [*WORDS, "A", "B"]
SEEDS = [seed_of(0, i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("two")
    return {n: save_model(folder / n, seed, LETTERS) for seed, n in enumerate(["policy", "critic"])}


def argv(two: dict[str, str], *more: str) -> list[str]:
    models = [f"--model={name}={path}" for name, path in two.items()]
    return ["generate", *PROMPTS, *models, "--blend=policy", "--max-new-tokens=4", *more]


def term(path: str, **settings: Any) -> cf.Model:
    return cf.Model(loaded(path), tokenizer=make_tokenizer(LETTERS, TEMPLATE), **settings)


def decoded(blend: Any, prompts: list[Any], judge: Any, **more: Any) -> cf.Output:
    search = cf.Tournament(judge, n=3)
    return cf.generate(blend, prompts, search=search, seed=SEEDS, max_new_tokens=4, **more)


def matches(out: cf.Output, request: int) -> list[Any]:
    return [
        [[m.a, m.b, None if m.b is None else pytest.approx(m.prob, abs=1e-6), m.winner] for m in r]
        for r in out.bracket[request]
    ]


def test_a_judge_outside_of_the_blend_decides_as_in_the_library(two, run) -> None:
    found = run(*argv(two, "--judge=critic", "--tournament=3", "--principle=honest", "--n=2"))
    judge = cf.Judge(term(two["critic"]), principles=["honest"])
    out = decoded(term(two["policy"]), PROMPTS, judge, num_return_sequences=2)
    for i, record in enumerate(found):
        rows = range(2 * i, 2 * i + 2)
        assert [x["text"] for x in record["outputs"]] == [out.text[row] for row in rows]
        assert [x["slot"] for x in record["outputs"]] == out.slots[i].tolist()
        values = [x["value"] for x in record["outputs"]]
        assert values == pytest.approx(out.values[i].tolist(), abs=1e-6)
        assert record["bracket"] == matches(out, i)
        assert record["bracket"][-1][0][3] == record["outputs"][0]["slot"]


def test_a_model_may_judge_its_own_texts_without_its_system_prompt(two, run) -> None:
    asked = argv({"policy": two["policy"]}, "--judge=policy", "--tournament=3")
    found = run(*asked, "--system=policy=x y", "--template=ultrafeedback")
    blend = term(two["policy"], system="x y")
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    judge = cf.Judge(term(two["policy"]), template="ultrafeedback")
    out = decoded(blend, chats, judge)
    assert [r["text"] for r in found] == out.text
    assert [r["bracket"] for r in found] == [matches(out, i) for i in range(len(PROMPTS))]


def test_a_blend_may_judge(two, run) -> None:
    judge = cf.Judge(cf.parse("0.5 * a + 0.5 * b", a=term(two["policy"]), b=term(two["critic"])))
    out = decoded(term(two["policy"]), PROMPTS, judge)
    found = run(*argv(two, "--judge=w * policy + 0.5 * critic", "--fader=w=0.5", "--tournament=3"))
    assert [r["text"] for r in found] == out.text


def test_a_value_finds_its_best_of_n(two, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lengths.py").write_text(
        "def own(prompts, responses):\n    return [float(sum(map(ord, r))) for r in responses]\n"
    )
    asked = argv({"policy": two["policy"]}, "--reward=lengths:own")
    found, best = (run(*asked, how) for how in ("--tournament=5", "--best-of=5"))
    assert [r["text"] for r in found] == [r["text"] for r in best]
    assert [r["value"] for r in found] == [r["value"] for r in best]
    assert all(sum(map(len, r["bracket"])) >= 4 for r in found)
    assert all("bracket" not in r and "slot" not in r for r in best)


def test_a_tournament_is_resumed(two, run, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.jsonl"
    asked = argv(two, "--judge=critic", "--tournament=3", f"--output={out}")
    run(*asked)
    lines = out.read_text().splitlines(keepends=True)
    out.write_text(lines[0] + lines[1] + lines[2][:30])
    run(*asked, "--resume")
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["text"] for r in again] == [json.loads(line)["text"] for line in lines]
    for change in ("--template=ultrafeedback", "--principle=honest", "--tournament=4"):
        assert cli.main([*asked, "--resume", change]) == 2
        assert "other settings" in capsys.readouterr().err
    for judge in ("0.5 * critic", "critic + policy"):
        assert cli.main([*asked, "--resume", f"--judge={judge}"]) == 2
        assert "other settings" in capsys.readouterr().err


MISTAKES = {
    "no judge": (["--tournament=3"], "--tournament is given without --judge, --value or --reward"),
    "judge alone": (["--judge=critic"], "--judge is given alone; it compares texts, and --tourna"),
    "judge of a best-of": (
        ["--judge=critic", "--best-of=2"],
        "--judge is given with --best-of, which scores texts; it compares texts",
    ),
    "both": (
        ["--judge=critic", "--value=critic - policy", "--tournament=2"],
        "--judge and --value are both given; one of them decides the matches",
    ),
    "template alone": (["--template=hh"], "--template is given without --judge"),
    "principle of a value": (
        ["--value=critic - policy", "--tournament=2", "--principle=honest"],
        "--principle is given without --judge",
    ),
    "greedy": (
        ["--judge=critic", "--tournament=2", "--greedy"],
        "--greedy is given with a search, which draws",
    ),
    "more than play": (
        ["--judge=critic", "--tournament=2", "--n=3"],
        "--n is 3; it must be at most 2, as --tournament keeps",
    ),
    "stream": (["--judge=critic", "--tournament=2", "--stream"], "--stream and --tournament are"),
    "unknown judge": (
        ["--judge=critc", "--tournament=2"],
        "--judge has the unknown name 'critc' (known: critic, policy); did you mean 'critic'?",
    ),
    "a judge that is no model": (
        ["--judge=zebra", "--tournament=2"],
        "(known: critic, policy); a judge is a model: --model zebra=PATH",
    ),
    "a folder": (
        ["--judge={critic}", "--tournament=2"],
        "a folder; it must be a formula: --model judge=",
    ),
    "template": (["--judge=critic", "--tournament=2", "--template=h"], "--template is 'h'; it mu"),
    "no chat template": (
        ["--judge=bare", "--tournament=2", "--model=bare={bare}", "--blend=policy + 0 * critic"],
        "--judge bare is a model whose tokenizer has no chat template",
    ),
    "reward as the judge": (
        ["--judge=f", "--tournament=2", "--reward=f=operator:add"],
        "--judge and --reward are both given",
    ),
    "a model that nothing uses": (
        ["--tournament=2", "--judge=policy"],
        "--model critic=... is given, but --blend 'policy' and --judge 'policy' do not use it",
    ),
    "too many": (
        ["--judge=critic", "--tournament=2000"],
        "n is 2000; it must be at most 1024 rows a prompt",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence(two, tmp_path: Path, capsys, name: str) -> None:
    given, message = MISTAKES[name]
    bare = str(tmp_path / "bare")
    if any("{bare}" in x for x in given):
        save_model(tmp_path / "bare", 0, LETTERS, template="")
    options = [x.format(**two, bare=bare) for x in given]
    assert cli.main([*argv(two)[:1], "a", *argv(two)[len(PROMPTS) + 1 :], *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_a_lines_own_fader_is_refused_where_the_judge_has_it(two, tmp_path: Path, capsys) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "weights": {"w": 1}}\n')
    asked = [x for x in argv(two) if x not in PROMPTS]
    asked += [f"--prompts={file}", "--judge=w * critic", "--fader=w=0.5", "--tournament=2"]
    assert cli.main(asked) == 2
    said = capsys.readouterr().err
    assert "prompt 0: weights has 'w', which --judge uses; it is one for all" in said


def test_the_suggested_blend_has_no_judge(two, capsys) -> None:
    asked = [x for x in argv(two, "--judge=critic", "--tournament=2") if x != "--blend=policy"]
    assert cli.main(asked) == 2
    assert "a formula of their names, such as 'policy'" in capsys.readouterr().err
