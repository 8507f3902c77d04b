"""``crossfade correct`` writes the library's corrections, as lines that a later run completes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import cli
from crossfade.bulk.records import number, seed_of
from crossfade.policies import metaaligner
from word_models import PROMPTS, loaded, make_tokenizer, save_model

LINES: list[dict[str, Any]] = [
    {"id": "one", "prompt": "a b c", "answer": "d e"},
    {"prompt": "g", "answer": "h i j", "objectives": {"own": "k l"}},
    {"messages": [{"role": "user", "content": "l m"}], "answer": "n", "objectives": ["brevity"]},
    {"prompt": "q r", "answer": "s", "metadata": {"x": 1}},
    {"prompt": "t", "answer": " "},
    {"prompt": "u", "answer": "v w"},
]
SETS: list[Any] = [
    {"x": "y z"}, {"own": "k l"}, ["brevity"], {"x": "y z"}, {"x": "y z"}, {"x": "y z"}
]  # fmt: skip
HOW = ["--objective", "x=y z", "--max-new-tokens", "5", "--sample"]


def write(file: Path, lines: list[Any]) -> str:
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(file)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "answers.jsonl", LINES)


def corrected(path: str, answers: Any, lines: list[dict[str, Any]], **asked: Any) -> Any:
    """The library's corrections of lines."""
    aligner = cf.MetaAligner(loaded(path), make_tokenizer_of_words())
    queries = [x.get("prompt") or x["messages"] for x in lines]
    seeds = [seed_of(0, i) for i in range(len(lines))]
    return cf.correct(
        aligner, queries, answers, SETS, seed=seeds, max_new_tokens=5, do_sample=True, **asked
    )


def make_tokenizer_of_words() -> Any:
    from word_models import WORDS

    return make_tokenizer(WORDS)


@pytest.mark.filterwarnings("ignore:query 4 was not", "default:line 4 was not corrected")
def test_lines_are_the_librarys_corrections(
    paths, run, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["correct", data, f"--aligner={paths['base']}", *HOW, "--rounds=2", "--batch-size=3"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    found = [json.loads(line) for line in printed.out.splitlines()]
    out = corrected(paths["base"], [x["answer"] for x in LINES], LINES, rounds=2)
    assert [r["index"] for r in found] == list(range(6))
    assert [r["text"] for r in found] == out.text
    assert [r["rounds"] for r in found] == [list(x) for x in zip(*out.rounds, strict=True)]
    assert [r["unchanged"] for r in found] == out.unchanged.tolist()
    assert [r["edit_distance"] for r in found] == pytest.approx(out.edit_distance.tolist())
    assert [r["tokens"] for r in found] == out.lengths.tolist()
    assert [r["answer"] for r in found] == [x["answer"] for x in LINES]
    assert found[0]["objectives"] == {"x": "y z"}
    assert found[0]["id"] == "one"
    assert found[1]["objectives"] == {"own": "k l"}
    assert [r["failed"] for r in found] == [None] * 4 + ["its answer is ' ', without a word", None]
    assert "warning: line 4 was not corrected: its answer is ' ', without a word" in printed.err
    assert "6 answers (1 failed), " in printed.err


@pytest.mark.filterwarnings("ignore:line 4 was not corrected")
def test_a_file_is_completed(paths, run, data: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "out.jsonl"
    argv = ["correct", data, f"--aligner={paths['base']}", *HOW, "--output", str(file)]
    run(*argv)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], lines[5][:30]]))
    run(*argv, "--resume")
    assert file.read_text() == "".join(lines)
    for change in ("--rounds=2", "--seed=3", "--query-noun=query"):
        assert cli.main([*argv, "--resume", change]) == 2
        assert "other settings" in capsys.readouterr().err
    assert cli.main([*argv[:3], "--objective=x=z", *argv[5:], "--resume"]) == 2
    assert "not what prompt 0 has of its own" in capsys.readouterr().err


def test_a_policy_writes_the_answers(paths, run, tmp_path: Path) -> None:
    data = write(tmp_path / "queries.jsonl", [{"prompt": p} for p in PROMPTS])
    argv = ["correct", data, f"--aligner={paths['base']}", f"--policy={paths['tuned']}", *HOW]
    found = run(*argv)
    words = make_tokenizer_of_words()
    policy = cf.Model(loaded(paths["tuned"]), tokenizer=words)
    out = cf.correct(
        cf.MetaAligner(loaded(paths["base"]), words), PROMPTS, policy, {"x": "y z"},
        seed=[seed_of(0, i) for i in range(4)], max_new_tokens=5, do_sample=True,
        policy_generation={"do_sample": True},
    )  # fmt: skip
    assert [r["answer"] for r in found] == out.answers
    assert [r["text"] for r in found] == out.text
    assert run(*argv, "--batch-size=1") == found


