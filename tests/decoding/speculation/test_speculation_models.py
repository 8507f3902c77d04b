"""Drafts that are always right or wrong, that fail, and that the engine cannot run."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.blends.blend import as_blend
from crossfade.decoding.call import Call
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.kv_cache import KVCache
from crossfade.decoding.engine.modules import Unsupported
from drafted import GREEDY, PROMPTS, SAMPLED, blend, both, check_same, model, noise
from streamers import Kept
from sweeps import every
from tiny_models import VOCAB, make
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel


def mirrored() -> PreTrainedModel:
    """A model that finds likeliest what the first one finds least likely."""
    found = copy.deepcopy(model())
    with torch.no_grad():
        found.lm_head.weight.neg_()
    return found


@pytest.mark.parametrize("length", every(2, [5, 1, "auto"]))
def test_always_wrong(length: Any) -> None:
    for draft in (
        cf.Draft(mirrored(), length=length),
        cf.Draft(texts=noise(5, 60, seed=3), length=length),
    ):
        stats = both(cf.Model(model()), PROMPTS, draft, **GREEDY, max_new_tokens=15).drafted.stats
        assert stats.right <= stats.guessed // 10


@pytest.mark.parametrize("length", every(2, [5, 1, "auto"]))
def test_always_right(length: Any) -> None:
    target = cf.Model(model())
    plain = cf.generate(target, PROMPTS, **GREEDY, max_new_tokens=15)
    for draft in (
        cf.Draft(texts=plain.responses, length=length),
        cf.Draft(target, length=length),
        cf.Draft(cf.Model(copy.deepcopy(model())), length=length),
    ):
        stats = both(target, PROMPTS, draft, **GREEDY, max_new_tokens=15).drafted.stats
        assert stats.right == stats.guessed
        assert stats.right > 0 or length == "auto"


class Wrapped(torch.nn.Module):
    """A model that is none of Transformers'."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, **arguments: Any) -> Any:
        return self.model(**arguments)


def raising() -> PreTrainedModel:
    """A model that raises when it is run."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    found = make("qwen3", 8)
    found.model.layers[0].register_forward_hook(fail)
    return found


STRANGE = {
    "is not a model of Transformers": lambda: Wrapped(make("llama", 3)),
    "is run as it is: model.layers.0 has a forward hook": raising,
}


@pytest.mark.parametrize("why", STRANGE)
def test_a_draft_that_the_engine_cannot_run(why: str) -> None:
    draft = cf.Draft(STRANGE[why](), length=3)
    found = both(blend(), PROMPTS, draft, **SAMPLED, max_new_tokens=8).drafted
    assert found.stats.notes == (f"no draft: draft.model0 {why}",)
    assert found.stats.rounds == 0
    assert found.tokens_by_draft.tolist() == [0] * len(PROMPTS)


def test_a_target_that_the_engine_cannot_run() -> None:
    for draft in (cf.Draft(model(), length=3), cf.Draft("prompt", length=3)):
        target = cf.Model(model("qwen3", 2)) + 0.5 * cf.ValueHead(Wrapped(make("llama", 3)))
        found = both(target, PROMPTS, draft, **SAMPLED, max_new_tokens=8).drafted
        assert "no draft: the simple path reads a token at a time" in found.stats.notes
        assert found.stats.rounds == 0
        assert found.tokens_by_draft.tolist() == [0] * len(PROMPTS)


@pytest.mark.parametrize("at", [0, 4, 9])
def test_the_engine_gives_up_on_the_way(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simple path begins anew, and tells a streamer nothing twice."""

    how = {**SAMPLED, "max_new_tokens": 9}
    first, feed = Kept(), Group.feed
    plain = cf.generate(blend(), PROMPTS[:1], streamer=first, **how)
    count = iter(range(10**6))

    def failing(self: Group, *args: Any, **options: Any) -> Any:
        if next(count) == at:
            raise Unsupported("it is a test")
        return feed(self, *args, **options)

    monkeypatch.setattr(Group, "feed", failing)
    second = Kept()
    draft = cf.Draft(blend().terms[0], length=2)
    out = cf.generate(blend(), PROMPTS[:1], draft=draft, streamer=second, **how)
    check_same(out, plain)
    assert first.told == second.told
    assert out.stats.notes[:2] == (
        "the simple path: it is a test",
        "no draft: the simple path reads a token at a time",
    )


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows at a time, which are guessed as well."""
    feed, failed = Group.feed, []

    def failing(self: Group, tokens: Any, *args: Any) -> Any:
        if len(tokens) > 2 and tokens.shape[1] > 1:
            failed.append(1)
            raise MemoryError
        return feed(self, tokens, *args)

    how = {**SAMPLED, "max_new_tokens": 9}
    plain = cf.generate(blend(), PROMPTS, **how)
    monkeypatch.setattr(Group, "feed", failing)
    out = cf.generate(blend(), PROMPTS, draft=cf.Draft(blend(), length=2), **how)
    check_same(out, plain)
    assert failed
    assert out.stats.notes == ("memory ran out: 2 rows at a time",)
    assert out.stats.right == sum(out.tokens_by_draft.tolist())


def small(context: int) -> PreTrainedModel:
    torch.manual_seed(4)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": context}
    ids = {"bos_token_id": 2, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, **sizes, **ids)).eval()


@pytest.mark.parametrize("length", every(2, [4, 1, 20]))
def test_a_draft_of_a_shorter_context(length: int) -> None:
    """Rows go on past it, unguessed; nothing is said of them, as nothing is missing."""
    how = {**SAMPLED, "max_new_tokens": [30, 4, 25, 6, 30], "max_batch": 2}
    tokens = max(map(len, PROMPTS)) + 6
    found = both(blend(), PROMPTS, cf.Draft(small(tokens), length=length), **how).drafted
    assert not found.stats.notes
    assert found.stats.guessed > 0


def test_the_target_guesses_as_far_as_its_context() -> None:
    """Rows that fill the context end as they do without a draft, with the same warning."""
    target = cf.Model(small(20))
    for draft in (
        cf.Draft(target, length=7),
        cf.Draft(cf.Model(copy.deepcopy(target.model)), length=7),
    ):
        with pytest.warns(RuntimeWarning, match="context of model0, 20 tokens, is full") as w:
            found = both(target, PROMPTS, draft, **SAMPLED, max_new_tokens=30)
        assert len(w) == 2 * len(PROMPTS)
        assert found.drafted.stats.acceptance == 1.0


def test_a_prompt_longer_than_the_drafts_context() -> None:
    found = both(blend(), PROMPTS, cf.Draft(small(10)), **SAMPLED, max_new_tokens=6).drafted
    longest = max(map(len, PROMPTS))
    said = f"no draft: a prompt has {longest} tokens for draft.model0, whose context is 10"
    assert found.stats.notes == (said,)
    assert not found.failed.any()


@pytest.mark.parametrize("kind", ["shared", "a model"])
def test_guesses_have_a_place_in_the_cache(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row near its end stands beside one that has just begun: nothing is written past it."""
    feed = Group.feed

    def checked(self: Group, tokens: Any, at: Any = None, slots: Any = None) -> Any:
        assert int(self.lengths.max()) + tokens.shape[1] <= self.cache.capacity
        return feed(self, tokens, at, slots)

    monkeypatch.setattr(Group, "feed", checked)
    prompts = [[5 + i % 50 for i in range(40)], [7, 8, 9], [10, 11, 12]]
    how = {**SAMPLED, "max_new_tokens": [24, 2, 24], "max_batch": 2}  # 64 positions in all
    draft = model() if kind == "shared" else model("qwen3", 8)
    both(cf.Model(model()), prompts, cf.Draft(draft, length=64), **how)


