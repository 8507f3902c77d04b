"""Any number of prompts through one loop: each gets what it gets alone, and no place waits."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.bulk.decode import decode
from crossfade.bulk.records import seed_of
from crossfade.decoding.engine.group import Group
from crossfade.decoding.job import Job
from sweeps import product
from tiny_models import EOS, make, make_letters, make_tokenizer
from transformers import PreTrainedModel

DRAW: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": True,
    "eos_token_id": [EOS, 20, 30, 40, 50],
}
PROMPTS = [[7 + i % 40, *range(5, 6 + i % 7), 30 - i % 20] for i in range(50)]


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return make("llama", 0)


def alone(blend: Any, i: int, **more: Any) -> cf.Output:
    out = cf.generate(blend, [PROMPTS[i]], seed=[seed_of(3, i)], progress=False, **{**DRAW, **more})
    assert isinstance(out, cf.Output)
    return out


ENGINES = pytest.mark.parametrize(
    "engine", [None, cf.Engine(simple=True)], ids=["engine", "simple"]
)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "samples": {"num_return_sequences": 3},
    "processors": {"repetition_penalty": 1.3},
    "whole length": {"max_new_tokens": None, "max_length": 14},
    "stop strings": {"stop_strings": ["a", "nd"], "tokenizer": make_letters()},
    "terms": {"return_term_logprobs": True, "return_pushes": True, "return_kl_to_base": True},
}


@pytest.mark.parametrize(("kind", "simple"), product(list(KINDS), [False, True], together=1))
def test_each_prompt_gets_what_it_gets_alone(
    kind: str, simple: bool, base: PreTrainedModel
) -> None:
    engine = cf.Engine(simple=simple)
    blend = cf.Model(base) + 0.5 * cf.Model(make("gpt2", 1))
    found = dict(
        decode(blend, PROMPTS, seed=3, max_batch=4, engine=engine, **{**DRAW, **KINDS[kind]})
    )
    assert found.keys() == set(range(50))
    for i in range(0, 50, 7):
        theirs = alone(blend, i, **KINDS[kind])
        assert torch.equal(found[i].sequences, theirs.sequences)
        assert found[i].text == theirs.text
        torch.testing.assert_close(found[i].logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)
        for name in ("term_logprobs", "pushes", "kl_to_base"):
            ours, own = getattr(found[i], name), getattr(theirs, name)
            if own is not None:
                torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)


@ENGINES
def test_a_search_over_prompts_of_any_number(engine: Any, base: PreTrainedModel) -> None:
    """Prompts come and go, while the value reads their texts and log-probs of another model."""
    tokenizer = make_tokenizer()
    words = cf.Reward(lambda prompts, texts: [float(len(set(t.split()))) for t in texts])
    value = 0.5 * words + 1.0 * cf.LogRatio(cf.Model(make("gpt2", 1)), cf.Model(make("qwen3", 2)))
    search = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=3, value=value)
    more = {"search": search, "tokenizer": tokenizer}
    found = dict(decode(base, PROMPTS[:12], seed=3, max_batch=8, engine=engine, **DRAW, **more))
    for i in range(12):
        theirs = alone(base, i, engine=engine, **more)
        assert torch.equal(found[i].sequences, theirs.sequences)
        torch.testing.assert_close(found[i].values, theirs.values, atol=1e-3, rtol=1e-3)


def test_what_a_value_has_for_each_prompt(base: PreTrainedModel) -> None:
    """The weights of its parts, and the prompts of its models, also of one with its own tokens."""
    tokenizer, letters = make_tokenizer(), make_letters()
    weights = torch.linspace(-1, 1, 12)
    tuned = [cf.Model(make("gpt2", 1), prompt=[[9 + i] for i in range(12)])]
    tuned += [cf.Model(make("qwen3", 3), prompt=["abc"[: 1 + i % 3] for i in range(12)])]
    ref = cf.Model(make("qwen3", 2))

    def search(i: int | None) -> cf.ChunkBeamSearch:
        a, b = (m if i is None else dataclasses.replace(m, prompt=[m.prompt[i]]) for m in tuned)
        b = dataclasses.replace(b, tokenizer=letters)
        w = weights if i is None else float(weights[i])
        value = w * cf.LogRatio(a, ref) + (1 - w) * cf.LogRatio(b, ref)
        return cf.ChunkBeamSearch(width=2, samples=2, chunk_length=3, value=value)

    more = {"tokenizer": tokenizer, "skip": {0, 3}, "search": search(None)}
    found = dict(decode(base, PROMPTS[:12], seed=3, max_batch=8, **DRAW, **more))
    assert found.keys() == set(range(12)) - {0, 3}
    for i in (1, 4, 11):
        theirs = alone(base, i, tokenizer=tokenizer, search=search(i))
        assert torch.equal(found[i].sequences, theirs.sequences)
        torch.testing.assert_close(found[i].values, theirs.values, atol=1e-3, rtol=1e-3)


def test_a_search_gives_no_log_probs_of_terms_that_nobody_asked_for(base: PreTrainedModel) -> None:
    """Its value needs them where its models are terms of the blend."""
    guide = cf.Model(make("gpt2", 1))
    ratio = cf.LogRatio(guide, cf.Model(base))
    search = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=3, value=ratio)
    blend = cf.Model(base) + 0.5 * guide
    for asked in (False, True):
        more: dict[str, Any] = {"search": search, "return_term_logprobs": asked}
        for _, out in decode(blend, PROMPTS[:3], max_batch=4, **DRAW, **more):
            assert (out.term_logprobs is not None) == asked


@ENGINES
def test_outputs_say_what_it_cost_so_far(engine: Any, base: PreTrainedModel) -> None:
    """Each output's statistics but for its tokens are of all that was decoded before it."""
    costs = [out.stats for _, out in decode(base, PROMPTS[:9], max_batch=3, engine=engine, **DRAW)]
    for a, b in itertools.pairwise(costs):
        assert 0 < a.seconds <= b.seconds
        assert 0 < a.models[0].forwards <= b.models[0].forwards
        assert 0 < a.models[0].tokens <= b.models[0].tokens
        assert 0 < a.peak_bytes <= b.peak_bytes
        assert a.cache_bytes > 0
    read, written = sum(map(len, PROMPTS[:9])), sum(cost.tokens for cost in costs)
    assert costs[-1].models[0].tokens == read + written - 9  # Nobody reads a row's last token.