def test_a_function_accepts(paths, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "correct_rewards.py").write_text("def never(p, r): return [0.0] * len(r)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    data = write(tmp_path / "answers.jsonl", LINES[:2])
    argv = ["correct", data, f"--aligner={paths['base']}", *HOW]
    found = run(*argv, "--reward=correct_rewards:never", "--accept=never")
    assert [r["text"] for r in found] == ["d e", "h i j"]
    assert [r["scores"] for r in found] == [[0.0, 0.0]] * 2


def test_objectives_come_from_a_file(paths, run, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("x: y z\nbrevity: a b\n")
    data = write(tmp_path / "answers.jsonl", LINES[:1])
    argv = ["correct", data, f"--aligner={paths['base']}", "--greedy", "--objective=x"]
    (found,) = run(*argv, "--objective=brevity", f"--objectives-file={tmp_path / 'own.yaml'}")
    assert found["objectives"] == {"x": "y z", "brevity": "a b"}


def test_a_policy_writes_the_answers_that_lines_lack(paths, run, tmp_path: Path) -> None:
    lines = [{"prompt": p} for p in PROMPTS]
    some = [lines[0], {**lines[1], "answer": "d e"}, {**lines[2], "answer": "h"}, lines[3]]
    argv = [f"--aligner={paths['base']}", f"--policy={paths['tuned']}", *HOW]
    found = run("correct", write(tmp_path / "some.jsonl", some), *argv)
    written = run("correct", write(tmp_path / "none.jsonl", lines), *argv)
    given = run("correct", write(tmp_path / "all.jsonl", some[1:3]), *argv[:1], *HOW)
    assert [found[0]["answer"], found[3]["answer"]] == [written[i]["answer"] for i in (0, 3)]
    assert [found[0], found[3]] == [written[0], written[3]]
    assert [found[i]["answer"] for i in (1, 2)] == [x["answer"] for x in given] == ["d e", "h"]


REWARD = "def short(p, r): return [-len(x) for x in r]\n"


@pytest.mark.filterwarnings("ignore:(line|query) .* the aligner wrote ''")
@pytest.mark.parametrize(
    ("how", "search"),
    [
        (["--best-of=3", "--reward=correct_short:short"], lambda v, _: cf.BestOfN(3, v)),
        (
            ["--search=2,2,2", "--reward=correct_short:short", "--model=tuned={tuned}",
             "--value=short + 0.5 * (tuned - aligner)"],
            lambda v, ratio: cf.ChunkBeamSearch(2, 2, 2, v + 0.5 * ratio),
        ),
        (["--tournament=4", "--reward=correct_short:short"], lambda v, _: cf.Tournament(v, 4)),
        (["--n=2"], lambda *_: None),
        (["--n=2", "--best-of=3", "--reward=x=correct_short:short", "--accept=x"],
         lambda v, _: cf.BestOfN(3, v)),
    ],
)  # fmt: skip
def test_searches_are_the_librarys(
    how: list[str], search: Any, paths, run, data: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "correct_short.py").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))

    def short(p: list[Any], r: list[str]) -> list[float]:
        return [-float(len(x)) for x in r]

    lines = LINES[:4]
    options = [o.format(tuned=paths["tuned"]) for o in how]
    data = write(tmp_path / "four.jsonl", lines)
    found = run("correct", data, f"--aligner={paths['base']}", *HOW, *options)
    tuned, base = (cf.Model(loaded(paths[x])) for x in ("tuned", "base"))
    aligner = cf.MetaAligner(base, make_tokenizer_of_words())
    n = 2 if "--n=2" in how else 1
    out = cf.correct(
        aligner, [x.get("prompt") or x["messages"] for x in lines], [x["answer"] for x in lines],
        SETS[:4], seed=[seed_of(0, i) for i in range(4)], max_new_tokens=5, do_sample=True,
        search=search(cf.Reward(short), cf.LogRatio(tuned, base)), num_return_sequences=n,
        accept=short if "--accept=x" in how else None,
    )  # fmt: skip
    each = [x for r in found for x in (r["outputs"] if n > 1 else [r])]
    assert [x["text"] for x in each] == out.text
    assert [x["tokens"] for x in each] == out.lengths.tolist()
    if out.values is not None:
        assert [x["value"] for x in each] == pytest.approx(out.values.flatten().tolist(), abs=1e-4)
    if out.scores is not None:
        found_scores = [[number(s) for s in scores] for scores in out.scores]
        assert [x["scores"] for x in each] == found_scores
    if out.bracket is not None:
        assert [r["bracket"] for r in found] == [
            [[list(m) for m in matches] for matches in rounds] for rounds in out.bracket
        ]


