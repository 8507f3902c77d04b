"""Every kind of blend, and of search, with a draft: the same rows, and the same values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.value_heads import value_head, value_model
from crossfade.ops import Support
from drafted import PROMPTS, SAMPLED, both, changed, model, noise
from sweeps import every, product
from tiny_models import VOCAB, lora, make, make_tokenizer, spread
from transformers import AutoModelForSequenceClassification, PreTrainedModel

# PEFT 0.21 uses a name that Transformers 5.23 has changed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

A, B, C = (cf.Model(model(shape, i)) for i, shape in enumerate(("llama", "gpt2", "qwen3")))
ROWS = len(PROMPTS)


def mixes() -> Any:
    two = lora(2, lora(1, make(), "kind"), "brief", 3, ["q_proj", "up_proj"])
    shares = {"kind": torch.linspace(-0.5, 1, ROWS), "brief": torch.linspace(1, 0, ROWS)}
    return cf.Model(two, adapter=shares) + 0.3 * B


BLENDS: dict[str, Callable[[], Any]] = {
    "a weight of each request": lambda: A + torch.linspace(-0.5, 0.8, ROWS) * (B - C),
    "a weight of 0": lambda: A + 0.0 * B,
    "a mix of adapters of each request": mixes,
    "a mixture": lambda: cf.Blend((A, B, C), (0.5, 0.3, 0.2), power=1.0),
    "a harmonic mean": lambda: cf.Blend((A, B), (0.5, 0.5), power=-1.0),
    "an intersection": lambda: cf.intersection(A, B),
    "a clamp": lambda: A + (2 * (B - C)).clamp(min=-0.3, max=0.4),
    "a support": lambda: (A + 0.7 * B - 0.2 * C).within(Support(term=0, top_k=5)),
    "a value": lambda: A + 0.4 * cf.ValueHead(model("qwen3", 7)),
    "a value of each request": lambda: (
        A + torch.linspace(0, 1, ROWS) * cf.ValueHead(model("qwen3", 7)) + 0.2 * B
    ),
    "a riding value": lambda: A + 0.4 * riding("q"),
}


def riding(kind: str) -> cf.ValueHead:
    found = value_model(A.model, kind).eval()
    spread(value_head(found))
    return cf.ValueHead(found)


@pytest.mark.parametrize(
    ("kind", "guesses"), product([*BLENDS], ["texts", "the first term", "a model"], together=1)
)
def test_blends(kind: str, guesses: str) -> None:
    target = BLENDS[kind]()
    target = target if isinstance(target, cf.Blend) else 1.0 * target
    how = {**SAMPLED, "max_new_tokens": [13, 9, 13, 2, 13], "max_batch": 4}
    plain = cf.generate(target, PROMPTS, **how)
    first, *others = plain.responses
    texts = [first, *(changed(r, 5) for r in others[:2]), None, *noise(1, 9)]
    draft = {
        "texts": cf.Draft(texts=texts, length=4),
        "the first term": cf.Draft(target.terms[0], length=4),
        "a model": cf.Draft(cf.Model(model("gemma3", 5)), length=4),
    }[guesses]
    found = both(target, PROMPTS, draft, plain, **how).drafted
    lazy = [n for n in found.stats.notes if "run in full at every step: a draft" in n]
    assert bool(lazy) == (kind == "a support")
    assert found.stats.rounds > 0


def test_a_draft_with_weights_of_each_request() -> None:
    """Each request is guessed with its own weights: the target guesses itself right."""
    w = torch.linspace(-0.5, 0.8, ROWS)
    target = A + w * (B - C)
    how = {**SAMPLED, "max_new_tokens": 10, "max_batch": 2, "num_return_sequences": 2}
    stats = both(target, PROMPTS, cf.Draft(A + w * (B - C), length=3), **how).drafted.stats
    assert stats.right == stats.guessed > 0


@pytest.mark.parametrize("kind", every(3, ["a support", "a clamp", "a value", "a riding value"]))
def test_any_blend_can_guess(kind: str) -> None:
    """Values, supports and parts of a draft count as they do in a target."""
    guesser = BLENDS[kind]()
    how = {**SAMPLED, "max_new_tokens": 10}
    both(A + 0.3 * B, PROMPTS, cf.Draft(guesser, length=3), **how)
    stats = both(guesser, PROMPTS, cf.Draft(guesser, length=3), **how).drafted.stats
    assert stats.acceptance == 1.0


def classifier() -> PreTrainedModel:
    torch.manual_seed(5)
    config = make("llama").config
    config.update({"num_labels": 2, "id2label": {0: "bad", 1: "good"}})
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in judge.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.6)
    return judge


@pytest.mark.parametrize("every_tokens", every(2, [1, 3]))
def test_classifiers(every_tokens: int) -> None:
    tokenizer = make_tokenizer()
    base = cf.Model(model(), tokenizer=tokenizer)
    judge = cf.Classifier(classifier(), tokenizer, "good", top=5, every=every_tokens)
    target, prompts = base + 1.5 * judge, ["the film was", "a great plot w3 w4", "awful"]
    how = {**SAMPLED, "max_new_tokens": 9, "max_batch": 2}
    plain = cf.generate(target, prompts, **how)
    texts = [plain.responses[0], changed(plain.responses[1], 3), None]
    for draft in (
        cf.Draft(texts=texts, length=4),
        cf.Draft(base, length=3),
        cf.Draft("prompt", length=3),
    ):
        both(target, prompts, draft, plain, **how)


RATIO = cf.LogRatio(B, C)
SEARCHES: dict[str, Callable[[], Any]] = {
    "chunks": lambda: cf.ChunkBeamSearch(2, 2, 3, RATIO),
    "chunks of one token": lambda: cf.ChunkBeamSearch(2, 2, 1, RATIO),
    "certain chunks": lambda: cf.ChunkBeamSearch(2, 2, 6, RATIO, cf.entropy_above(2.2)),
    "phrases": lambda: cf.ChunkBeamSearch(2, 2, 8, RATIO, lambda t: len(t.split()) % 3 == 2),
    "best of": lambda: cf.BestOfN(3, RATIO),
    "particles": lambda: cf.ParticleFilter(4, 3, RATIO),
    "certain particles": lambda: cf.ParticleFilter(4, 6, RATIO, chunk_end=cf.entropy_above(2.2)),
    "drawn rows": lambda: cf.ChunkBeamSearch(2, 2, 4, RATIO, selection_temperature=1.0),
    "a budget": lambda: cf.BestOfN(4, RATIO, budget=45),
    "a head that rides": lambda: cf.ChunkBeamSearch(2, 2, 4, riding("q")),
    "a scalar head": lambda: cf.ChunkBeamSearch(2, 2, 4, riding("scalar")),
}
SOME = PROMPTS[:4]


@pytest.mark.parametrize(
    ("kind", "draft", "most"),
    product([*SEARCHES], ["prompt", "texts", "shared", "a term", "a model"], [None, 4], together=1),
)
def test_searches(kind: str, draft: str, most: int | None) -> None:
    search = SEARCHES[kind]()
    target = A + 0.3 * B if draft == "a term" else 1.0 * A
    how: dict[str, Any] = {**SAMPLED, "max_new_tokens": 13, "search": search}
    how |= {"eos_token_id": [1, *range(20, 26)], "max_batch": most, "tokenizer": make_tokenizer()}
    sources: dict[str, Any] = {"prompt": "prompt", "shared": A, "a term": B}
    sources["a model"] = cf.Model(model("gemma3", 5))
    plain = cf.generate(target, SOME, **how)
    if draft == "texts":
        given = cf.Draft(texts=plain.responses, length=4)
    else:
        given = cf.Draft(sources[draft], length=3)
    found = both(target, SOME, given, plain, **how).drafted
    note = "value heads read chunks in forwards of their own: a draft"
    assert (note in found.stats.notes) == ("head" in kind)
    if draft == "shared" and "certain" not in kind and kind != "phrases":
        assert found.stats.right == found.stats.guessed
    assert (found.stats.guessed == 0) == (kind == "chunks of one token")


@pytest.mark.parametrize("kind", every(4, ["certain chunks", "chunks", "particles", "best of"]))
def test_searches_give_several_rows_and_caches(kind: str) -> None:
    search = SEARCHES[kind]()
    how = {**SAMPLED, "max_new_tokens": 9, "search": search, "num_return_sequences": 2}
    draft = cf.Draft(cf.Model(model("gemma3", 5)), length=3)
    outs = [cf.generate(A, SOME, draft=d, return_cache=True, **how) for d in (None, draft)]
    assert outs[0].responses == outs[1].responses
    more = [[*SOME[i // 2], *r, 8, 9] for i, r in enumerate(outs[0].responses)]
    plain = cf.generate(A, more, **SAMPLED, max_new_tokens=6)
    for out in outs:
        again = cf.generate(
            A, more, cache=out.cache, draft=cf.Draft("prompt", length=3), **SAMPLED,
            max_new_tokens=6,
        )  # fmt: skip
        assert again.responses == plain.responses


def test_processors_and_certain_chunks() -> None:
    """Rows wait for each other, and those of one length are processed together."""
    search = SEARCHES["certain chunks"]()
    how = {**SAMPLED, "max_new_tokens": 9, "search": search, "repetition_penalty": 1.4}
    plain = cf.generate(A, SOME, **how)
    for source in ("prompt", cf.Model(model("gemma3", 5))):
        both(A, SOME, cf.Draft(source, length=3), plain, **how)


def test_guesses_of_a_fork_follow_what_its_row_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of different lengths fork into each other's slots."""
    from crossfade.decoding.speculation.drafter import TextDrafter

    guess = TextDrafter.guess

    def checked(self: Any, live: Any, *, refilled: bool) -> Any:
        new, tokens = self.slots.new.tolist(), self.slots.written["tokens"]
        for s in live:
            lookup = self.lookups[s]
            assert self.progress.seen[s] == new[s]
            text = lookup.text[lookup.first :]
            assert text[len(text) - new[s] :] == tokens[s, : new[s]].tolist()
            assert text[: len(text) - new[s]] in SOME
        return guess(self, live, refilled=refilled)

    monkeypatch.setattr(TextDrafter, "guess", checked)
    for kind in ("certain chunks", "drawn rows"):
        how = {**SAMPLED, "max_new_tokens": 17, "search": SEARCHES[kind](), "top_k": VOCAB // 2}
        cf.generate(A, SOME, draft=cf.Draft("prompt", length=3), max_batch=8, **how)