@pytest.mark.parametrize("kind", ["prompt", "texts", "a model", "a blend with weights a prompt"])
def test_drafted_prompts_get_what_they_get_without(kind: str, base: PreTrainedModel) -> None:
    """What guesses is there for each prompt, whenever that takes a place."""
    guide = cf.Model(make("gpt2", 1))
    blend = cf.Model(base) + 0.5 * guide
    plain = dict(decode(blend, PROMPTS[:20], seed=3, skip={2}, max_batch=4, **DRAW))
    again = [plain[i].responses[0] if i % 3 and i != 2 else None for i in range(20)]
    draft = {
        "prompt": cf.Draft("prompt", length=3),
        "texts": cf.Draft(texts=again, length=3),
        "a model": cf.Draft(guide, length=3),
        "a blend with weights a prompt": cf.Draft(
            cf.Model(base) + torch.linspace(0, 1, 20) * guide, length=3
        ),
    }[kind]
    found = dict(decode(blend, PROMPTS[:20], seed=3, skip={2}, max_batch=4, draft=draft, **DRAW))
    assert found.keys() == plain.keys()
    by_draft = {}
    for i, out in found.items():
        assert torch.equal(out.sequences, plain[i].sequences)
        assert out.tokens_by_draft is not None
        by_draft[i] = int(out.tokens_by_draft)
    last = max(found.values(), key=lambda out: out.stats.rounds).stats
    assert last.right == sum(by_draft.values()), "of all so far"
    if kind == "texts":
        for i, tokens in by_draft.items():
            # The last token is read by nobody, and an end is not guessed.
            assert (tokens > 0) == (again[i] is not None and len(again[i]) > 1)


def test_what_each_prompt_has_of_its_own(base: PreTrainedModel) -> None:
    """Weights, prompts of terms and lists of settings have an entry for each of all prompts."""
    weights = torch.linspace(0, 1, 50)
    guide = cf.Model(make("gpt2", 1), prompt=[[9 + i] for i in range(50)])
    more = {"temperature": [0.0 if i % 3 else 0.7 for i in range(50)]}
    lengths = [1 + i % 9 for i in range(50)]
    skip = set(range(0, 50, 5))
    found = dict(
        decode(
            cf.Model(base) + weights * guide,
            PROMPTS,
            seed=3,
            skip=skip,
            max_batch=4,
            **{**DRAW, **more, "max_new_tokens": lengths},
        )
    )
    assert found.keys() == set(range(50)) - skip
    for i in (1, 6, 19, 48):
        own = cf.Model(base) + float(weights[i]) * cf.Model(guide.model, prompt=[9 + i])
        changed = {"temperature": [more["temperature"][i]], "max_new_tokens": lengths[i]}
        assert torch.equal(found[i].sequences, alone(own, i, **changed).sequences)
    with pytest.raises(ValueError, match="temperature has 2 entries; it must have 50"):
        list(decode(base, PROMPTS, **{**DRAW, "temperature": [0.5, 0.7]}))


