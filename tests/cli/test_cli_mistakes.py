"""A mistake in an option, a file or a model is answered by one sentence that names it."""

from __future__ import annotations

import shutil
from pathlib import Path
from string import Formatter

import pytest
from crossfade import cli, training
from word_models import loaded, save_reward_model

TWO = ["--model=a={base}", "--model=b={tuned}"]
JUDGED = ["generate", "a", "--model=a={base}", "--blend=a", "--best-of=2"]
MISTAKES = {
    "no model": (["generate", "a"], "no model is given"),
    "unknown name": (["generate", "a", *TWO, "--blend=a+d"], "unknown name 'd' (known: a, b)"),
    "unknown names": (
        ["generate", "a", *TWO, "--blend=a+wide*b", "--fader=wise=1"],
        "--blend has the unknown name 'wide' (known: a, b, wise); did you mean 'wise'?",
    ),
    "no fader": (["generate", "a", *TWO, "--blend=a+w*b"], "a fader is given as --fader w=NUMBER"),
    "unused fader": (
        ["generate", "a", *TWO, "--blend=a+b", "--fader=w=1"],
        "--fader w=... is given, but --blend 'a+b' does not use it",
    ),
    "fader of a model's name": (["inspect", *TWO, "--blend=a+b", "--fader=a=1"], "name a is given"),
    "fader without number": (["inspect", *TWO, "--fader=w"], "it must be NAME=NUMBER"),
    "fader of no number": (["inspect", *TWO, "--fader=w=x"], "'x' must be a finite number"),
    "fader that is not finite": (["inspect", *TWO, "--fader=w=inf"], "must be a finite number"),
    "preset": (
        ["inspect", *TWO, "--blend=eff(a, b, b)"],
        "--blend: unknown function 'eff'",
    ),
    "preset's argument": (
        ["inspect", *TWO, "--blend=dera(a, b, lamb=1)"],
        "it must be dera(ref, aligned, lam); did you mean 'lam'?",
    ),
    "formula": (["inspect", *TWO, "--blend=a+"], "--blend: invalid syntax at column 3"),
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
    "a GPU by another name": (["generate", "a", "--model={base}", "--device=gpu"], "mean 'cuda'"),
    "the path of a single model as its name": (
        ["generate", "a", "--model={base}", "--blend=cfg(base, 2, negative_system='x')"],
        "'base' (known: model); a single model without a name is called model",
    ),
    "prompts that are not there": (
        ["generate", "--prompts=missing.txt", "--model={base}"],
        "there is no file 'missing.txt'",
    ),
    "no system text": (["generate", "a", "--model=a={base}", "--system=a"], "must be NAME=TEXT"),
    "device": (["generate", "a", "--model={base}", "--device=nope"], "--device is 'nope'"),
    "no prompts file": (["generate", "--model={base}", "--prompts=/not/here"], "/not/here"),
    "prompts twice": (["generate", "a", "--model={base}", "--prompts={file}"], "it must be one"),
    "empty prompts": (["generate", "--model={base}", "--prompts={empty}/e.txt"], "no prompts"),
    "empty prompt": (["generate", "", "--model={base}"], "prompt 0 is empty"),
    "not JSON": (["generate", "--model={base}", "--prompts={bad}"], "line 2: not JSON"),
    "no key": (["generate", "--model={base}", "--prompts={empty}/k.jsonl"], '"prompt" or "mess'),
    "another key": (
        ["generate", "--model={base}", "--prompts={file}"],
        "prompt 0 has the unknown key 'text'; did you mean \"prompt\"?",
    ),
    "a number": (["generate", "--model={base}", "--prompts={number}"], "prompt 0 is 3"),
    "greedy draws": (["generate", "a", "--model={base}", "--greedy", "--top-k=3"], "--top-k"),
    "temperature": (
        ["generate", "a", "--model={base}", "--temperature=-1"],
        "--temperature is -1",
    ),
    "top-p": (["generate", "a", "--model={base}", "--top-p=2"], "--top-p is 2.0"),
    "length": (["generate", "a", "--model={base}", "--max-new-tokens=0"], "--max-new-tokens is 0"),
    "resume what": (["generate", "a", "--model={base}", "--resume"], "without --output"),
    "output exists": (["generate", "a", "--model={base}", "--output={file}"], "give --resume"),
    "not our file": (
        ["generate", "a", "--model={base}", "--output={file}", "--resume"],
        "is not a result that crossfade has written",
    ),
    "scores exist": (
        ["score", "{file}", "--model={base}", "--output={file}"],
        "exists; remove it or name another file",
    ),
    "score what": (["score", "{file}", "--model={base}"], 'no "response"'),
    "score what else": (
        ["score", "{typo}", "--model={base}"],
        "prompt 0 has the unknown key 'reponse'; did you mean 'response'?",
    ),
    "score with settings": (
        ["score", "{hot}", "--model={base}"],
        "prompt 0 has the unknown key 'temperature'",
    ),
    "limit for scores": (  # whose name where texts are written would be refused too
        ["score", "{limit}", "--model={base}"],
        "prompt 0 has the unknown key 'max_tokens'; what is not for the models goes under",
    ),
    "weights without faders": (
        ["generate", "--model={base}", "--prompts={weights}"],
        "prompt 0: weights has 'w'; the formula has no faders",
    ),
    "nearly a guide": (
        ["inspect", "--model={base}@sentimen"],
        "sentiment_value; did you mean 'sentiment'?",
    ),
    "nearly the small model": (["inspect", "--model=smolm2"], "; did you mean 'smollm2'?"),
    "score nothing": (["score", "{empty}/e.txt", "--model={base}"], "nothing to score"),
    "vocabularies": (
        ["inspect", *["--model=a={base}", "--model=b={ref}"], "--blend=a/b"],
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
        "--max-new-tokens is 99999999999999999999; it must be at most 9223372036854775807",
    ),
    "deep text": (["generate", "--model={base}", "--prompts={deep}"], "deep.jsonl, line 1 is nest"),
    "no prompts file's name": (["generate", "--model={base}", "--prompts="], "is a folder"),
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
        "--best-of is given without --value, --reward or --tilt",
    ),
    "value for what": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a"],
        "--value is given without --best-of, --search, --particles or --tournament",
    ),
    "no reference": (
        ["generate", "a", *TWO, "--blend=a", "--value=b+a", "--best-of=2"],
        "less one reference",
    ),
    "stop": (["generate", "a", "--model={base}", "--stop="], "--stop has ''; it must be texts"),
    "seed": (["generate", "a", "--model={base}", "--seed=-1"], "--seed is -1; it must be at least"),
    "greedy texts": (
        ["generate", "a", "--model={base}", "--greedy", "--n=2"],
        "--greedy and --n 2 are both given; all texts would be equal",
    ),
    "texts without a draw": (
        ["generate", "a", "--model={base}", "--temperature=0", "--n=2"],
        "--temperature 0 and --n 2 are both given; all texts would be equal",
    ),
    "search without a draw": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a", "--best-of=2", "--temperature=0"],
        "--temperature 0 is given with a search, which draws",
    ),
    "line without a draw": (
        ["generate", "--model={base}", "--prompts={cold}", "--n=2"],
        'prompt 0 has the "temperature" 0, and several texts are drawn',
    ),
    "more than the search keeps": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a", "--best-of=2", "--n=3"],
        "--n is 3; it must be at most 2, as --best-of keeps",
    ),
    "stream of many": (
        ["generate", "a", "b", "--model={base}", "--stream"],
        "--stream is given with 2 prompts; it is for one",
    ),
    "stream of several": (
        ["generate", "a", "--model={base}", "--stream", "--n=2"],
        "--stream and --n are both given; only one text can be streamed",
    ),
    "stream of a search": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a", "--best-of=2", "--stream"],
        "--stream and --best-of are both given",
    ),
    "stream with log-probs": (
        ["generate", "a", "--model={base}", "--stream", "--logprobs"],
        "--stream and --logprobs are both given",
    ),
    "text with terms": (
        ["generate", "a", "--model={base}", "--text", "--terms"],
        "--text and --terms are both given; JSON lines alone have room",
    ),
    "text to a file": (
        ["generate", "a", "--model={base}", "--text", "--output=x"],
        "--text prints to stdout, which > FILE puts into a file",
    ),
    "no chat with a system prompt": (
        ["generate", "a", "--model=a={base}", "--no-chat", "--system=a=x"],
        "--no-chat and --system are both given",
    ),
    "a result's own key": (["generate", "a", "--model={base}", "--keep=text"], "--keep is 'text'"),
    "reward in the blend": (
        ["inspect", "--model=a={base}", "--model=r={reward}", "--blend=a+r"],
        "--blend has 'r', a reward; it can be in --value",
    ),
    "class of a reward model": (
        [*JUDGED, "--model=r={classes}", "--value=r"],
        "classes@good, say",
    ),
    "no class of a reward model": (
        [*JUDGED, "--model=r={classes}@goods", "--value=r"],
        "its classes are bad, good; did you mean 'good'?",
    ),
    "reward without a place": ([*JUDGED, "--reward=brevity"], "it must be MODULE:FUNCTION"),
    "reward in a file": ([*JUDGED, "--reward=a.py:f"], "a module has no .py: a:f"),
    "reward in no module": ([*JUDGED, "--reward=nowhere.here:f"], "there is no module 'nowhere'"),
    "no such reward": ([*JUDGED, "--reward=json:dump_s"], "did you mean 'dumps'?"),
    "reward of one list": (
        [*JUDGED, "--reward=os:fspath"],
        "fn is called as fn(prompts, responses)",
    ),
    "rewards without a value": (
        [*JUDGED, "--reward=x=operator:add", "--reward=y=operator:sub"],
        "--value is missing; with several rewards",
    ),
    "a blend as the value": (
        [*JUDGED, "--value=a"],
        "--value: value is a; it must be value heads, or weighted models less one reference",
    ),
    "greedy search": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a", "--best-of=2", "--greedy"],
        "a search, which draws",
    ),
}


