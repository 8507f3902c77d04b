"""Rows that stay are drawn by their values, against closed forms and a loop by hand."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import ops
from scipy.stats import chisquare
from search_cases import DRAW, EOS_IDS, PROMPTS, few_words, last_logits, log_ratio
from tiny_models import make


def test_soft_best_of_n_has_its_closed_form() -> None:
    """Of n samples the one that comes back is drawn by exp(V / T), and the next without it."""
    base, n, requests, temperature = few_words(3), 3, 1500, 0.7
    q = cf.ValueHead(few_words(4))
    search = cf.BestOfN(n, q, selection_temperature=temperature)
    how: dict[str, Any] = {"max_new_tokens": 1, "eos_token_id": None, "seed": 11}
    out = cf.generate(
        base, [[3]] * requests, search=search, num_return_sequences=2, max_batch=4500, **how
    )
    with torch.no_grad():
        p = base(torch.tensor([[3]])).logits[0, -1].double().softmax(-1).tolist()
        weight = (q.model(torch.tensor([[3]])).logits[0, -1].double() / temperature).exp().tolist()
    expected = dict.fromkeys(itertools.product(range(5), repeat=2), 0.0)
    for words in itertools.product(range(5), repeat=n):
        drawn, total = math.prod(p[v] for v in words), sum(weight[v] for v in words)
        for i, j in itertools.permutations(range(n), 2):
            first, left = weight[words[i]] / total, total - weight[words[i]]
            expected[words[i], words[j]] += drawn * first * weight[words[j]] / left
    rows = [r[0] for r in out.responses]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    wanted = [x * requests for x in expected.values()]
    assert min(wanted) > 5
    assert chisquare([*map(pairs.count, expected)], wanted).pvalue > 1e-3


@torch.no_grad()
def one_chunk_at_a_time(
    model: Any, prompt: list[int], request: int, score: Any, samples: int, chunk_length: int
) -> list[int]:
    """Guided speculative inference's loop: of a few chunks one goes on, drawn by its score."""
    limit, after, row = DRAW["max_new_tokens"], last_logits(model), list[int]()
    while len(row) < limit and not (row and row[-1] in EOS_IDS):
        chunks = []
        for slot in range(samples):
            chunk = list(row)
            while len(chunk) < min(len(row) + chunk_length, limit):
                logits = after(prompt + chunk)
                stream = request + (slot << 32)
                drawn = ops.blend_sample(
                    [logits], [1.0], temperature=1.2, seed=5, stream=stream, step=len(chunk)
                )
                chunk.append(int(drawn.tokens))
                if chunk[-1] in EOS_IDS:
                    break
            chunks.append(chunk)
        noise = random.Random(f"5 {request} {max(map(len, chunks))}")
        scores = [score(prompt, c) - math.log(-math.log(noise.random())) for c in chunks]
        row = chunks[scores.index(max(scores))]
    return row


def test_a_tilt_draws_chunks_as_in_guided_speculative_inference() -> None:
    sampler, target, tuned, ref = (make("llama", seed) for seed in range(4))
    recipe = cf.presets.gsi(
        target, sampler, cf.LogRatio(tuned, ref), 0.5, samples=4, chunk_length=3
    )
    value, tilt = log_ratio(tuned, ref), log_ratio(target, sampler)
    out = cf.generate(recipe, PROMPTS, max_batch=8, **DRAW)
    for i, prompt in enumerate(PROMPTS):
        row = one_chunk_at_a_time(
            sampler, prompt, i, lambda p, y: 0.5 * value(p, y) + tilt(p, y), 4, 3
        )
        assert out.responses[i] == row
    best = cf.presets.gsi(
        target, sampler, cf.LogRatio(tuned, ref), 0.5, samples=4, chunk_length=3, best=True
    )
    assert cf.generate(best, PROMPTS, **DRAW).responses != out.responses


def test_a_low_temperature_is_the_best() -> None:
    base, value = make("llama"), cf.LogRatio(make("llama", 1), make("llama", 2))
    one, other = (
        cf.generate(
            base,
            PROMPTS,
            search=cf.ChunkBeamSearch(2, 2, 4, value, selection_temperature=t),
            num_return_sequences=2,
            **DRAW,
        )
        for t in (0.0, 1e-6)
    )
    assert one.responses == other.responses


def test_refusals() -> None:
    base, value = make("llama"), cf.LogRatio(make("llama", 1), make("llama", 2))
    bad: list[tuple[Any, type[Exception], str]] = [
        (-1, ValueError, "selection_temperature is -1; it must be at least 0"),
        (math.nan, ValueError, "selection_temperature is nan; it must be finite"),
        (None, TypeError, "selection_temperature is None; it must be a number"),
    ]
    for temperature, error, message in bad:
        for search in (cf.ChunkBeamSearch, cf.BestOfN):
            with pytest.raises(error, match=message):
                search(4, value=value, selection_temperature=temperature)
    with pytest.raises(TypeError, match="best is 1; it must be True or False"):
        cf.presets.gsi(base, value.ref, value, best=1)
    assert "selection_temperature=0.5" in repr(cf.BestOfN(4, value, selection_temperature=0.5))
