"""Particle filters against a loop by hand, and what their weighted samples are samples of."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import ops
from crossfade.decoding.search.particles import effective_size, normalised, resampled
from scipy.stats import chisquare
from search_cases import DRAW, EOS_IDS, PROMPTS, TEXTS, few_words, last_logits, log_ratio
from sweeps import every
from tiny_models import make
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SETTINGS: dict[str, dict[str, Any]] = {
    "always": {"n": 4, "chunk_length": 2, "temperature": 4.0, "resample_below": 1.0},
    "chunks": {"n": 5, "chunk_length": 3, "temperature": 2.0},
    "never": {"n": 4, "chunk_length": 3, "temperature": 2.0, "resample_below": 0.0},
    "whole": {"n": 4, "chunk_length": None},
    "cold": {"n": 6, "chunk_length": 1, "temperature": 0.3},
}


def by_hand(
    model: PreTrainedModel,
    prompt: list[int],
    request: int,
    score: Any,
    n: int,
    chunk_length: int | None,
    temperature: float = 1.0,
    resample_below: float = 0.5,
) -> tuple[list[tuple[float, float, list[int]]], list[float]]:
    """The rows at the end as (value, weight, tokens), the best first, and the sizes on the way.

    Weights are products of the factors of each chunk, in plain numbers.
    """
    limit, after = DRAW["max_new_tokens"], last_logits(model)
    rows: list[list[int]] = [[] for _ in range(n)]
    streams = [request + (slot << 32) for slot in range(n)]
    weights, before, sizes = [1 / n] * n, [0.0] * n, []

    def ended(row: list[int]) -> bool:
        return len(row) == limit or (bool(row) and row[-1] in EOS_IDS)

    while True:
        for slot, row in enumerate(rows):
            end = len(row) + (chunk_length or limit)
            while not ended(row) and len(row) < end:
                logits = after(prompt + row)
                drawn = ops.blend_sample(
                    [logits], [1.0], temperature=1.2, seed=5, stream=streams[slot], step=len(row)
                )
                row.append(int(drawn.tokens))
        values = [score(prompt, row) for row in rows]
        weights = [
            w * math.exp((v - b) / temperature)
            for w, v, b in zip(weights, values, before, strict=True)
        ]
        total, before = sum(weights), values
        weights = [w / total for w in weights]
        sizes.append(1 / sum(w * w for w in weights))
        if not all(map(ended, rows)) and sizes[-1] < resample_below * n:
            u = random.Random(f"5 {request} {len(sizes)}").random()
            edges = list(itertools.accumulate(weights))
            chosen = [sum(edge <= (i + u) / n for edge in edges) for i in range(n)]
            spare = [i for i in set(chosen) for _ in range(chosen.count(i) - 1)]
            for slot in range(n):
                if slot not in chosen:
                    parent = spare.pop(0)
                    rows[slot], before[slot] = list(rows[parent]), before[parent]
                    streams[slot] = request + (slot << 32) + (len(sizes) << 42)
            weights, values = [1 / n] * n, before
        if all(map(ended, rows)):
            found = zip(values, weights, rows, strict=True)
            return sorted(found, key=lambda x: -x[0]), sizes


@pytest.mark.parametrize("case", every(2, SETTINGS))
def test_the_rows_and_weights_of_the_algorithm(case: str) -> None:
    """Four prompts are filtered, two at a time: the others join when one of these is over."""
    settings = SETTINGS[case]
    n = settings["n"]
    base, tuned, ref = (make("llama", seed) for seed in range(3))
    search = cf.ParticleFilter(**settings, value=cf.LogRatio(tuned, ref))
    out = cf.generate(base, PROMPTS, search=search, max_batch=2 * n, num_return_sequences=n, **DRAW)
    assert out.values.shape == out.weights.shape == (len(PROMPTS), n)
    for i, prompt in enumerate(PROMPTS):
        rows, sizes = by_hand(base, prompt, i, log_ratio(tuned, ref), **settings)
        assert out.responses[i * n : (i + 1) * n] == [row for _, _, row in rows]
        values, weights = (torch.tensor([row[k] for row in rows]) for k in (0, 1))
        torch.testing.assert_close(out.values[i], values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.weights[i], weights, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(out.effective_sizes[i], sizes, atol=1e-3, rtol=1e-3)
    drawn = {tuple(r) for r in out.responses}
    resampled = min(min(sizes) for sizes in out.effective_sizes) < n / 2
    assert case in ("never", "whole") or (resampled and len(drawn) > 4)
    best = cf.generate(base, PROMPTS, search=search, **DRAW)
    assert best.responses == out.responses[::n]
    torch.testing.assert_close(best.weights, out.weights[:, 0])


def closed_form(blend: cf.Blend, value: cf.LogRatio, scale: float) -> dict[Any, float]:
    """``p(y) exp(scale V(y)) / Z`` of all texts of three words."""
    rows = [list(r) for r in itertools.product(range(5), repeat=3)]
    own, one, other = (
        cf.score(m, [[3, 1]] * len(rows), rows).totals.double()
        for m in (blend, value.tuned, value.ref)
    )
    log_p = own + scale * (one - other)
    return dict(zip(map(tuple, rows), log_p.softmax(0).tolist(), strict=True))


def drawn_rows(out: cf.Output, n: int) -> list[tuple[int, ...]]:
    """A row of each request, drawn by the weights."""
    generator = torch.Generator().manual_seed(3)
    at, responses = torch.multinomial(out.weights, 1, generator=generator)[:, 0], out.responses
    return [tuple(responses[i * n + int(j)]) for i, j in enumerate(at)]


def pvalue(rows: list[tuple[int, ...]], truth: dict[tuple[int, ...], float]) -> float:
    """How probable such a difference to the truth is; texts that are rare count together."""
    rare = {y for y, p in truth.items() if p * len(rows) < 5}
    kinds = [y for y in truth if y not in rare]
    counts = [rows.count(y) for y in kinds] + [sum(y in rare for y in rows)]
    wanted = [len(rows) * truth[y] for y in kinds] + [len(rows) * sum(truth[y] for y in rare)]
    return float(chisquare(counts, wanted).pvalue)


@pytest.mark.parametrize(
    "settings",
    every(
        4,
        [
            {"chunk_length": 2, "chunk_end": cf.entropy_above(1.2), "resample_below": 1.0},
            {"chunk_length": 1},
            {"chunk_length": 1, "resample_below": 1.0},
            {"chunk_length": None},
        ],
    ),
    ids=str,
)
def test_the_weighted_sample_has_its_closed_form(settings: dict[str, Any]) -> None:
    base, tuned, ref = (cf.Model(few_words(seed)) for seed in range(3))
    blend, value = base + 0.3 * (tuned - ref), cf.LogRatio(tuned, ref)  # which costs nothing
    n, requests = 32, 200
    search = cf.ParticleFilter(n, value=value, temperature=0.8, **settings)
    out = cf.generate(
        blend,
        [[3, 1]] * requests,
        search=search,
        num_return_sequences=n,
        max_new_tokens=3,
        eos_token_id=None,
        seed=4,
        max_batch=60 * n,
    )
    rows = drawn_rows(out, n)
    assert pvalue(rows, closed_form(blend, value, 1 / 0.8)) > 1e-3
    assert pvalue(rows, closed_form(blend, value, 0)) < 1e-6, "the value is seen"


def test_systematic_resampling() -> None:
    weights = torch.tensor([0.5, 0.05, 0.0, 0.3, 0.15], dtype=torch.float64)
    counts = torch.zeros(5)
    us = [i / 1000 for i in range(1000)]
    for u in us:
        parents = resampled(weights, u)
        each = torch.tensor([parents.count(i) for i in range(5)])
        assert ((each - 5 * weights).abs() < 1).all(), "the floor or the ceiling"
        assert all(parents[i] == i for i in range(5) if each[i]), "a row that stays keeps its slot"
        counts += each
    torch.testing.assert_close(counts / 1000, (5 * weights).float(), atol=2e-3, rtol=0)
    assert resampled(torch.full((7,), 1 / 7, dtype=torch.float64), 0.5) == list(range(7))
    assert effective_size(torch.full((7,), 1 / 7)) == pytest.approx(7)
    assert normalised(torch.tensor([-math.inf, -math.inf])).tolist() == [0.5, 0.5]


def test_odd_values(tokenizer: PreTrainedTokenizerFast) -> None:
    """NaN and -inf have no weight, +inf has all of it, and where none has any, all are the same."""
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    settings = {"num_return_sequences": 4, **DRAW}

    def run(odd: float, other: float) -> cf.Output:
        def value(prompts: list[Any], texts: list[str]) -> list[float]:
            return [odd if len(t) % 2 else other for t in texts]

        return cf.generate(base, TEXTS, search=cf.ParticleFilter(4, 3, value), **settings)

    for odd, other in ((math.nan, 1.0), (-math.inf, 1.0), (1.0, math.inf)):
        out = run(odd, other)
        lost = torch.tensor([len(t) % 2 == 1 for t in out.text]).view(-1, 4)
        seen = [i for i in range(3) if not lost[i].all()]
        assert seen
        assert lost[seen].any()
        assert torch.equal(out.weights[seen] == 0, lost[seen])
        torch.testing.assert_close(out.weights.sum(dim=1), torch.ones(3))
    out = run(math.nan, -math.inf)
    assert (out.weights == 0.25).all()
    assert all(size == 4 for sizes in out.effective_sizes for size in sizes)


def test_an_interrupt_and_time_that_is_up(tokenizer: PreTrainedTokenizerFast) -> None:
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    search = cf.ParticleFilter(4, 40, lambda prompts, texts: [float(len(t)) for t in texts])
    out = cf.generate(
        base, TEXTS, search=search, max_time=0.0, num_return_sequences=4, **{**DRAW, "seed": 9}
    )
    assert not out.ended.any()
    torch.testing.assert_close(out.weights, out.values.softmax(dim=1))
    assert [len(sizes) for sizes in out.effective_sizes] == [1, 1, 1]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"n": 1}, ValueError, "n is 1; it must be at least 2"),
    ({"n": 2000}, ValueError, "n is 2000; it must be at most 1024"),
    ({"n": 2.0}, TypeError, "n is 2.0; it must be an int"),
    ({"chunk_length": 0}, ValueError, "chunk_length is 0"),
    ({"temperature": 0}, ValueError, "temperature is 0.0; it must be above 0"),
    ({"temperature": math.nan}, ValueError, "temperature is nan"),
    ({"resample_below": 1.5}, ValueError, r"resample_below is 1.5; it must be within \[0, 1\]"),
    ({"value": None}, TypeError, "value is None"),
    ({"particles": 4}, TypeError, "unknown argument 'particles'; here it is n"),
    ({"chunk_end": 3}, TypeError, "chunk_end is a int"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[b[2][:20] for b in BAD])
def test_refusals(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    def value(prompts: list[Any], responses: list[str]) -> list[float]:
        return [0.0] * len(responses)

    with pytest.raises(error, match=message):
        cf.ParticleFilter(**{"n": 4, "chunk_length": 5, "value": value, **arguments})
