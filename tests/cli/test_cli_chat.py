"""``crossfade chat``: its answers are the library's, faders move, and nothing is read twice."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from crossfade.bulk.records import seed_of
from crossfade.cli import chat
from crossfade.cli.main import parser
from crossfade.cli.streaming import Printer
from crossfade.decoding import generation
from transformers import PreTrainedTokenizerFast
from word_models import loaded, save_model, trio

FADED = ["--blend=base + w * (tuned - ref)", "--fader=w=0.5", "--max-new-tokens=4", "--sample"]


@pytest.fixture
def talk(
    paths: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Gives messages to a chat, typed at a terminal or not, and gives back what it prints and says,
    and all its outputs."""
    outputs: list[cf.Output] = []
    generate = generation.generate

    def kept(*args: Any, **options: Any) -> Any:
        outputs.append(generate(*args, **options))
        return outputs[-1]

    monkeypatch.setattr("crossfade.decoding.generate", kept)

    def call(
        *messages: str, options: tuple[str, ...] = tuple(FADED), typed: bool = True, status: int = 0
    ) -> Any:
        outputs.clear()
        stdin = io.StringIO("".join(f"{m}\n" for m in messages))
        stdin.isatty = lambda: typed  # type: ignore[method-assign]
        monkeypatch.setattr("sys.stdin", stdin)
        assert cli.main(["chat", *trio(paths)[:3], *options]) == status
        out, err = capsys.readouterr()
        said = re.sub(r"> |\.\.\. ", "", err).splitlines()[1:]  # without the prompts
        return out, [line for line in said if line], list(outputs)

    return call