@pytest.mark.filterwarnings("ignore:line 4 was not corrected")
def test_ctrl_c_loses_no_line_that_had_ended(
    paths, run, data: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.jsonl"
    argv = ["correct", data, f"--aligner={paths['base']}", *HOW, f"--output={file}"]
    run(*argv)
    whole = file.read_text()
    file.unlink()
    correct = metaaligner.correct

    def cut(*args: Any, **options: Any) -> cf.Corrections:
        """Interrupted in the second batch, when one of its rows had ended."""
        out = correct(*args, **options)
        if args[1][0] == LINES[0]["prompt"]:
            return out
        ended = torch.tensor([False, False, True])
        return replace(out, ended=ended, stats=replace(out.stats, interrupted=True))

    monkeypatch.setattr(metaaligner, "correct", cut)
    assert cli.main([*argv, "--batch-size=3"]) == 130
    assert "interrupted" in capsys.readouterr().err
    lines = whole.splitlines(keepends=True)
    assert file.read_text() == "".join([*lines[:3], lines[5]])
    monkeypatch.undo()
    run(*argv, "--resume")
    assert sorted(file.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("lines", "argv", "says"),
    [
        (LINES, ["--objective=brevty"], "did you mean 'brevity'?"),
        (LINES, [], 'query 0 has no "objectives", and no --objective is given'),
        (LINES, ["--objective=x=y", "--objective=x=z"], "--objective 'x' is given twice"),
        ([{"prompt": "a"}], ["--objective=brevity"], 'query 0 has the "answer" None; it must be'),
        (LINES, ["--objective=brevity", "--policy=none"], 'and all lines have an "answer"'),
        ([{"prompt": "a", "response": "b"}], ["--objective=x=y"], "key 'response'; did you mean"),
        ([{**LINES[0], "objective": "x"}], ["--objective=x=y"], "did you mean 'objectives'?"),
        (LINES, ["--objective=brevity", "--fader=w=1"], "--fader w=... is given, but no formula"),
        (
            [{"prompt": "a", "answer": 3}],
            ["--objective=x=y"],
            'query 0 has the "answer" 3; it must',
        ),
        ([{"prompt": "a", "answer": "\ud800"}], ["--objective=x=y"], "half of a surrogate pair"),
        (
            LINES,
            ["--objective=brevity", "--best-of=2"],
            "--best-of is given without --value, --reward",
        ),
        (LINES, ["--objective=brevity", "--value=a"], "--value is given without --best-of, --sea"),
        (LINES, ["--objective=brevity", "--n=2", "--greedy"], "--greedy and --n 2 are both given"),
        (LINES, ["--objective=brevity", "--n=3", "--best-of=2", "--reward=a:b"], "--n is 3; it mu"),
        (
            LINES,
            ["--objective=brevity", "--model=x=none"],
            "--model x=... is given, but no formula",
        ),
        ([{**LINES[0], "aswer": 1}], ["--objective=x=y"], "query 0 has the unknown key 'aswer'"),
        ([{**LINES[0], "objectives": ["k"]}], [], "objectives of query 0 has 'k'"),
        (
            LINES,
            ["--objective=brevity", "--accept=x:y"],
            "a function is named by --reward NAME=x:y",
        ),
        (LINES, ["--objective=brevity", "--query-noun="], "noun is ''; it must be a word"),
        (LINES, ["--objective=brevity", "--keep=text"], "--keep is 'text', which results have"),
        ([], ["--objective=brevity"], "there is nothing to correct"),
    ],
)
def test_mistakes_are_said_before_a_model_is_loaded(
    lines: list[Any], argv: list[str], says: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write(tmp_path / "answers.jsonl", lines)
    assert cli.main(["correct", data, "--aligner=none", *argv]) == 2
    assert says in capsys.readouterr().err


def test_one_model_with_two_adapters_is_loaded_once(
    tmp_path: Path, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossfade.models import load

    path, calls = save_model(tmp_path / "model", 3), []
    monkeypatch.setattr("crossfade.models.load", lambda *args: calls.append(args) or load(*args))
    data = write(tmp_path / "queries.jsonl", [{"prompt": "a b"}])
    run("correct", data, f"--aligner={path}", f"--policy={path}", *HOW)
    assert len(calls) == 1