def test_no_place_waits_for_others(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long response makes nobody wait: there are no more steps than the tokens need."""
    steps = 0
    step = Group.step

    def counted(self: Group, *args: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(self, *args)

    monkeypatch.setattr(Group, "step", counted)
    lengths = [30 if i % 10 == 0 else 2 for i in range(40)]
    arguments = {"max_new_tokens": lengths, "eos_token_id": None, "do_sample": False}
    outputs = list(decode(base, PROMPTS[:40], max_batch=4, **arguments))
    assert [i for i, _ in outputs] != sorted(range(40))
    assert sum(out.stats.tokens for _, out in outputs) == sum(lengths)
    # Ten batches that wait for their longest rows would take 30 steps each. A loop that never
    # drains takes a step for every four tokens, and in the end those of the row that began last.
    assert steps <= sum(lengths) / 4 + 30


def test_prompts_are_taken_as_places_become_free(base: PreTrainedModel) -> None:
    taken = 0

    def prompts() -> Iterator[list[int]]:
        nonlocal taken
        for i in itertools.count():
            taken += 1
            yield PROMPTS[i % 50]

    found = decode(base, prompts(), max_batch=4, **DRAW)
    for _ in range(30):
        next(found)
    assert taken <= 30 + 3 * 4
    found.close()  # type: ignore[attr-defined]


def test_what_was_given_is_not_held(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs whose prompts are done are freed, without a garbage collection."""
    made: list[weakref.ref[Job]] = []
    init = Job.__init__

    def remembered(self: Job, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Job, "__init__", remembered)
    gc.collect()
    gc.disable()
    try:
        most = 0
        for _, _out in decode(base, (PROMPTS[i % 50] for i in range(120)), max_batch=4, **DRAW):
            most = max(most, sum(job() is not None for job in made))
        assert len(made) == 30
        assert most <= 6
    finally:
        gc.enable()


def test_an_interrupt_gives_what_had_ended(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = dict(decode(base, PROMPTS, seed=3, max_batch=4, **DRAW))
    step, count = Group.step, iter(range(10**6))

    def failing(self: Group, *args: Any) -> Any:
        if next(count) == 40:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(Group, "step", failing)
    found: dict[int, cf.Output] = {}
    with pytest.raises(KeyboardInterrupt):
        found.update(decode(base, PROMPTS, seed=3, max_batch=4, **DRAW))
    assert 4 < len(found) < 50
    for i, out in found.items():
        assert torch.equal(out.sequences, whole[i].sequences)


@pytest.mark.filterwarnings("ignore:request:RuntimeWarning")
def test_memory_and_models_that_the_engine_cannot_run(
    base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows under way begin again, whichever jobs they are of, and what had ended stays."""
    whole = dict(decode(base, PROMPTS, seed=3, max_batch=6, **DRAW))
    step, count = Group.step, iter(range(10**6))

    def failing(self: Group, *args: Any) -> Any:
        if next(count) == 25:
            raise MemoryError("std::bad_alloc")
        return step(self, *args)

    monkeypatch.setattr(Group, "step", failing)
    found = list(decode(base, PROMPTS, seed=3, max_batch=6, **DRAW))
    assert sorted(i for i, _ in found) == list(range(50))
    for i, out in found:
        assert torch.equal(out.sequences, whole[i].sequences)
    assert found[-1][1].stats.notes == ("memory ran out: 3 rows at a time",)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompts": "a text"}, TypeError, "prompts is a str"),
        ({"prompts": 3}, TypeError, "prompts is a int"),
        ({"streamer": print}, NotImplementedError, "streamer is not supported"),
        ({"return_cache": True}, NotImplementedError, "return_cache is not supported"),
        ({"max_batch": 0}, ValueError, "max_batch is 0"),
        ({"progress": True}, TypeError, "progress is a bool"),
        ({"engine": 3}, TypeError, "engine is a int"),
        ({"max_tokens": 3}, TypeError, "unknown argument 'max_tokens'"),
        ({"draft": "prompt"}, TypeError, "draft is a str; it must be a crossfade.Draft"),
        (
            {"draft": cf.Draft("prompt"), "engine": cf.Engine(simple=True)},
            ValueError,
            "engine is simple, which reads a token at a time; leave draft out",
        ),
    ],
    ids=lambda x: str(x) if isinstance(x, str) else "",
)
def test_mistakes_are_said_before_the_first_prompt(
    arguments: dict[str, Any], error: type[Exception], message: str, base: PreTrainedModel
) -> None:
    with pytest.raises(error, match=message):
        decode(base, arguments.pop("prompts", PROMPTS), **arguments)


def test_a_bad_prompt_is_named_by_its_place(base: PreTrainedModel) -> None:
    prompts = [*PROMPTS[:9], [3, 99], *PROMPTS[:3]]
    with pytest.raises(ValueError, match="id 99 for"):
        list(decode(base, prompts, max_batch=4, **DRAW))


def test_no_prompts(base: PreTrainedModel) -> None:
    assert list(decode(base, [], **DRAW)) == []
    assert list(decode(base, PROMPTS, skip=range(50), **DRAW)) == []


def test_entries_for_each_request_need_the_number_of_prompts(base: PreTrainedModel) -> None:
    """They are held against it at the call, before anything is decoded."""
    generator = (prompt for prompt in PROMPTS[:4])
    lists = {"max_new_tokens": [1, 2], "do_sample": False}
    with pytest.raises(ValueError, match=r"max_new_tokens has an entry .* prompts is a generator"):
        decode(base, generator, **lists)
    with pytest.raises(ValueError, match="max_new_tokens has 2 entries; it must have 4"):
        decode(base, PROMPTS[:4], **lists)
    weighed = cf.Model(base) + torch.ones(3) * cf.Model(make("gpt2", 1), name="guide")
    with pytest.raises(ValueError, match="the weight of guide has an entry for each request"):
        decode(weighed, generator)
    with pytest.raises(
        ValueError, match=r"the weight of guide is a tensor \[3\]; it must be \[4\]"
    ):
        decode(weighed, PROMPTS[:4])
    value = torch.ones(3) * cf.Reward(lambda prompts, texts: [1.0] * len(texts), name="brief")
    more = {"search": cf.BestOfN(2, value), "tokenizer": make_tokenizer(), "do_sample": True}
    with pytest.raises(ValueError, match="the weight of brief has an entry for each request"):
        decode(base, generator, **more)
    with pytest.raises(
        ValueError, match=r"the weight of brief is a tensor \[3\]; it must be \[4\]"
    ):
        decode(base, PROMPTS[:4], **more)
    texts: Any = {"draft": cf.Draft(texts=[[5], None, [6]])}
    with pytest.raises(ValueError, match=r"draft\.texts has an entry .* prompts is a generator"):
        decode(base, generator, **texts)
    with pytest.raises(ValueError, match="texts has 3 entries; it must have 4, one a prompt"):
        decode(base, PROMPTS[:4], **texts)
    guess: Any = {"draft": cf.Draft(weighed)}
    with pytest.raises(ValueError, match=r"the weight of guide is a tensor \[3\]; it must be"):
        decode(base, PROMPTS[:4], **guess)
    own = cf.Model(base, prompt=[[5], [6]], name="base")
    with pytest.raises(ValueError, match="prompt of base is a list with an entry a request"):
        list(decode(own, generator, **DRAW))


@pytest.mark.parametrize("seed", ["x", None, 1.5, True, -1], ids=str)
def test_a_seed_is_a_number_or_one_for_each_prompt(seed: Any, base: PreTrainedModel) -> None:
    with pytest.raises((TypeError, ValueError), match="seed is"):
        decode(base, PROMPTS, seed=seed)
    with pytest.raises((TypeError, ValueError), match=r"seed\[1\] is"):
        decode(base, PROMPTS[:2], seed=[3, seed])
    with pytest.raises(ValueError, match="seed has 1 entries; it must have 50, one a prompt"):
        decode(base, PROMPTS, seed=[1])
    with pytest.raises(ValueError, match="seed has an entry for each request"):
        decode(base, iter(PROMPTS), seed=[1])


def test_prompts_draw_by_seeds_of_their_own(base: PreTrainedModel) -> None:
    """The place of a prompt does not matter then: equal prompts with equal seeds get one text."""
    prompts, seeds = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], [5, 5, 5, 6]
    found = dict(decode(base, prompts, seed=seeds, max_batch=2, **DRAW))
    expected = cf.generate(base, prompts, seed=seeds, **DRAW)
    assert [found[i].responses[0] for i in range(4)] == expected.responses
    assert expected.responses[0] == expected.responses[2] != expected.responses[3]


def test_a_prompt_that_is_none_is_named(base: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match=r"prompts\[5\] is 3"):
        list(decode(base, [*PROMPTS[:5], 3, *PROMPTS[:5]], max_batch=4, **DRAW))
    with pytest.raises(TypeError, match="skip is a int"):
        decode(base, PROMPTS, skip=5)  # type: ignore[arg-type]


def test_a_generator_may_be_begun_in_one_mode_and_gone_on_with_in_another(
    base: PreTrainedModel,
) -> None:
    whole = dict(decode(base, PROMPTS[:9], seed=3, max_batch=4, **DRAW))
    found = decode(base, PROMPTS[:9], seed=3, max_batch=4, **DRAW)
    with torch.no_grad():
        first = next(found)
    assert torch.is_grad_enabled()
    for i, out in (first, *found):
        assert torch.equal(out.sequences, whole[i].sequences)
        assert not out.logprobs.requires_grad
