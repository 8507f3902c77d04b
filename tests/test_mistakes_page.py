"""docs/mistakes.md quotes what is read after each mistake, which is made here."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import cli
from tiny_models import lora, make, make_letters, make_tokenizer
from transformers import LlamaForSequenceClassification

PAGE = (Path(__file__).parent.parent / "docs" / "mistakes.md").read_text()
QUOTES = dict(
    re.findall(r"(?m)^\| (.+?) \| (?:a warning: |the usage of .*?, and )?`(.*)` \|$", PAGE)
)
PAIR = ["--model=base=smollm2", "--model=kind=smollm2@sentiment"]
CHAT = [{"role": "user", "content": "hi"}]
TEXTS = ["the plot", "the cast"]


def said(mistake: Callable[[], Any]) -> str:
    """The message of the error, or of the warnings, that a mistake leads to."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            mistake()
        except (TypeError, ValueError, AttributeError, NotImplementedError) as error:
            return str(error)
    return " ".join(str(w.message) for w in caught)


def check(typed: str, message: str) -> None:
    """Require that the parts of the quotation between its dots are said, one after the other."""
    at = 0
    for part in QUOTES[typed].split("…"):
        found = message.find(part.strip(" "), at)
        assert found >= 0, f"{typed}: {part!r} is not in {message!r}"
        at = found + len(part.strip(" "))


def generate(**arguments: Any) -> Callable[[], Any]:
    return lambda: cf.generate(make("llama", 0), [[5, 6]], max_new_tokens=2, **arguments)


def asked(inputs: Any) -> Callable[[], Any]:
    term = cf.Model(make("llama", 0), tokenizer=make_tokenizer())
    return lambda: cf.generate(term, inputs, max_new_tokens=2)


ARGUMENTS = {
    "`cf.generate(..., max_tokens=64)`": {"max_tokens": 64},
    "`temprature=0.7`": {"temprature": 0.7},
    '`stop=["\\n"]`': {"stop": ["\n"]},
    "`n=4`": {"n": 4},
    "`num_beams=4`": {"num_beams": 4},
    "`best_of=3`": {"best_of": 3},
    "`stream=True`": {"stream": True},
    "`logprobs=5`": {"logprobs": 5},
    "`messages=[...]`": {"messages": CHAT},
    "`temperature=0.7` without `do_sample=True`": {"temperature": 0.7},
    "`generation_config={...}`": {"generation_config": {}},
    '`draft="prompt"`': {"draft": "prompt"},
    "`assistant_model=small`": {"assistant_model": make("llama", 1)},
    "`prompt_lookup_num_tokens=8`": {"prompt_lookup_num_tokens": 8},
    '`prediction="a text"`': {"prediction": "a text"},
    "`draft=cf.Draft(texts=[...])` of two texts, and one prompt": {
        "draft": cf.Draft(texts=[[5], [6]])
    },
    '`draft=cf.Draft("answer")` in `cf.generate`': {"draft": cf.Draft("answer")},
}


@pytest.mark.parametrize("typed", ARGUMENTS)
def test_arguments_of_generate(typed: str) -> None:
    check(typed, said(generate(**ARGUMENTS[typed])))


def base_and_others() -> list[cf.Model]:
    return [cf.Model(make("llama", i), name=name) for i, name in enumerate(("base", "a", "b"))]


def far_blend() -> Any:
    base, a, b = base_and_others()
    for term in (base, a, b):
        with torch.no_grad():
            term.model.get_output_embeddings().weight.mul_(6)
    return cf.generate(base + 20 * (a - b), [[5, 6]] * 8, max_new_tokens=8, min_new_tokens=8)


def hooked() -> Any:
    model, tokenizer = make("llama", 0), make_tokenizer()
    pirate = cf.Model(model, tokenizer=tokenizer, system="x", name="pirate")
    plain = cf.Model(model, tokenizer=tokenizer, name="plain")
    return model.generate(
        torch.tensor([[5, 6]]), custom_generate=cf.decode, blend=plain + pirate, max_new_tokens=2
    )


def classifier() -> Any:
    return LlamaForSequenceClassification(make("llama").config)


def algebra(make_mistake: Callable[[Any, Any, Any], Any]) -> Callable[[], Any]:
    return lambda: make_mistake(*base_and_others())


FORM = cf.JudgeTemplate(labels=("great", "awful"), principle="bright")


def judge(**arguments: Any) -> cf.Judge:
    return cf.Judge(make(), tokenizer=make_tokenizer(), **{"template": FORM, **arguments})


def edits() -> cf.MetaAligner:
    return cf.MetaAligner(make(), make_tokenizer())


