"""``crossfade judge``: the library's judgments, as lines that a later run completes."""

from __future__ import annotations

import io
import json
import os
import select
import struct
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli, progress
from crossfade.policies.self_judge import Judge, JudgeTemplate
from judge_pairs import LETTERS, PAIRS, write
from word_models import loaded, make_tokenizer, save_model

FORM = JudgeTemplate(labels=("a", "b"), principles={"kind": "c d", "brief": "e"}, system=None)
FORM_YAML = "labels: [a, b]\nprinciples: {kind: c d, brief: e}\nsystem: null\n"
FAILED = pytest.mark.filterwarnings("default:pair . was not judged")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("judge") / "model", 1, LETTERS)


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write(tmp_path / "pairs.jsonl", PAIRS)


def judged(path: str, pairs: list[dict[str, Any]], **asked: Any) -> Any:
    """The library's judgments of pairs."""
    judge = Judge(loaded(path), make_tokenizer(LETTERS), **asked)
    answers = [("chosen", "rejected") if "chosen" in p else ("first", "second") for p in pairs]
    return judge(
        [p.get("prompt") or p["messages"] for p in pairs],
        [p[a] for p, (a, _) in zip(pairs, answers, strict=True)],
        [p[b] for p, (_, b) in zip(pairs, answers, strict=True)],
    )