def answers(paths: dict[str, str], *turns: tuple[list[str], float, int, int]) -> list[str]:
    """What `generate` answers: each of some turns has the contents of its messages, beginning with
    the user's, the fader, the seed, and how many answers there were before."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths["base"])
    terms = {n: cf.Model(loaded(p), tokenizer=tokenizer, name=n) for n, p in paths.items()}
    found = []
    for contents, w, seed, turn in turns:
        roles = ["user", "assistant"] * len(contents)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        blend = cf.parse("base + w * (tuned - ref)", **terms, w=w)
        own = [seed_of(seed, turn)]
        out = cf.generate(blend, [messages], seed=own, max_new_tokens=4, do_sample=True)
        found.append(out.text[0])
    return found


def test_answers_are_those_of_the_library_and_faders_move(talk, paths) -> None:
    out, said, _ = talk("a b", "/w w 2", "c d", "/w w=0", "/again", "/w")
    first, second = out.split("\n")[:2]
    turns = [(["a b"], 0.5, 0, 0), *((["a b", first, "c d"], w, 0, 1) for w in (2, 0))]
    assert out.split("\n") == [*(text.lstrip() for text in answers(paths, *turns)), ""]
    assert second != out.split("\n")[2], "the fader moves the answer"
    assert said == ["w = 2", "w = 0", "w = 0"]


def test_what_was_read_is_not_read_again(talk) -> None:
    """Also after a fader has moved, be it to 0 or from there."""
    options = (*FADED[:1], "--fader=w=0", *FADED[2:])
    _, _, outputs = talk("a b c d e f g", "/w w 1", "h", "/w w 0", "/again", options=options)
    first, second, again = ([m.tokens for m in out.stats.models] for out in outputs)
    assert len(first) == 3, "no term is left out, whatever the fader"
    assert all(x < y for x, y in zip(second, first, strict=True))
    assert all(x < y for x, y in zip(again, first, strict=True))


def test_commands_change_the_conversation(talk, paths, tmp_path: Path) -> None:
    saved = [tmp_path / f"{i}.jsonl" for i in range(3)]
    out, said, _ = talk(
        *("/system x y", "a b", "/seed 9", "/again", "c", "/undo", f"/save {saved[0]}"),
        *("/system", f"/save {saved[1]}", "/system z", "/reset", "d \\", "e", f"/save {saved[2]}"),
    )
    texts = out.splitlines()
    assert said == []
    messages = [json.loads(file.read_text())["messages"] for file in saved]
    contents = [[(m["role"], m["content"]) for m in each] for each in messages]
    pair = [("user", "a b"), ("assistant", contents[0][-1][1])]
    assert contents[0] == [("system", "x y"), *pair]
    assert contents[0][-1][1].strip() == texts[1].strip() != texts[0].strip()
    assert contents[1] == pair
    assert contents[2][:2] == [("system", "z"), ("user", "d \ne")]
    assert len(contents[2]) == 3


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("/w v 2", "error: there is no fader 'v'; the faders are w"),
        ("/w w much", "error: /w w much: it must be /w NAME NUMBER"),
        ("/w w", "error: /w w: it must be /w NAME NUMBER"),
        ("/w w inf", "error: w is inf; it must be finite"),
        ("/again", "error: there is no answer yet"),
        ("/undo", "error: there is no message to take back"),
        ("/seed x", "error: /seed x: it must be a whole number below 2**64"),
        ("/seed \u00b2", "error: /seed \u00b2: it must be a whole number below 2**64"),
        ("/save", "error: /save needs the name of a file"),
        ("/save /not/here/x", "error: /save is '/not/here/x': there is no folder '/not/here'"),
        ("/quiz", "error: there is no command /quiz; did you mean '/quit'?"),
        ("/xyzzy", "error: there is no command /xyzzy; /help shows them"),
    ],
)
def test_a_mistake_does_not_end_the_chat(talk, message: str, problem: str) -> None:
    out, said, _ = talk(message, "a", "/quit", "b")
    assert said == [problem]
    assert len(out.splitlines()) == 1


def test_help_and_no_faders(talk, paths) -> None:
    out, said, _ = talk("/help", "", "/w", options=("--blend=base + tuned + ref",))
    assert out == ""
    assert said[:-1] == chat.COMMANDS.splitlines()
    assert "the formula has no faders" in said[-1]


@pytest.mark.parametrize("at", [0, 5])
def test_an_interrupt_ends_an_answer(talk, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """One before its first token takes the message back. The chat goes on in any case."""
    options = (*FADED[:2], "--max-new-tokens=20", "--sample")
    whole = talk("a b c", "d", "e", options=options)[0].splitlines()
    put, puts = Printer.put, []

    def interrupted(self: Printer, tokens: Any) -> None:
        puts.append(self)
        if len(set(map(id, puts))) == 2 and puts.count(self) == at + 1:
            raise KeyboardInterrupt
        put(self, tokens)

    monkeypatch.setattr(Printer, "put", interrupted)
    out, said, outputs = talk("a b c", "d", "e", options=options)
    assert [o.stats.interrupted for o in outputs] == [False, True, False]
    found = out.splitlines()
    assert found[0] == whole[0]
    assert whole[1].startswith(found[1])
    assert len(found[1]) < len(whole[1])
    assert bool(found[1]) == bool(at)
    assert said == ([] if at else ["interrupted: the conversation is as it was before"])
    read = outputs[2].stats.models[0].tokens - outputs[2].stats.tokens
    assert read < outputs[2].prompt_length - 4, "the cache of the first answer is gone on from"


def test_a_mistake_in_a_file_of_messages_is_told_by_the_status(talk) -> None:
    out, said, _ = talk("/w v 2", "a", typed=False, status=2)
    assert said == ["error: there is no fader 'v'; the faders are w"]
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_ends_a_file_of_messages(
    talk, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    put, puts = Printer.put, []

    def interrupted(self: Printer, tokens: Any) -> None:
        puts.append(self)
        if len(puts) == at + 1:
            raise KeyboardInterrupt
        put(self, tokens)

    monkeypatch.setattr(Printer, "put", interrupted)
    _, said, outputs = talk("a b c", "d", typed=False, status=130)
    assert said == ["interrupted"]
    assert len(outputs) == 1


def test_an_interrupt_between_messages_of_a_pipe_ends_the_chat(monkeypatch) -> None:
    stdin = io.StringIO()
    monkeypatch.setattr("sys.stdin", stdin)

    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(stdin, "readline", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat.read(interactive=False)


def test_nobody_who_reads_the_answers_ends_the_chat(paths, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Printer, "_print", closed)
    with pytest.raises(BrokenPipeError):
        chat.run(parser().parse_args(["chat", *trio(paths)[:3], *FADED]))


def test_messages_in_a_file_are_utf8(talk, monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO("\ufeff/\N{SNOWMAN}\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data, encoding="ascii"))
    assert not chat._interactive()
    assert chat.read(interactive=False) == "/\N{SNOWMAN}"


def test_a_closed_stdin(paths, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["chat", *trio(paths)]) == 2
    assert "stdin is closed" in capsys.readouterr().err


def test_a_model_without_a_template_cannot_chat(
    paths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = save_model(tmp_path / "plain", 0, template="")
    assert cli.main(["chat", f"--model={plain}"]) == 2
    assert "model has no chat template, which a chat needs" in capsys.readouterr().err