def correct(answers: Any = ("the plot",), *, aligner: Any = None, **asked: Any) -> Any:
    aligner = edits() if aligner is None else aligner
    asked = {"objectives": "brevity", "max_new_tokens": 2, **asked}
    return cf.correct(aligner, ["the film"], answers, asked.pop("objectives"), **asked)


def f(prompts: list[Any], responses: list[str]) -> list[float]:
    return [-len(text) for text in responses]


def swept(methods: Any = None, rewards: Any = None, **arguments: Any) -> Callable[[], Any]:
    term = cf.Model(make("llama", 0), tokenizer=make_tokenizer())
    methods, rewards = methods or {"a": lambda w: term}, rewards or {"r": f}
    arguments = {"max_new_tokens": 2, **arguments}
    return lambda: cf.pareto.sweep(methods, ["the film"], rewards, **arguments)


def drafted_by_others() -> Any:
    term = cf.Model(make("llama", 0), tokenizer=make_tokenizer())
    other = cf.Model(make("gpt2", 1), tokenizer=make_letters(), name="small")
    return cf.generate(term, [[5, 6]], draft=cf.Draft(other), max_new_tokens=2)


def adapter(name: str, base: str = "", **options: Any) -> Path:
    """The folder of an adapter, which says that it is of some base."""
    model = lora(0, make(), name, **{"modules": ["q_proj"], **options})
    model.peft_config[name].base_model_name_or_path = base
    model.save_pretrained(".", save_embedding_layers=False)
    return Path(name)


def policy(adapters: Any = None, **options: Any) -> cf.ConditionedPolicy:
    adapters = adapters or {name: adapter(name) for name in ("helpful", "brief")}
    return cf.ConditionedPolicy.from_adapters(make(), adapters, **options)


def three_prompts() -> Any:
    term = policy().at({"helpful": [1.0, 0.5], "brief": [0.0, 0.5]})
    return cf.generate(term, [[5, 6]] * 3, max_new_tokens=2)


