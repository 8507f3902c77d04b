"""``crossfade generate`` writes what the library gives, for prompts from every source."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
from crossfade import cli
from crossfade.bulk import records
from crossfade.decoding.engine.group import Group
from tiny_models import make, make_letters
from transformers import PreTrainedTokenizerFast
from word_models import ANSWERS, PROMPTS, WORDS, loaded, save_model, trio


def test_generate_writes_what_the_library_gives(paths, blend, run) -> None:
    found = run("generate", *PROMPTS, *trio(paths), "--greedy", "--max-new-tokens", "6")
    ids = [[WORDS.index(w) for w in p.split()] for p in PROMPTS]
    out = cf.generate(blend, ids, do_sample=False, max_new_tokens=6)
    assert [r["index"] for r in found] == [0, 1, 2, 3]
    assert [r["prompt"] for r in found] == PROMPTS
    assert [r["tokens"] for r in found] == out.lengths.tolist()
    assert [r["logprob"] for r in found] == pytest.approx(out.logprobs.sum(dim=1).tolist())
    assert [r["finished"] for r in found] == out.finished.tolist()
    written = [[w for w in row if w > 2] for row in out.responses]
    assert [r["text"].split() for r in found] == [[WORDS[i] for i in row] for row in written]
    assert found[0]["blend"] == "base + 0.8*tuned - 0.8*ref"


def test_unions_and_clamps(paths, blend, run) -> None:
    models = [f"--model={name}={paths[name]}" for name in ("base", "tuned", "ref")]
    text = "base - 0.5*union(tuned, base) + (w*(tuned - ref)).clamp(max=2)"
    options = ["--greedy", "--max-new-tokens", "6", "--blend", text, "--fader", "w=0.8"]
    found = run("generate", PROMPTS[0], *models, *options)
    base, tuned, ref = blend.terms
    same = base - 0.5 * cf.union(tuned, base) + (0.8 * (tuned - ref)).clamp(max=2)
    ids = [[WORDS.index(w) for w in PROMPTS[0].split()]]
    out = cf.generate(same, ids, do_sample=False, max_new_tokens=6)
    assert found[0]["logprob"] == pytest.approx(out.logprobs.sum().item(), abs=1e-4)
    assert found[0]["blend"] == str(same)


@pytest.mark.parametrize("how", ["--best-of=4", "--search=2,2,3"])
def test_searches(paths, blend, run, how: str) -> None:
    argv = ["generate", *PROMPTS, *trio(paths), "--value=0.5 * (tuned - ref)", how]
    found = run(*argv, "--max-new-tokens", "6")
    _, tuned, ref = blend.terms
    value = 0.5 * cf.LogRatio(tuned, ref)
    search = cf.BestOfN(4, value) if "best" in how else cf.ChunkBeamSearch(2, 2, 3, value)
    ids = [[WORDS.index(w) for w in p.split()] for p in PROMPTS]
    seeds = [records.seed_of(0, i) for i in range(4)]
    out = cf.generate(blend, ids, search=search, seed=seeds, max_new_tokens=6)
    assert [r["tokens"] for r in found] == out.lengths.tolist()
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist(), abs=1e-4)
    assert run(*argv, "--max-new-tokens", "6", "--batch-size", "1") == found


def test_a_system_prompt_is_its_terms_own(paths, run) -> None:
    # One model under two names, so that the blend is of the model with and without the prompt.
    models = [f"--model={name}={paths['base']}" for name in ("plain", "told")]
    common = ["--greedy", "--max-new-tokens", "5", "--blend", "plain + 2 * (told - plain)"]
    told = run("generate", "a b", *models, *common, "--system", "told=x y z")
    model = loaded(paths["base"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(paths["base"])
    plain = cf.Model(model, tokenizer=tokenizer, name="plain")
    same = cf.Model(model, tokenizer=tokenizer, system="x y z", name="told")
    chat = [[{"role": "user", "content": "a b"}]]
    out = cf.generate(-plain + 2 * same, chat, do_sample=False, max_new_tokens=5)
    assert told[0]["logprob"] == pytest.approx(float(out.logprobs.sum()))
    assert told[0]["prompt"] == chat[0]


def test_samples_do_not_depend_on_the_batch(paths, run) -> None:
    common = ["generate", *PROMPTS, *trio(paths), "--max-new-tokens", "8", "--temperature", "1.5"]
    together = run(*common)
    alone = run(*common, "--batch-size", "1")
    other = run(*common, "--seed", "1")
    assert [r["text"] for r in together] == [r["text"] for r in alone]
    assert [r["text"] for r in together] != [r["text"] for r in other]


def test_equal_prompts_get_different_samples(paths, run) -> None:
    found = run("generate", *["a b"] * 8, f"--model={paths['base']}", "--sample")
    assert len({r["text"] for r in found}) > 1


def test_truncation_options_reach_the_sampler(paths, run) -> None:
    one = ["generate", *PROMPTS, f"--model={paths['base']}", "--max-new-tokens", "6"]
    greedy = [r["text"] for r in run(*one, "--greedy")]
    for option in (["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]):
        assert [r["text"] for r in run(*one, *option)] == greedy, option


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "a byte order mark"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "stdin", "stdin jsonl"])
def test_prompts_come_from_files_and_stdin(
    paths, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mark: str
) -> None:
    plain = "\n".join(["a b c", "", "d", "  "])
    rows = [{"prompt": "a b c"}, {"messages": [{"role": "user", "content": "d"}]}]
    text = "\n".join(map(json.dumps, rows)) if "jsonl" in kind else plain
    argv = ["generate", f"--model={paths['base']}", "--greedy", "--max-new-tokens", "2"]
    if kind.startswith("stdin"):
        data = io.BytesIO((mark + text).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data, "latin-1"))
    else:
        file = tmp_path / f"prompts.{kind}"
        file.write_text(mark + text, encoding="utf-8")
        argv += ["--prompts", str(file)]
    expected = ["a b c", rows[1]["messages"] if "jsonl" in kind else "d"]
    assert [r["prompt"] for r in run(*argv)] == expected


def test_chat_sends_texts_through_the_template(paths, run) -> None:
    found = run("generate", "a", f"--model={paths['base']}", "--greedy", "--chat")
    assert found[0]["prompt"] == [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory\nframes"), MemoryError()]
)
def test_memory_that_runs_out_is_said_in_a_line(
    paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def generate(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("crossfade.bulk.decode.decode", generate)
    assert cli.main(["generate", "a", f"--model={paths['base']}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, "no bar is shown for what has failed at once"
    assert said[0].startswith("crossfade generate: error: ")
    assert "memory" in said[0]


def test_n_texts_of_a_prompt_are_its_outputs(paths, blend, run) -> None:
    argv = ["generate", *PROMPTS, *trio(paths), "--max-new-tokens", "6", "--n"]
    found = run(*argv, "3", "--terms", "--logprobs")
    ids = [[WORDS.index(w) for w in p.split()] for p in PROMPTS]
    seeds = [records.seed_of(0, i) for i in range(4)]
    out = cf.generate(
        blend,
        ids,
        seed=seeds,
        do_sample=True,
        max_new_tokens=6,
        num_return_sequences=3,
        return_term_logprobs=True,
    )
    assert "text" not in found[0]
    each = [text for record in found for text in record["outputs"]]
    assert [e["tokens"] for e in each] == out.lengths.tolist()
    assert [e["logprob"] for e in each] == pytest.approx(out.logprobs.sum(dim=1).tolist(), rel=1e-4)
    assert [[t["id"] for t in e["logprobs"]] for e in each] == out.responses
    for e, logprobs, terms in zip(each, out.logprobs, out.term_logprobs, strict=True):
        n = e["tokens"]
        assert [t["token"].strip() for t in e["logprobs"]] == [
            WORDS[t["id"]] for t in e["logprobs"]
        ]
        assert [t["logprob"] for t in e["logprobs"]] == pytest.approx(
            logprobs[:n].tolist(), rel=1e-4
        )
        assert e["terms"]["tuned"] == pytest.approx(float(terms[:, 1].sum()), rel=1e-4)
        assert [t["terms"]["ref"] for t in e["logprobs"]] == pytest.approx(
            terms[:n, 2].tolist(), rel=1e-4
        )
    (one,) = run(*argv[:1], PROMPTS[0], *argv[5:], "1")
    assert len(one["outputs"]) == 1, "a list, however many there are"


def test_the_best_texts_of_a_search(paths, run) -> None:
    argv = ["generate", "a b", *trio(paths), "--value=tuned - ref", "--best-of=4"]
    (several,) = run(*argv, "--n=4", "--max-new-tokens=5")
    (best,) = run(*argv, "--max-new-tokens=5")
    values = [e["value"] for e in several["outputs"]]
    assert values == sorted(values, reverse=True)
    assert several["outputs"][0]["text"] == best["text"]


def test_text_prints_the_texts_alone(paths, run) -> None:
    argv = ["generate", "a b", "c", *trio(paths), "--max-new-tokens=5", "--n=2"]
    texts = [e["text"] for record in run(*argv) for e in record["outputs"]]
    assert run(*argv, "--text", lines=False) == "\n\n".join(texts) + "\n"


@pytest.mark.parametrize("how", [["--greedy"], ["--sample", "--seed=3"]])
def test_stream_prints_the_text_that_the_line_has(paths, run, how: list[str]) -> None:
    argv = ["generate", "a b", *trio(paths), "--max-new-tokens=12", *how]
    (record,) = run(*argv)
    assert run(*argv, "--stream", lines=False) == record["text"] + "\n"


def test_stop_ends_texts(run, tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "m")
    make_letters().save_pretrained(tmp_path / "m")
    argv = ["generate", "ab", "ca", f"--model={tmp_path / 'm'}", "--sample", "--max-new-tokens=40"]
    whole = [r["text"] for r in run(*argv)]
    stops = [text[5:7] for text in whole]
    found = run(*argv, *(f"--stop={stop}" for stop in stops))
    for record, text in zip(found, whole, strict=True):
        assert text.startswith(record["text"])
        assert any(stop in record["text"] for stop in stops)
        assert len(record["text"]) < len(text)
        assert record["finished"]
    (record,) = run(*argv[:2], *argv[3:], f"--stop={stops[0]}")
    streamed = run(*argv[:2], *argv[3:], f"--stop={stops[0]}", "--stream", lines=False)
    assert streamed == record["text"] + "\n"


def test_an_interrupt_of_a_stream(paths, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = Group.step, []

    def interrupted(self: Group, *args: Any) -> Any:
        steps.append(1)
        if len(steps) > 9:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Group, "step", interrupted)
    assert cli.main(["generate", "a b", *trio(paths), "--stream", "--max-new-tokens=50"]) == 130
    out, err = capsys.readouterr()
    assert out.strip()
    assert err == "interrupted\n"


@pytest.mark.parametrize("option", [[], ["--chat"], ["--no-chat"]], ids=["", "chat", "plain"])
def test_instruct_models_get_chats_by_default(
    paths, run, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    tuned = save_model(tmp_path / "tuned", 1, template=ANSWERS)
    models = [f"--model=tuned={tuned}", f"--model=base={paths['base']}", "--max-new-tokens=2"]
    chat = [{"role": "user", "content": "a"}]
    for blend, by_default in (("tuned + base", True), ("base + tuned", False)):
        asked = {"--chat": True, "--no-chat": False}.get("".join(option), by_default)
        assert cli.main(["generate", "a", *models, f"--blend={blend}", *option]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["prompt"] == (chat if asked else "a")
        assert ("tuned is an instruct model" in err) == (by_default and not option)
        assert ("--no-chat" in err) == (by_default and not option)
    found = run("inspect", *models[:2], "--blend=tuned + base", "--json")
    assert found[0]["chat"]