def test_guesses_have_a_place_in_the_context() -> None:
    """GPT-2 has 512 places for tokens, and the first row fills them."""
    prompts = [[5 + i % 50 for i in range(480)], [7, 8, 9], [10, 11, 12]]
    how = {**SAMPLED, "max_new_tokens": [32, 2, 32], "max_batch": 2}
    draft = cf.Draft(model("gpt2", 1), length=64)
    both(cf.Model(model()) + 0.3 * cf.Model(model("gpt2", 3)), prompts, draft, **how)


def test_rows_that_wait_while_others_are_guessed_keep_their_place() -> None:
    """What a row is to read first stays so while the models that guess read for others alone."""
    (term,) = Call(as_blend(model())).models
    group = Group([term], [0], slots=2, longest=3, limit=4)
    group.join([0, 1], [[7, 8, 9], [10, 11, 12]])
    group.read(each=True)
    group.begin([0, 1], [[7, 8, 9], [10, 11, 12]])
    with torch.no_grad():
        both_rows = group.feed(torch.zeros(2, 1, dtype=torch.int64))[:, 0].clone()
        group.keep(torch.tensor([1, 0]))
        assert group.fresh.tolist() == [False, True]
        again = group.feed(torch.zeros(2, 1, dtype=torch.int64))[:, 0]
    torch.testing.assert_close(again[1], both_rows[1])
    assert not torch.allclose(again[0], both_rows[0])


def test_caches_are_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """No circle of references keeps the models that guess, or their caches."""
    caches: list[weakref.ref[KVCache]] = []
    own = KVCache.__init__

    def init(self: KVCache, *args: Any) -> None:
        own(self, *args)
        caches.append(weakref.ref(self))

    model = cf.Model(make("llama", seed=1), name="guesses")
    target = cf.Model(make("llama"), name="target")
    cf.generate(target, [[3, 4, 5]], max_new_tokens=9, draft=cf.Draft(model, length=2))
    gc.collect()
    gc.disable()
    try:
        monkeypatch.setattr(KVCache, "__init__", init)
        cf.generate(target, [[3, 4, 5]], max_new_tokens=9, draft=cf.Draft(model, length=2))
        assert len(caches) >= 2
        assert [ref for ref in caches if ref() is not None] == []
    finally:
        gc.enable()
