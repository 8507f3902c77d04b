"""Value heads that ride on the rows of searches, against heads with forwards of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.loop import Loop
from crossfade.models.value_heads import value_head, value_model
from search_cases import DRAW, PROMPTS, SIMPLE, by_hand
from sweeps import every, product
from tiny_models import make, spread
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

APART = cf.Engine(share_weights=False)
KINDS = ["q", "scalar", "both"]
NATS = 2.6  # Some tokens are more uncertain than this, and some are less.


def heads(base: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Value models of both kinds over one backbone, whose numbers are large enough to matter."""
    found = {kind: value_model(base, kind).eval() for kind in ("q", "scalar")}
    for seed, model in enumerate(found.values()):
        spread(value_head(model), seed)
    return found


def value_of(models: dict[str, PreTrainedModel], kind: str) -> Any:
    q, scalar = (cf.ValueHead(model, name=name) for name, model in models.items())
    return {"q": 1.0 * q, "scalar": 1.0 * scalar, "both": q - 0.5 * scalar}[kind]


def says(models: dict[str, PreTrainedModel], kind: str) -> Any:
    """The value of a response that follows a prompt, from whole texts."""

    @torch.no_grad()
    def score(prompt: Sequence[int], response: Sequence[int]) -> float:
        ids = torch.tensor([[*prompt, *response]])
        q = float(models["q"](ids).logits[0, -2, response[-1]])
        scalar = float(models["scalar"](ids).logits[0, -1, 0])
        return {"q": q, "scalar": scalar, "both": q - 0.5 * scalar}[kind]

    return score


SEARCHES: dict[str, Any] = {
    "particles": lambda value: cf.ParticleFilter(4, 3, value, 1.5),
    "particles of a token": lambda value: cf.ParticleFilter(4, 1, value, resample_below=1.0),
    "entropy": lambda value: cf.ChunkBeamSearch(2, 2, 6, value, cf.entropy_above(NATS)),
    "particles and entropy": lambda value: cf.ParticleFilter(
        4, 6, value, 1.5, chunk_end=cf.entropy_above(NATS)
    ),
    "budget": lambda value: cf.ChunkBeamSearch(2, 3, 3, value, budget=54),
    "budget of particles": lambda value: cf.ParticleFilter(6, 3, value, 1.5, budget=54),
    "budget and entropy": lambda value: cf.ChunkBeamSearch(
        2, 3, 6, value, cf.entropy_above(NATS), budget=54
    ),
}


@pytest.mark.parametrize(("case", "kind"), product(list(SEARCHES), KINDS, together=1))
def test_searches(case: str, kind: str) -> None:
    """Groups end and others take their places; with a budget they have rows of their own."""
    base = make("llama")
    search = SEARCHES[case](value_of(heads(base), kind))
    settings = {**DRAW, "max_batch": 2 * search.rows, "num_return_sequences": 2}
    if "budget" in case:
        settings |= {"max_new_tokens": [9, 13, 18, 10], "num_return_sequences": 1}
    ours, theirs = (
        cf.generate(base, PROMPTS, search=search, engine=engine, **settings)
        for engine in (cf.Engine(), APART)
    )
    assert ours.responses == theirs.responses
    assert not ours.stats.notes
    for name in ("values", "value_parts", "weights", "effective_sizes", "entropies", "logprobs"):
        mine, wanted = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (wanted is None)
        if mine is not None:
            torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    assert ("entropy" in case) == (ours.entropies is not None)
    if ours.entropies is not None:
        assert (ours.entropies > NATS).any()
        assert ((ours.entropies > 0) & (ours.entropies < NATS)).any()
    (alone,) = ours.stats.models
    assert alone.forwards < sum(m.forwards for m in theirs.stats.models)
    extra = alone.tokens - theirs.stats.models[0].tokens
    assert extra == 0 if kind == "q" else extra > 0, "a scalar head has the last tokens read"


@pytest.mark.parametrize(
    ("case", "kind"), product(["particles", "budget", "budget of particles"], KINDS, together=1)
)
def test_the_simple_path(case: str, kind: str) -> None:
    base = make("llama")
    search = SEARCHES[case](value_of(heads(base), kind))
    settings = {**DRAW, "max_new_tokens": 9} if "budget" in case else DRAW
    ours, theirs = (
        cf.generate(base, PROMPTS[:2], search=search, engine=engine, **settings)
        for engine in (cf.Engine(), SIMPLE)
    )
    assert ours.responses == theirs.responses
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("nats", "kind"), product([0.0, NATS], KINDS, together=1))
def test_a_number_of_a_token_that_is_taken_back_does_not_stay(nats: float, kind: str) -> None:
    """Against a loop over whole texts, which has only what was written."""
    base = make("llama")
    models = heads(base)
    settings: dict[str, Any] = {"width": 2, "samples": 3, "chunk_length": 6}
    search = cf.ChunkBeamSearch(
        **settings, value=value_of(models, kind), chunk_end=cf.entropy_above(nats)
    )
    out = cf.generate(base, PROMPTS[:2], search=search, num_return_sequences=2, **DRAW)
    for i, prompt in enumerate(PROMPTS[:2]):
        truth = by_hand(base, prompt, i, says(models, kind), **settings, most_entropy=nats)
        assert out.responses[2 * i : 2 * i + 2] == [row for _, row in truth]
        wanted = torch.tensor([value for value, _ in truth])
        torch.testing.assert_close(out.values[i], wanted, atol=1e-4, rtol=1e-4)