def whole_lines(text: str) -> list[dict[str, Any]]:
    """JSON lines, in which nothing is NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@FAILED
def test_lines_have_the_librarys_figures(model, data, run) -> None:
    found = whole_lines(run("judge", data, f"--model={model}", "--batch-size=3", lines=False))
    expected = judged(model, PAIRS)
    assert [r["index"] for r in found] == list(range(len(PAIRS)))
    assert [r["answers"] for r in found[:2]] == [["d e", "f"], ["h i j", "k"]]
    assert (found[0]["id"], found[3]["metadata"]) == ("one", {"x": 1})
    for i, record in enumerate(found):
        if i == 4:
            continue
        assert record["failed"] is None
        for name in ("first", "second", "preference"):
            assert record[name] == pytest.approx(float(getattr(expected, name)[i]), abs=1e-6)
        assert "principles" not in record
    assert [r["winner"] for r in found] == [
        None if bad else "tie" if p == 0.5 else "first" if p > 0.5 else "second"
        for p, bad in zip(expected.preference.tolist(), expected.failed.tolist(), strict=True)
    ]
    assert found[5]["winner"] == "tie"
    assert {i: r["correct"] for i, r in enumerate(found) if "correct" in r} == {
        i: None if i == 4 else bool(expected.preference[i] > 0.5) for i in (0, 3, 4, 6)
    }
    failed = found[4]
    assert failed["failed"] == "its first answer is ' ', without a word"
    for name in ("first", "second", "preference", "winner", "orders", "correct"):
        assert failed[name] is None


@FAILED
def test_principles_and_a_template_of_ones_own(model, data, run, tmp_path: Path) -> None:
    form = tmp_path / "form.yaml"
    form.write_text(FORM_YAML)
    argv = ["judge", data, f"--model={model}", f"--template={form}"]
    found = run(*argv, "--principle=brief", "--principle=new=f g")
    expected = judged(model, PAIRS, template=FORM, principles={"brief": "e", "new": "f g"})
    for i in (0, 1, 2, 3, 5, 6):
        assert list(found[i]["principles"]) == ["brief", "new"]
        each = [x for pair in found[i]["principles"].values() for x in pair]
        assert each == pytest.approx(expected.by_principle[i].flatten().tolist(), abs=1e-6)
    assert found[4]["principles"] is None
    form.with_suffix(".json").write_text(
        json.dumps({"labels": ["a", "b"], "principles": FORM.principles, "system": None})
    )
    argv[-1] = f"--template={form.with_suffix('.json')}"
    again = run(*argv, "--principle=brief", "--principle=new=f g")
    assert again == found, "the run has the same identity too"


def test_every_form_of_an_answer(model, run, tmp_path: Path, monkeypatch) -> None:
    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    def asked(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    forms = [
        {"messages": asked("a b"), "chosen": "c d", "rejected": "e"},
        {"prompt": asked("a b"), "chosen": said("c d"), "rejected": said("e")},
        {"chosen": asked("a b") + said("c d"), "rejected": asked("a b") + said("e")},
        {
            "prompt": "a b",
            "chosen": asked("a b") + said("c d"),
            "rejected": asked("a b") + said("e"),
        },
    ]
    file = write(tmp_path / "forms.jsonl", forms)
    found = run("judge", file, f"--model={model}")
    assert {json.dumps([r["prompt"], r["answers"], r["orders"]]) for r in found} == {
        json.dumps([asked("a b"), ["c d", "e"], found[0]["orders"]])
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO(Path(file).read_text()))
    assert run("judge", "-", f"--model={model}") == found


@FAILED
def test_figures_about_all_pairs(model, data, run, capsys, tmp_path: Path) -> None:
    expected = judged(model, PAIRS)
    labelled = judged(model, [p for p in PAIRS if "chosen" in p])
    out = tmp_path / "out.jsonl"
    (figures,) = run("judge", data, f"--model={model}", "--json", f"--output={out}")
    assert len(out.read_text().splitlines()) == len(PAIRS)
    assert (figures["pairs"], figures["failed"], figures["labelled"]) == (7, 1, 3)
    assert figures["position_bias"] == expected.position_bias
    assert figures["toward"]["A"] == expected.toward_first
    assert sum(figures["toward"].values()) == pytest.approx(expected.position_bias)
    assert figures["tokens_read"] == sum(m.tokens for m in expected.stats.models) > 0
    accuracy, interval = labelled.accuracy([True] * 4)
    assert (figures["accuracy"], figures["accuracy_interval"]) == (accuracy, interval)
    assert run("judge", data, f"--model={model}", "--json")[0]["run"] == figures["run"]
    cli.main(["judge", data, f"--model={model}"])
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("pair 4 was not judged: its first answer is ' ', without a word")
    assert said[-1].startswith(
        f"7 pairs (1 failed), the order alone decides {expected.position_bias:.1%} ("
    )
    assert f"), accuracy {accuracy:.1%} ± {interval:.1%} of 3, " in said[-1]


@FAILED
def test_figures_of_nothing_that_could_be_judged(model, run, capsys, tmp_path: Path) -> None:
    data = write(tmp_path / "empty.jsonl", [{"prompt": "a", "first": "", "second": "b"}])
    assert cli.main(["judge", data, f"--model={model}", "--json"]) == 0
    (figures,) = whole_lines(capsys.readouterr().out)
    assert figures["position_bias"] is figures["accuracy"] is None
    assert cli.main(["judge", data, f"--model={model}"]) == 0
    assert "\n1 pair (1 failed), " in capsys.readouterr().err


@FAILED
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 6])
def test_resuming_gives_the_same_file_and_figures(
    model, data, run, tmp_path: Path, kept: int
) -> None:
    out = tmp_path / "out.jsonl"
    argv = ["judge", data, f"--model={model}", "--batch-size=3", f"--output={out}", "--json"]
    (first,) = run(*argv)
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])  # as a crash may leave it
    (again,) = run(*argv, "--resume")
    assert out.read_bytes() == b"".join(lines)
    changes = {"kept": kept, "seconds": again["seconds"], "tokens_read": again["tokens_read"]}
    assert again == {**first, **changes}


@FAILED
def test_an_interrupt_keeps_the_batches_that_are_done(
    model, data, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole, call, calls = tmp_path / "out.jsonl", tmp_path / "whole.jsonl", Judge.__call__, []

    def interrupted(self: Judge, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, *arguments)

    argv = ["judge", data, f"--model={model}", "--batch-size=2"]
    run(*argv, f"--output={whole}")
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "__call__", interrupted)
        assert cli.main([*argv, f"--output={out}"]) == 130
    assert [r["index"] for r in whole_lines(out.read_text())] == [0, 1, 2, 3]
    run(*argv, f"--output={out}", "--resume")
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--template=ultrafeedback"], "not the blend or a setting"),
        (["--principle=honest", "--principle=helpful"], "not the blend or a setting"),
        (["--principle=helpful=kind"], "not the blend or a setting"),
        (["--blend=2 * model"], "not the blend or a setting"),
        ([], "not what prompt 0 has of its own"),
    ],
)
def test_another_run_is_refused(
    model, run, capsys, tmp_path: Path, change: list[str], says: str
) -> None:
    out, pair = tmp_path / "out.jsonl", {"prompt": "a", "first": "b", "second": "c"}
    argv = ["judge", write(tmp_path / "pair.jsonl", [pair]), f"--model={model}", f"--output={out}"]
    principles = ["--principle=helpful", "--principle=honest"]
    run(*argv, *principles)
    before = out.read_bytes()
    if not change:
        write(tmp_path / "pair.jsonl", [{**pair, "second": "d"}])
    changed = change if any("principle" in x for x in change) else [*principles, *change]
    if any("ultra" in x for x in change):
        changed = [*change, "--principle=helpful=helpful", "--principle=honest=honest"]
    assert cli.main([*argv, *changed, "--resume"]) == 2
    assert says in capsys.readouterr().err
    assert out.read_bytes() == before


LOST: dict[str, Any] = {
    "orders": [(), None, "x", [[1]], [[[0.1, 0.2]] * 2] * 2, [[["a", "b"]] * 2]],
    "failed": [(), "its first answer is ''", 3],
}


@pytest.mark.parametrize(("key", "x"), [(key, x) for key, each in LOST.items() for x in each])
def test_a_file_that_lost_what_the_figures_are_made_of(
    model, run, capsys, tmp_path: Path, key: str, x: Any
) -> None:
    """It is refused before anything is judged or written."""
    out = tmp_path / "out.jsonl"
    data = write(tmp_path / "pair.jsonl", [{"prompt": "a", "first": "b", "second": "c"}])
    run("judge", data, f"--model={model}", f"--output={out}")
    record = json.loads(out.read_text())
    if x == ():
        del record[key]
    else:
        record[key] = x
    write(out, [record])
    data = write(tmp_path / "pair.jsonl", [{"prompt": "a", "first": "b", "second": "c"}] * 2)
    before = out.read_bytes()
    assert cli.main(["judge", data, f"--model={model}", f"--output={out}", "--resume"]) == 2
    assert (
        "line 1: is not a result that crossfade has written; take the line out"
        in capsys.readouterr().err
    )
    assert out.read_bytes() == before


def test_the_bar_shares_a_terminal_with_lines(model, tmp_path, monkeypatch) -> None:
    pty = pytest.importorskip("pty")  # Windows has none of these modules.
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    data = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "first": "b", "second": "c"}] * 4)
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(side, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(progress, "DELAY", 0)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        assert cli.main(["judge", data, f"--model={model}", "--batch-size=2"]) == 0
        terminal.flush()
        written = b""
        while select.select([main], [], [], 0)[0]:  # A read gives a part of it.
            written += os.read(main, 1 << 16)
        shown = written.decode()
    os.close(main)
    assert "4/4" in shown
    lines = [piece for line in shown.splitlines() for piece in line.split("\r")]
    assert sum(piece.lstrip("\x1b[A").startswith('{"index"') for piece in lines) == 4


def test_the_judge_is_public() -> None:
    assert cf.Judge is Judge
