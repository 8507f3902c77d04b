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
from transformers import PreTrainedTokenizerFast
from word_models import PROMPTS, WORDS, loaded, trio


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