FILES = {  # by what a mistake calls them
    "file": ("rows.jsonl", b'{"text": "a"}\n'),
    "bad": ("bad.jsonl", b'{"prompt": "a"}\n{"prompt": \n'),
    "junk": ("junk.txt", b"\xff\xfe"),
    "null": ("null.jsonl", b'{"messages": [{"role": "user", "content": null}]}\n'),
    "half": ("half.jsonl", b'{"prompt": "\\ud800"}\n'),
    "huge": ("huge.jsonl", f'{{"prompt": [{2**64}]}}\n'.encode()),
    "below": ("below.jsonl", b'{"prompt": [-1], "response": "a"}\n'),
    "deep": ("deep.jsonl", b"[" * 100_000),
    "typo": ("typo.jsonl", b'{"prompt": "a", "reponse": "b"}'),
    "hot": ("hot.jsonl", b'{"prompt": "a", "response": "b", "temperature": 1}'),
    "limit": ("limit.jsonl", b'{"prompt": "a", "response": "b", "max_tokens": 1}'),
    "cold": ("cold.jsonl", b'{"prompt": "a", "temperature": 0}'),
    "weights": ("weights.jsonl", b'{"prompt": "a", "weights": {"w": 1}}'),
    "number": ("number.jsonl", b'{"prompt": 3}\n{"prompt": 4}\n'),
}


