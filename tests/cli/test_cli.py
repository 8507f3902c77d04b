"""The command line: the same results as the library, prompts in, JSON lines out, plain errors."""

from __future__ import annotations

import io
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import cli, progress
from crossfade.bulk import records
from crossfade.decoding.group import Group
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<eos>", "<unk>", "system", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def make_model(folder: Path, seed: int, words: list[str] = WORDS) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None},
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {n: make_model(folder / n, seed) for seed, n in enumerate(["base", "tuned", "ref"])}


@pytest.fixture(scope="module")
def blend(paths: dict[str, str]) -> cf.Blend:
    """What `trio` says, made without the command line."""
    terms = {name: cf.Model(*loaded(path), name=name) for name, path in paths.items()}
    return cf.parse("base + 0.8 * (tuned - ref)", **terms)


def loaded(path: str) -> tuple[Any, ...]:
    return (LlamaForCausalLM.from_pretrained(path).eval(),)


def trio(paths: dict[str, str]) -> list[str]:
    models = [f"--model={name}={path}" for name, path in paths.items()]
    return [*models, "--blend", "base + 0.8 * (tuned - ref)"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must succeed, and reads the JSON lines it prints."""

    def call(*argv: str, lines: bool = True) -> Any:
        assert cli.main(list(argv)) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        return [json.loads(line) for line in out.splitlines()] if lines else out

    return call


PROMPTS = ["a b c", "d", "e f g h i j", "k l"]


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
    # the same model under two names: the blend is of one model with and without it
    models = [f"--model={name}={paths['base']}" for name in ("plain", "told")]
    common = ["--greedy", "--max-new-tokens", "5", "--blend", "plain + 2 * (told - plain)"]
    told = run("generate", "a b", *models, *common, "--system", "told=x y z")
    model, tokenizer = (
        loaded(paths["base"])[0],
        PreTrainedTokenizerFast.from_pretrained(paths["base"]),
    )
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


def test_resume_keeps_lines_and_writes_the_missing(paths, run, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    argv = ["generate", *PROMPTS, *trio(paths), "--sample", "--max-new-tokens", "5"]
    run(*argv, "--output", str(file), "--batch-size", "3")
    whole = file.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    # a crash in the middle of the third line; another worker's order
    lines = whole.splitlines(keepends=True)
    file.write_text(lines[3] + lines[0] + lines[1][:40])
    run(*argv, "--output", str(file), "--resume")
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["index"] for r in again] == [3, 0, 1, 2]
    assert {r["index"]: r["text"] for r in again} == {r["index"]: r["text"] for r in records}
    run(*argv, "--output", str(file), "--resume")
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("change", ["--seed=1", "--top-k=3", "--system=base=x", "--blend=base"])
def test_resume_refuses_to_mix_two_runs(
    paths, run, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    argv = ["generate", "a", f"--model=base={paths['base']}", "--chat", "--sample"]
    argv += ["--max-new-tokens=2", f"--output={tmp_path / 'out.jsonl'}"]
    run(*argv, "--blend=2 * base")
    assert cli.main([*argv, "--resume", "--blend=2 * base", change]) == 2
    assert "other settings" in capsys.readouterr().err


def test_resume_refuses_another_value_of_the_same_name(
    paths, run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "a", f"--model=base={paths['base']}", f"--model=ref={paths['ref']}"]
    argv += ["--blend=base", "--value=tuned - ref", "--best-of=2", "--max-new-tokens=2"]
    argv += [f"--output={tmp_path / 'out.jsonl'}"]
    other = make_model(tmp_path / "other", 7)
    run(*argv, f"--model=tuned={paths['tuned']}")
    run(*argv, f"--model=tuned={paths['tuned']}", "--resume")
    assert cli.main([*argv, f"--model=tuned={other}", "--resume"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_second_run_on_a_file_is_refused_before_models_are_loaded(
    paths, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossfade.loading.load_blend", None)
    file = tmp_path / "out.jsonl"
    argv = ["generate", "a", f"--model={paths['base']}", f"--output={file}", "--resume"]
    with records.Results(file):
        assert cli.main(argv) == 2
    assert "is being written by another run" in capsys.readouterr().err


def test_what_is_finished_is_on_disk_when_interrupted(
    paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([cf.generate])

    def generate(*args: Any, **kwargs: Any) -> Any:
        try:
            return next(calls)(*args, **kwargs)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("crossfade.decoding.generate", generate)
    monkeypatch.setattr("crossfade.cli.generate.PART", 1)
    file = tmp_path / "out.jsonl"
    argv = ["generate", *PROMPTS, *trio(paths), "--greedy", "--batch-size", "2"]
    assert cli.main([*argv, "--output", str(file)]) == 130
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1]


def test_an_interrupt_in_the_middle_keeps_the_rows_that_ended(
    paths, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ended, bar = Group.step, 0, progress.progress_bar(0, "prompt")

    def update(rows: int) -> None:
        nonlocal ended
        ended += rows

    def interrupted(self: Group, *args: Any) -> Any:
        if ended:
            raise KeyboardInterrupt
        return step(self, *args)

    file = tmp_path / "out.jsonl"
    argv = ["generate", *PROMPTS, *trio(paths), "--greedy", "--batch-size", "2"]
    argv += ["--max-new-tokens", "2", "--output", str(file)]
    with monkeypatch.context() as patch:
        patch.setattr(Group, "step", interrupted)
        patch.setattr(bar, "update", update)
        patch.setattr(progress, "progress_bar", lambda *_: bar)
        with pytest.warns(RuntimeWarning, match="interrupted when 2 of 4 rows had ended"):
            assert cli.main(argv) == 130
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1]
    run(*argv, "--resume")
    whole = [json.loads(line) for line in file.read_text().splitlines()]
    assert [r["index"] for r in whole] == [0, 1, 2, 3]
    assert all(r["tokens"] for r in whole)


def test_score_gives_the_librarys_figures(paths, blend, run, tmp_path: Path) -> None:
    pairs = [("a b c", "d e"), ("f", "g h i"), ("j k", "l")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in pairs))
    found = run("score", str(file), *trio(paths), "--terms", "--batch-size", "2")
    ids = [[[WORDS.index(w) for w in text.split()] for text in pair] for pair in pairs]
    prompts, responses = zip(*ids, strict=True)
    expected = cf.score(blend, list(prompts), list(responses), return_term_logprobs=True)
    assert [r["tokens"] for r in found] == [2, 3, 1]
    assert [r["logprob"] for r in found] == pytest.approx(expected.totals.tolist())
    assert [r["perplexity"] for r in found] == pytest.approx(expected.perplexity.tolist(), rel=1e-4)
    tuned = expected.term_logprobs[:, :, 1].sum(dim=1).tolist()
    assert [r["terms"]["tuned"] for r in found] == pytest.approx(tuned)


def test_inspect_prints_the_formula_and_counts_shared_weights_once(paths, run) -> None:
    one = f"--model=a={paths['base']}", f"--model=b={paths['base']}", f"--model=c={paths['ref']}"
    argv = ["inspect", *one, "--blend", "a + 2 * (b - c) / 4", "--system", "b=x"]
    text = run(*argv, lines=False)
    assert text.splitlines()[0] == "a + 0.5*b - 0.5*c"
    assert "2 models" in text
    (found,) = run(*argv, "--json")
    assert found["formula"] == "a + 0.5*b - 0.5*c"
    assert [m["names"] for m in found["models"]] == [["a", "b"], ["c"]]
    assert [t["system"] for t in found["blend"]["terms"]] == [None, "x", None]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_over_one_base_share_it(paths, run, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(9)
    for name in ("one", "two"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(loaded(paths["base"])[0], config)
        adapted.save_pretrained(tmp_path / name)
    base = paths["base"]
    models = [
        f"--model=base={base}",
        *(f"--model={n}={base}@{tmp_path / n}" for n in ("one", "two")),
    ]
    (cost,) = run("inspect", *models, "--blend", "base + one + two", "--json")
    assert [m["names"] for m in cost["models"]] == [["base", "one", "two"]]

    greedy = ["--greedy", "--max-new-tokens", "8"]
    for name in ("one", "two", None):
        model = loaded(base)[0]
        if name:
            model = peft.PeftModel.from_pretrained(model, tmp_path / name).eval()
        ids = torch.tensor([[WORDS.index(w) for w in "abc"]])
        expected = cf.generate(cf.Model(model), ids, do_sample=False, max_new_tokens=8)
        used = (
            "base + one + two - one - two" if name is None else f"{name} + 0*base + 0*one + 0*two"
        )
        found = run("generate", "a b c", *models, *greedy, "--blend", used)
        assert found[0]["logprob"] == pytest.approx(float(expected.logprobs.sum()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_value_heads_over_a_base(paths, run, tmp_path: Path) -> None:
    """As the value of a search and as a term, beside an adapter over the same weights."""
    peft = pytest.importorskip("peft")
    from crossfade import training

    torch.manual_seed(9)
    (base,), folder = loaded(paths["base"]), tmp_path / "head"
    head = training.value_model(base, "q", rank=2)
    torch.nn.init.normal_(head.get_output_embeddings().b)
    training.save_value_head(head, folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(loaded(paths["base"])[0], config).save_pretrained(tmp_path / "tuned")
    tuned = peft.PeftModel.from_pretrained(loaded(paths["base"])[0], tmp_path / "tuned").eval()
    terms = {
        "base": cf.Model(base, name="base"),
        "tuned": cf.Model(tuned, name="tuned"),
        "v": cf.ValueHead(head, name="v"),
    }
    options = [f"--model=v={paths['base']}@{folder}", f"--model=base={paths['base']}"]
    options += [f"--model=tuned={paths['base']}@{tmp_path / 'tuned'}", "--max-new-tokens=6"]
    ids = [[WORDS.index(w) for w in p.split()] for p in PROMPTS]

    found = run("generate", *PROMPTS, *options, "--greedy", "--blend=base + 2*v + 0*tuned")
    out = cf.generate(terms["base"] + 2 * terms["v"], ids, do_sample=False, max_new_tokens=6)
    assert [r["logprob"] for r in found] == pytest.approx(out.logprobs.sum(dim=1).tolist())

    value = 0.5 * terms["v"] + cf.LogRatio(terms["tuned"], terms["base"])
    search = cf.BestOfN(4, value)
    seeds = [records.seed_of(0, i) for i in range(4)]
    out = cf.generate(terms["base"], ids, search=search, seed=seeds, max_new_tokens=6)
    search_options = ["--best-of=4", "--blend=base", "--value=0.5*v + tuned - base"]
    found = run("generate", *PROMPTS, *options, *search_options)
    assert [r["tokens"] for r in found] == out.lengths.tolist()
    assert [r["value"] for r in found] == pytest.approx(out.values.tolist(), abs=1e-4)


def test_info_says_what_works(run) -> None:
    (found,) = (run("info", "--json", lines=False),)
    found = json.loads(found)
    assert found["packages"]["torch"] == torch.__version__
    assert found["backends"]["cpu"]["reference"] is None
    assert set(found["backends"]["cpu"]) == {"reference", "native", "triton"}
    text = run("info", lines=False)
    assert "reference on cpu" in text
    assert "works" in text


def test_the_module_runs_too(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["crossfade", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("crossfade", run_name="__main__")
    assert "generate" in capsys.readouterr().out


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
    "output exists": (["generate", "a", "--model={base}", "--output={file}"], "exists"),
    "not our file": (
        ["generate", "a", "--model={base}", "--output={file}", "--resume"],
        "not a line of such a file",
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
        "x.json is JSON; it must be .jsonl",
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
    "search for what": (["generate", "a", "--model={base}", "--best-of=2"], "--value goes with"),
    "value for what": (["generate", "a", *TWO, "--blend=a", "--value=b-a"], "--value goes with"),
    "no reference": (
        ["generate", "a", *TWO, "--blend=a", "--value=b+a", "--best-of=2"],
        "less one reference",
    ),
    "greedy search": (
        ["generate", "a", *TWO, "--blend=a", "--value=b-a", "--best-of=2", "--greedy"],
        "a search draws its rows",
    ),
}


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory\nframes"), MemoryError()]
)
def test_memory_that_runs_out_is_said_in_a_line(
    paths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def generate(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("crossfade.decoding.generate", generate)
    assert cli.main(["generate", "a", f"--model={paths['base']}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, "no bar is shown for what has failed at once"
    assert said[0].startswith("crossfade generate: error: ")
    assert "memory" in said[0]


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
        training.save_value_head(training.value_model(loaded(paths["base"])[0]), names["head"])
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


@pytest.mark.parametrize("argv", [["nope"], [], ["generate", "--batch-size=0"], ["bench", "x"]])
def test_argparse_refuses_what_it_does_not_know(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "usage: crossfade" in capsys.readouterr().err


def test_a_traceback_is_shown_on_request(paths) -> None:
    with pytest.raises(ValueError, match="--blend is missing"):
        cli.main(["inspect", "--traceback", *(p.format(**paths) for p in TWO)])


def test_models_of_different_vocabularies_are_refused(
    tmp_path: Path, paths, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_model(tmp_path / "other", 0, [*WORDS[:10], "other", *WORDS[11:]])
    models = [f"--model=a={paths['base']}", f"--model=b={other}", "--blend", "a + b"]
    assert cli.main(["generate", "a", "--greedy", *models]) == 2
    assert "'other'" in capsys.readouterr().err


def test_pickled_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(make_model(tmp_path / "pickled", 0))
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert cli.main(["generate", "a", f"--model={folder}"]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_code_of_a_model_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(make_model(tmp_path / "remote", 0))
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nC = M = None\n")
    assert cli.main(["generate", "a", f"--model={folder}"]) == 2
    assert not (tmp_path / "ran").exists()
    assert "Traceback" not in capsys.readouterr().err