MISTAKES: dict[str, Callable[[], Any]] = {
    '`policy.at({"helpful": 0.7, "brief": 0.2})`': lambda: policy().at(
        {"helpful": 0.7, "brief": 0.2}
    ),
    '`policy.at({"helpful": 1.5, "brief": -0.5})`': lambda: policy().at(
        {"helpful": 1.5, "brief": -0.5}
    ),
    '`policy.at({"helpfull": 1.0})`': lambda: policy().at({"helpfull": 1.0}),
    '`policy.at({"helpful": 1.0}, kl=1.5)`': lambda: policy().at({"helpful": 1.0}, kl=1.5),
    "`policy.at` with weights of two requests, and three prompts": three_prompts,
    "`policy.merged` with weights a request": lambda: policy().merged(
        {"helpful": [1.0, 0.5], "brief": [0.0, 0.5]}
    ),
    "`cf.generate(policy, prompts)`": lambda: cf.generate(policy(), [[5, 6]]),
    "`from_adapters` with adapters of two bases": lambda: policy(
        adapters={"helpful": adapter("helpful", "me/one"), "brief": adapter("brief", "me/two")}
    ),
    '`from_adapters(..., scope="head")`, and adapters elsewhere': lambda: policy(scope="head"),
    "`from_adapters` with a DoRA": lambda: policy(
        adapters={"helpful": adapter("helpful", use_dora=True)}
    ),
    '`cf.pareto.sweep({"a": model}, ...)`': swept({"a": make()}),
    '`sweep(..., weights={"r": 1.0})`': swept(weights={"r": 1.0}),
    "`sweep(..., search=cf.BestOfN(4, f))`": swept(search=cf.BestOfN(4, f)),
    "a reward of a sweep that raises at once": swept(rewards={"r": lambda p, r: [1 / 0]}),
    "`front.hypervolume([0.0])` of two rewards": lambda: swept(
        rewards={"r": f, "s": f}, weights=2
    )().hypervolume([0.0]),
    '`{"role": "User", "content": ...}`': asked([{"role": "User", "content": "hi"}]),
    '`{"role": "user", "text": ...}`': asked([{"role": "user", "text": "hi"}]),
    "one message in place of a chat": asked({"role": "user", "content": "hi"}),
    '`cf.Model("smollm2")`': lambda: cf.Model("smollm2"),
    "`cf.Model(lm, tok)`": lambda: cf.Model(make(), make_tokenizer()),  # type: ignore[misc]
    '`cf.Model(peft_model, adapter="sentment")`': lambda: cf.Model(
        lora(0, make(), "sentiment"), adapter="sentment"
    ),
    "`cf.Modle`": lambda: cf.Modle,  # type: ignore[attr-defined]
    "`a * b`": algebra(lambda base, a, b: a * b),
    "`a + cf.Reward(f)`": algebra(lambda base, a, b: a + cf.Reward(f)),
    "`cf.BestOfN(4, tuned - ref)`": algebra(
        lambda base, a, b: cf.BestOfN(
            4, cf.Model(a.model, name="tuned") - cf.Model(b.model, name="ref")
        )
    ),
    "`cf.BestOfN(4, classifier)`": lambda: cf.BestOfN(4, classifier()),
    "`cf.Reward(lambda r: 1.0)`": lambda: cf.Reward(lambda r: 1.0),  # type: ignore
    "`base + 20 * (a - b)`": far_blend,
    "`blend.save(...)` of a model made in memory": algebra(
        lambda base, a, b: (base + a).save("nowhere.json")
    ),
    "`custom_generate=cf.decode` and a system prompt": hooked,
    "`cf.Judge(model)` without a tokenizer": lambda: cf.Judge(make()),
    "`cf.Judge(..., temperature=0)`": lambda: judge(temperature=0),
    '`cf.Judge(..., principles=["helpfull"])`': lambda: judge(
        template="hh", principles=["helpfull"]
    ),
    '`JudgeTemplate(labels=("Text A", "Text B"))`': lambda: judge(
        template=cf.JudgeTemplate(labels=("Text A", "Text B"))
    ),
    "`judge(prompts=..., chosen=..., rejected=...)`": lambda: judge()(
        prompts=TEXTS, chosen=TEXTS, rejected=TEXTS
    ),
    "`judgments[0]`": lambda: judge()(TEXTS, TEXTS, TEXTS)[0],
    "`judge(chat, a, b)`": lambda: judge()(CHAT, ["the plot"], ["the cast"]),
    '`judge(prompts, answers, [""])`': lambda: judge()(["the film"], ["the plot"], [""]),
    "`cf.Tournament(model)`": lambda: cf.Tournament(make()),
    "`judgments.accuracy([-1, 1])`": lambda: judge()(TEXTS, TEXTS, TEXTS).accuracy([-1, 1]),
    "`search=judge`": lambda: generate(search=judge())(),
    "`cf.MetaAligner(model)` without a tokenizer": lambda: cf.MetaAligner(make()),
    '`cf.correct(model, queries, answers, "brevity")`': lambda: correct(aligner=make()),
    '`cf.correct(..., objectives=["brevty"])`': lambda: correct(objectives=["brevty"]),
    '`cf.correct(..., objectives=[["brevity"], ["humour"]])` of one query': lambda: correct(
        objectives=[["brevity"], ["humour"]]
    ),
    "`cf.correct(aligner, queries, [None], ...)`": lambda: correct([None]),
    '`cf.correct(aligner, queries, [""], ...)`': lambda: correct([""]),
    "`cf.correct(aligner, queries, answers)`": lambda: cf.correct(edits(), TEXTS, TEXTS),
    "`aligner(queries, answers, objectives)`": lambda: edits()(TEXTS, TEXTS, ["brevity"]),
    "`cf.correct(..., accept=judge)`": lambda: correct(accept=judge()),
    "`cf.correct(..., tokenizer=tokenizer)`": lambda: correct(tokenizer=make_tokenizer()),
    "`cf.Draft(model, num_speculative_tokens=8)`": lambda: cf.Draft(
        make(), num_speculative_tokens=8
    ),  # type: ignore[call-arg]
    '`cf.Draft("promt")`': lambda: cf.Draft("promt"),
    '`cf.Draft(texts="a text")`': lambda: cf.Draft(texts="a text"),
    "a draft of another vocabulary": drafted_by_others,
    '`cf.correct(..., draft="prompt")`': lambda: correct(draft="prompt"),
    "`out[0]`": lambda: cf.generate(make(), [[5, 6]], max_new_tokens=1)[0],
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("typed", MISTAKES)
def test_mistakes_in_python(typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(typed, said(MISTAKES[typed]))


CORRECT = ["correct", "query.jsonl", "--aligner=smollm2"]
FRONT = ["pareto", "--output=out", "--config=pareto.yaml"]
DYNAMICS = ["--model=smollm2", "--output=report.html"]
SETTINGS = "models: {base: smollm2}\nmethods: {a: w_kind * base}\nrewards: {r: 'rewards:brevity'}\n"

COMMANDS: dict[str, list[str]] = {
    "`pareto`: `w_kind` in a formula, where `r` is a reward": FRONT,
    "`pareto`: `max_new_tokens` at the top": FRONT,
    "`pareto`: `policies` at the top": FRONT,
    "`dynamics`: `behavior` in the lines": ["dynamics", "rows.jsonl", *DYNAMICS],
    "`dynamics`: labels of one side alone": ["dynamics", "sides.jsonl", *DYNAMICS],
    '`dynamics`: `"label": "yes"`': ["dynamics", "labels.jsonl", *DYNAMICS],
    "`dynamics`: `--balanced` over the data": [
        "dynamics",
        "labels.jsonl",
        *DYNAMICS,
        "--balanced=labels.jsonl",
    ],
    "`crossfade genrate`": ["genrate"],
    "`generate --temprature 1`": ["generate", "hi", *PAIR[:1], "--temprature=1"],
    "`--model smolm2`": ["generate", "hi", "--model=smolm2"],
    "two models without `--blend`": ["generate", "hi", *PAIR],
    '`--blend "base + w * (kind - bas)"`': [*PAIR, "--blend=base + w * (kind - bas)"],
    "a fader without `--fader`": [*PAIR, "--blend=base + w * (kind - base)"],
    '`--blend "dear(base, kind, 0.5)"`': [*PAIR, "--blend=dear(base, kind, 0.5)"],
    "`--best-of 4` alone": ["generate", "hi", *PAIR[:1], "--best-of=4"],
    "`--reward rewards:brevty`": [*PAIR[:1], "--reward=rewards:brevty", "--best-of=2"],
    "`max_tokens` in a line of `--prompts`": [*PAIR[:1], "--prompts=p.jsonl"],
    "`--tournament 4` alone": [*PAIR[:1], "--tournament=4"],
    "`--judge base` alone": [*PAIR[:1], "--judge=base"],
    "`--judge bas --tournament 4`": [*PAIR[:1], "--judge=bas", "--tournament=4"],
    "`--template HH`": ["judge", "pair.jsonl", *PAIR[:1], "--template=HH"],
    "`--draft promt`": [*PAIR[:1], "--draft=promt"],
    "`--draft-length 8` alone": [*PAIR[:1], "--draft-length=8"],
    "`judge`: `--principle polite`": ["judge", "pair.jsonl", *PAIR[:1], "--principle=polite"],
    "`judge`: `response_a` in a line": ["judge", "named.jsonl", *PAIR[:1]],
    "`judge`: `first` and `chosen` in a line": ["judge", "both.jsonl", *PAIR[:1]],
    "`correct`: `--objective brevty`": [*CORRECT, "--objective=brevty"],
    "`correct`: no `answer` in a line, no `--policy`": [*CORRECT, "--objective=brevity"],
    "`correct`: `--accept rewards:brevity`": [
        *CORRECT[:1],
        "answered.jsonl",
        *CORRECT[2:],
        "--objective=brevity",
        "--accept=rewards:brevity",
    ],
    "`correct`: `--reward rewards:brevity` alone": [*CORRECT, "--reward=rewards:brevity"],
}


@pytest.mark.parametrize("typed", COMMANDS)
def test_mistakes_on_the_command_line(
    typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rewards", raising=False)
    Path("rewards.py").write_text("def brevity(prompts, responses):\n    return [0.0]\n")
    Path("p.jsonl").write_text('{"prompt": "hi", "max_tokens": 3}\n')
    Path("pair.jsonl").write_text('{"prompt": "a", "first": "b", "second": "c"}\n')
    Path("named.jsonl").write_text('{"prompt": "a", "response_a": "b", "response_b": "c"}\n')
    Path("both.jsonl").write_text('{"prompt": "a", "first": "b", "second": "c", "chosen": "b"}\n')
    Path("query.jsonl").write_text('{"prompt": "a"}\n')
    Path("answered.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    Path("rows.jsonl").write_text('{"behavior": "kindness", "text": "a", "label": true}\n')
    Path("sides.jsonl").write_text('{"behaviour": "kindness", "text": "a", "label": true}\n')
    Path("labels.jsonl").write_text('{"behaviour": "kindness", "text": "a", "label": "yes"}\n')
    added = [key for key in ("max_new_tokens", "policies") if key in typed]
    more = "".join(f"{key}: 3\n" for key in added)
    Path("pareto.yaml").write_text(f"{SETTINGS}prompts: [hi]\n{more}")
    argv = COMMANDS[typed]
    if argv[0].startswith("--"):
        argv = ["generate", *([] if "--prompts=p.jsonl" in argv else ["hi"]), *argv]
    with contextlib.suppress(SystemExit):  # wrong options leave as argparse does
        assert cli.main(argv) == 2
    check(typed, capsys.readouterr().err)


def test_every_mistake_of_the_page_is_made_here_or_where_training_is_tested() -> None:
    made = {*ARGUMENTS, *MISTAKES, *COMMANDS}
    assert made < set(QUOTES)
    assert all(x.startswith(("`train`", "lm-eval")) for x in set(QUOTES) - made)
    assert len(QUOTES) >= 30