def made(name: str, folder: Path, base: str) -> Path:
    """The file or folder that a mistake calls `name`."""
    if name in FILES:
        file, content = FILES[name]
        (folder / file).write_bytes(content)
        return folder / file
    path = folder / name
    if name == "empty":  # but for one file, which has no words
        path.mkdir()
        (path / "e.txt").write_text("\n \n")
        (path / "k.jsonl").write_text('{"id": 3}')
    elif name in ("reward", "classes"):
        save_reward_model(path, ["bad", "good"] if name == "classes" else ["score"])
    elif name == "head":
        training.save_value_head(training.value_model(loaded(base)), path)
    else:
        assert name == "broken"
        shutil.copytree(base, path)
        (path / "model.safetensors").write_bytes(b"junk" * 10)
    return path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_a_sentence_and_no_traceback(
    paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    argv, message = MISTAKES[name]
    named = {x for part in argv for _, x, _, _ in Formatter().parse(part) if x is not None}
    places = {x: paths[x] if x in paths else made(x, tmp_path, paths["base"]) for x in named}
    assert cli.main([part.format(**places) for part in argv]) == 2
    out, err = capsys.readouterr()
    error = err[err.index("crossfade ") :]  # a progress bar may come first
    assert out == ""
    assert message in error
    assert "Traceback" not in error
    # A mistake in a formula is shown in the formula, with a mark under its place.
    assert len(error.splitlines()) == (3 if error.endswith("^\n") else 1)