def test_the_tokens_that_are_read() -> None:
    """Each chunk but the last ends one token after it began: that token is read again."""
    base = make("llama")
    models = heads(base)
    how: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "seed": 1}
    for kind, last in (("q", 0), ("scalar", 6)):
        ends = cf.entropy_above(0.0)
        search = cf.ChunkBeamSearch(2, 3, 4, value_of(models, kind), chunk_end=ends)
        out = cf.generate(base, [[5, 6, 7, 8, 9, 10]], search=search, **how)
        (read,) = out.stats.models
        assert read.tokens == 5 + 6 * 12 + 6 * 11 + last
        assert read.forwards == 1 + 12 + 11 + last // 6


@pytest.mark.parametrize("kind", every(2, KINDS))
def test_a_tilt_beside_heads(kind: str) -> None:
    """Over the sampler, whose rows they ride on, or over the target, which reads chunks."""
    sampler, target = make("llama"), make("llama", 1)
    for over in (sampler, target):
        value = 2.0 * value_of(heads(over), kind)
        tilt = cf.LogRatio(target, sampler)
        for search in (
            cf.ChunkBeamSearch(2, 3, 4, value, tilt=tilt),
            cf.ParticleFilter(4, 6, value, 2.0, tilt=tilt, chunk_end=cf.entropy_above(NATS)),
        ):
            ours, theirs = (
                cf.generate(sampler, PROMPTS, search=search, engine=engine, **DRAW)
                for engine in (cf.Engine(), APART)
            )
            assert ours.responses == theirs.responses
            torch.testing.assert_close(ours.value_parts, theirs.value_parts, atol=1e-4, rtol=1e-4)
            assert search.objective.names[-1] == "tilt"
            names = [m.names for m in ours.stats.models]
            assert (len(names[0]) > 1) == (over is sampler)


@pytest.mark.parametrize("case", ["particles", "particles and entropy"])
def test_time_is_up(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a chunk scalar heads say what rows have written by then."""
    base = make("llama")
    models = heads(base)
    looks, own = iter(range(99)), Loop._look

    def look(self: Loop, logits: Any) -> None:
        if next(looks) == 7:
            monkeypatch.setattr(time, "time", lambda: float("inf"))
        own(self, logits)

    monkeypatch.setattr(Loop, "_look", look)
    search = SEARCHES[case](value_of(models, "both"))
    out = cf.generate(base, PROMPTS, search=search, max_time=1e9, **DRAW)
    assert out.lengths.max() < DRAW["max_new_tokens"]
    score = says(models, "both")
    wanted = [score(p, r) for p, r in zip(PROMPTS, out.responses, strict=True)]
    torch.testing.assert_close(out.values, torch.tensor(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "kind", "every"),
    [("particles", "scalar", 1), ("entropy", "q", 1), ("entropy", "scalar", 3), ("budget", "q", 3)],
)
def test_classifiers_beside_heads(
    case: str, kind: str, every: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows wait at boundaries, while a classifier is asked of others."""
    base = make("llama")
    config = make("llama").config
    config.num_labels = 2
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    spread(model.score, 3)
    term = cf.Model(base, tokenizer=tokenizer)
    blend = term + 2.0 * cf.Classifier(model, tokenizer, 1, top=4, every=every)
    search = SEARCHES[case](value_of(heads(base), kind))
    prompts = ["the film was", "plot very", "great cast the plot"]
    settings = {**DRAW, "max_new_tokens": [8, 9, 7], "seed": [5, 6, 7]}
    ours, theirs = (
        cf.generate(blend, prompts, search=search, engine=engine, **settings)
        for engine in (cf.Engine(), APART)
    )
    assert ours.responses == theirs.responses
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
    assert ours.responses != cf.generate(term, prompts, search=search, **settings).responses
    assert [m.names for m in ours.stats.models][-1] == ("classifier0",)
    for i, prompt in enumerate(prompts):
        own = {**settings, "max_new_tokens": settings["max_new_tokens"][i], "seed": [5 + i]}
        alone = cf.generate(blend, [prompt], search=search, **own)
        assert alone.responses == ours.responses[i : i + 1]
