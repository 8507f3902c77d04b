"""Tilted selection: what a sampler proposes is chosen by another model's density too."""

from __future__ import annotations

import copy
from typing import Any

import crossfade as cf
import pytest
import torch
from search_cases import DRAW, PROMPTS, by_hand, few_words, log_ratio
from sweeps import every
from test_particles import closed_form, drawn_rows, pvalue
from test_search_values import with_outputs
from tiny_models import SHAPES, make, make_letters, make_tokenizer
from transformers import AutoModelForSequenceClassification

SEARCHES: dict[str, Any] = {
    "beams": lambda value, **tilt: cf.ChunkBeamSearch(2, 3, 4, value, **tilt),
    "best of n": lambda value, **tilt: cf.BestOfN(4, value, **tilt),
    "particles": lambda value, **tilt: cf.ParticleFilter(4, 3, value, 2.0, **tilt),
}


@pytest.mark.parametrize("shape", every(3, SHAPES))
def test_the_tilt_is_a_part_of_what_selects(shape: str) -> None:
    sampler, target, tuned, ref = (make(shape, seed) for seed in range(4))
    value, tilt = cf.LogRatio(tuned, ref), cf.LogRatio(target, sampler)
    search = cf.ChunkBeamSearch(2, 3, 4, 0.5 * value, tilt=tilt)
    out = cf.generate(sampler, PROMPTS, search=search, **DRAW)
    first, second = log_ratio(tuned, ref), log_ratio(target, sampler)
    for i, prompt in enumerate(PROMPTS):
        truth = by_hand(sampler, prompt, i, lambda p, y: 0.5 * first(p, y) + second(p, y), 2, 3, 4)
        assert out.responses[i] == truth[0][1]
        assert out.values[i].item() == pytest.approx(truth[0][0], abs=1e-4)
    assert search.objective.names == ("log_ratio", "tilt")
    torch.testing.assert_close(
        out.value_parts @ torch.tensor([0.5, 1.0]), out.values, atol=1e-5, rtol=1e-5
    )
    assert len(out.stats.models) == 4, "the sampler's log-probs are those that it drew by"


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_sampler_equal_to_the_target_is_plain_selection(kind: str) -> None:
    sampler, tuned, ref = (make("llama", seed) for seed in range(3))
    value = cf.LogRatio(tuned, ref)
    tilt = cf.LogRatio(copy.deepcopy(sampler), sampler)
    plain, tilted = (
        cf.generate(sampler, PROMPTS, search=SEARCHES[kind](value, **own), **DRAW)
        for own in ({}, {"tilt": tilt})
    )
    assert tilted.responses == plain.responses
    torch.testing.assert_close(tilted.values, plain.values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        tilted.value_parts[:, 1], torch.zeros(len(PROMPTS)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("valued", every(2, [True, False]))
def test_particles_of_a_sampler_are_a_sample_of_the_target(valued: bool) -> None:
    sampler, target, tuned = (cf.Model(few_words(seed)) for seed in range(3))
    value = cf.LogRatio(tuned, target)
    tilt, n = cf.LogRatio(target, sampler), 16 if valued else 32
    search = cf.ParticleFilter(n, 1, value if valued else None, 2.0, tilt=tilt)
    out = cf.generate(
        sampler,
        [[3, 1]] * (150 if valued else 500),  # The two densities alone are nearer to each other.
        search=search,
        num_return_sequences=n,
        max_new_tokens=3,
        eos_token_id=None,
        seed=4,
        max_batch=40 * n,
    )
    rows = drawn_rows(out, n)
    assert pvalue(rows, closed_form(target._blend(), value, 0.5 * valued)) > 1e-3
    assert pvalue(rows, closed_form(sampler._blend(), value, 0.5 * valued)) < 1e-6


def test_refusals() -> None:
    sampler, target, other = (make("llama", seed) for seed in range(3))
    value = cf.LogRatio(other, sampler)
    tilt = cf.LogRatio(target, sampler)
    made: list[tuple[Any, type[Exception], str]] = [
        (target, TypeError, "tilt is a LlamaForCausalLM; it must be a LogRatio"),
        (value + tilt, TypeError, "tilt is a ValueSum"),
        (cf.LogRatio(target, sampler, normalize=True), ValueError, "tilt is normalised"),
        (cf.LogRatio(target, sampler, -1.0), ValueError, "tilt has the beta -1; it must be above"),
    ]
    with pytest.raises(ValueError, match="value is -log_ratio, which takes the tilt away again"):
        cf.BestOfN(4, -tilt, tilt=tilt)
    for bad, error, message in made:
        for search in SEARCHES.values():
            with pytest.raises(error, match=message):
                search(value, tilt=bad)
    small = make("gpt2", 5)
    letters = cf.Model(small, tokenizer=make_letters())
    words = cf.Model(sampler, tokenizer=make_tokenizer())
    judge = with_outputs(AutoModelForSequenceClassification, "llama", 2, 3)
    guided = words + cf.Classifier(judge, words.tokenizer, 0)
    cases: list[tuple[Any, Any, str]] = [
        (sampler, cf.LogRatio(target, other), "its second model must be the one that proposes"),
        (cf.Model(sampler) + 0.5 * cf.Model(other), tilt, "must be the one that proposes, alone"),
        (cf.Model(sampler).within(cf.Support(top_k=3)), tilt, "alone"),
        (guided, cf.LogRatio(cf.Model(target), words), "alone: it is that density"),
        (words, cf.LogRatio(letters, words), "tilt is over two vocabularies.*for target"),
        (sampler, cf.LogRatio(few_words(1, words=5000), sampler), "tilt is over two vocabularies"),
    ]
    for blend, bad, message in cases:
        with pytest.raises(ValueError, match=message):
            cf.generate(blend, PROMPTS, search=cf.BestOfN(2, value, tilt=bad), **DRAW)
    with pytest.raises(TypeError, match="value is None"):
        cf.BestOfN(2)
