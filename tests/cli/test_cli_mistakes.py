"""A mistake in an option, a file or a model gets one plain sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from crossfade import cli
from word_models import loaded

TWO = ["--model=a={base}", "--model=b={tuned}"]
MISTAKES = {
    "no model": (["generate", "a"], "no model is given"),
    "unknown name": (["generate", "a", *TWO, "--blend=a+d"], "unknown name 'd' (known: a, b)"),
    "unused model": (["generate", "a", *TWO, "--blend=a"], "does not use it"),
    "no blend": (["generate", "a", *TWO], "--blend is missing"),
    "same name": (["generate", "a", "--model=a={base}", "--model=a={ref}"], "given twice"),
    "no name": (["generate", "a", "--model={base}", "--model=b={ref}"], "must be NAME=PATH"),
    "bad name": (["generate", "a", "--model=a-b={base}"], "must be an identifier"),
    "no folder": (["generate", "a", "--model=/not/here"], "there is no folder '/not/here'"),
    "no config": (["generate", "a", "--model={empty}"], "has no config.json"),
    "no adapter": (["generate", "a", "--model={base}@{empty}"], "adapter_model.safetensors"),
    "no guide": (["generate", "a", "--model={base}@praise"], "that ships: sentiment, brevity"),
    "another model's guide": (
        ["generate", "a", "--model={base}@sentiment"],
        "must be an adapter of a model like this LlamaForCausalLM",
    ),
    "system of a head": (
        ["generate", "a", "--model={base}@{head}", "--system=model=x"],
        "names 'model', a value head",
    ),
    "system of none": (["generate", "a", "--model=a={base}", "--system=b=x"], "names 'b'"),
    "no system text": (["generate", "a", "--model=a={base}", "--system=a"], "must be NAME=TEXT"),
    "device": (["generate", "a", "--model={base}", "--device=nope"], "--device is 'nope'"),
    "no prompts file": (["generate", "--model={base}", "--prompts=/not/here"], "/not/here"),
    "prompts twice": (["generate", "a", "--model={base}", "--prompts={file}"], "it must be one"),
    "empty prompts": (["generate", "--model={base}", "--prompts={empty}/e.txt"], "no prompts"),
    "empty prompt": (["generate", "", "--model={base}"], "prompt 0 is empty"),
    "not JSON": (["generate", "--model={base}", "--prompts={bad}"], "line 2: not JSON"),
    "no key": (["generate", "--model={base}", "--prompts={file}"], '"prompt" or "messages"'),
    "a number": (["generate", "--model={base}", "--prompts={number}"], "prompt 0 is 3"),
    "greedy draws": (["generate", "a", "--model={base}", "--greedy", "--top-k=3"], "--top-k"),
    "temperature": (["generate", "a", "--model={base}", "--temperature=-1"], "temperature is -1.0"),
    "top-p": (["generate", "a", "--model={base}", "--top-p=2"], "top_p is 2.0"),
    "length": (["generate", "a", "--model={base}", "--max-new-tokens=0"], "max_new_tokens is 0"),
    "resume what": (["generate", "a", "--model={base}", "--resume"], "without --output"),
    "output exists": (["generate", "a", "--model={base}", "--output={file}"], "give --resume"),
    "not our file": (
        ["generate", "a", "--model={base}", "--output={file}", "--resume"],
        "not a line of such a file",
    ),
    "scores exist": (
        ["score", "{file}", "--model={base}", "--output={file}"],
        "exists; remove it or name another file",
    ),
    "score what": (["score", "{file}", "--model={base}"], 'no "response"'),
    "score nothing": (["score", "{empty}/e.txt", "--model={base}"], "nothing to score"),
    "vocabularies": (
        ["inspect", *["--model=a={base}", "--model=b={other}"], "--blend=a/b"],
        "column",
    ),
    "demo weights": (["demo", "--samples=0"], "samples is 0"),
    "demo weight": (["demo", "--weights", "1", "nan"], "nan"),
    "demo output": (["demo", "--output=/not/here/x.png"], "no folder '/not/here'"),
    "demo format": (["demo", "--output=x.xyz"], "must end in .png"),
    "bench output": (["bench", "ops", "--json=/not/here/x.json"], "--json is '/not/here/x.json'"),
    "bench into a folder": (["bench", "ops", "--json={empty}"], "a folder; it must be a file"),
    "keyword": (["generate", "a", "--model=import={base}"], "must be an identifier"),
    "half an argument": (["generate", "a\udcff", "--model={base}"], "half of a surrogate pair"),
    "half a system prompt": (
        ["generate", "a", "--model={base}", "--system=model=\udcff"],
        "--system model: '\\udcff' has half of a surrogate pair",
    ),
    "half a text": (["generate", "--model={base}", "--prompts={half}"], "half.jsonl, line 1: "),
    "ids beyond 64 bits": (["generate", "--model={base}", "--prompts={huge}"], "no vocabulary has"),
    "ids before texts": (["score", "{below}", "--model={base}"], "has id -1 for model"),
    "more than int64": (
        ["generate", "a", "--model={base}", "--max-new-tokens=99999999999999999999"],
        "max_new_tokens is 99999999999999999999; it must be at most 9223372036854775807",
    ),
    "deep text": (["generate", "--model={base}", "--prompts={deep}"], "deep.jsonl, line 1 is nest"),
    "no prompts file's name": (["generate", "--model={base}", "--prompts="], "a directory"),
    "JSON": (
        ["generate", "--model={base}", "--prompts=x.json"],
        "x.json is JSON; it must be a .jsonl file",
    ),
    "output is a folder": (
        ["generate", "a", "--model={base}", "--output={empty}", "--resume"],
        "it must be a file",
    ),
    "output is nothing": (["generate", "a", "--model={base}", "--output="], "--output is ''"),
    "output is a device": (
        ["generate", "a", "--model={base}", "--output=/dev/null", "--resume"],
        "is no plain file",
    ),
    "output folder": (
        ["generate", "a", "--model={base}", "--output=/not/here/x.jsonl"],
        "--output is '/not/here/x.jsonl'",
    ),
    "not text": (["score", "{junk}", "--model={base}"], "junk.txt is not UTF-8"),
    "broken weights": (["inspect", "--model={broken}"], "cannot be read"),
    "chat without text": (
        ["generate", "--model={base}", "--prompts={null}"],
        "message 0, has the content None; it must be a text",
    ),
    "demo seed": (["demo", "--seed=-1"], "seed is -1"),
    "search for what": (
        ["generate", "a", "--model={base}", "--best-of=2"],
        "given without --value",
    ),
    "value for what": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a"],
        "--value is given without --best-of or --search",
    ),
    "no reference": (
        ["generate", "a", *TWO, "--blend=a", "--value=b+a", "--best-of=2"],
        "less one reference",
    ),
    "greedy search": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a", "--best-of=2", "--greedy"],
        "a search, which draws",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence_and_no_traceback(
    paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "e.txt").write_text("\n \n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    names = {"empty": empty, "file": tmp_path / "rows.jsonl", "bad": tmp_path / "bad.jsonl"}
    names["other"] = paths["ref"]
    names["junk"] = tmp_path / "junk.txt"
    names["junk"].write_bytes(b"\xff\xfe")
    names["null"] = tmp_path / "null.jsonl"
    names["null"].write_text('{"messages": [{"role": "user", "content": null}]}\n')
    names["half"] = tmp_path / "half.jsonl"
    names["half"].write_text('{"prompt": "\\ud800"}\n')
    names["huge"] = tmp_path / "huge.jsonl"
    names["huge"].write_text(f'{{"prompt": [{2**64}]}}\n')
    names["below"] = tmp_path / "below.jsonl"
    names["below"].write_text('{"prompt": [-1], "response": "a"}\n')
    names["deep"] = tmp_path / "deep.jsonl"
    names["deep"].write_text("[" * 100_000)
    names["number"] = tmp_path / "number.jsonl"
    names["number"].write_text('{"prompt": 3}\n{"prompt": 4}\n')
    if "{head}" in str(MISTAKES[name]):
        from crossfade import training

        names["head"] = tmp_path / "head"
        training.save_value_head(training.value_model(loaded(paths["base"])), names["head"])
    if "{broken}" in str(MISTAKES[name]):
        names["broken"] = tmp_path / "broken"
        shutil.copytree(paths["base"], names["broken"])
        (names["broken"] / "model.safetensors").write_bytes(b"junk" * 10)
    argv, message = MISTAKES[name]
    assert cli.main([part.format(**paths, **names) for part in argv]) == 2
    out, err = capsys.readouterr()
    error = err[err.index("crossfade ") :]  # a bar may come first
    assert out == ""
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) == (3 if "formula:" in error else 1)  # a formula is shown
