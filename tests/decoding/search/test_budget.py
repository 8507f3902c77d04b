"""Searches that keep a budget of tokens: which rows they have then, and what they draw."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from judges import Keeper, words
from search_cases import DRAW, PROMPTS, few_words
from tiny_models import make


def value() -> cf.LogRatio:
    return cf.LogRatio(make("llama", 1), make("llama", 2))


def lengths(context: str, a: str, b: str) -> float:
    return len(a) / len(a + b)


# A search with a budget, and the one that it is with rows of 12 tokens.
SEARCHES: dict[str, Any] = {
    "beams": (
        lambda: cf.ChunkBeamSearch(2, 4, 3, value(), budget=80),
        lambda: cf.ChunkBeamSearch(2, 3, 3, value()),
    ),
    "enough": (
        lambda: cf.ChunkBeamSearch(2, 2, 3, value(), budget=48),
        lambda: cf.ChunkBeamSearch(2, 2, 3, value()),
    ),
    "best of n": (lambda: cf.BestOfN(9, value(), budget=50), lambda: cf.BestOfN(4, value())),
    "particles": (
        lambda: cf.ParticleFilter(8, 3, value(), budget=40),
        lambda: cf.ParticleFilter(3, 3, value()),
    ),
    "tournament": (
        lambda: cf.Tournament(Keeper(lengths), n=9, budget=71),
        lambda: cf.Tournament(Keeper(lengths), n=5),
    ),
}


@pytest.mark.parametrize("kind", SEARCHES)
def test_a_budget_is_kept_with_fewer_rows(kind: str) -> None:
    """Rows that never end draw all that they may, which the first model's stats count."""
    settings = {**DRAW, "eos_token_id": None, "max_new_tokens": 12, "tokenizer": words()}
    kept, fewer = (make_search() for make_search in SEARCHES[kind])
    outs = [cf.generate(make("llama"), PROMPTS, search=s, **settings) for s in (kept, fewer)]
    assert outs[0].responses == outs[1].responses
    torch.testing.assert_close(outs[0].values, outs[1].values)
    drawn = outs[0].stats.models[0].tokens - sum(len(p) - 1 for p in PROMPTS)
    assert drawn == fewer.rows * 12 * len(PROMPTS)
    assert fewer.rows * 12 <= kept.budget


@pytest.mark.parametrize("kind", ["beams", "particles", "best of n"])
def test_requests_of_several_limits_have_rows_of_their_own(kind: str) -> None:
    limits = [7, 12, 20, 9]
    settings = {**DRAW, "seed": [5, 6, 7, 8], "eos_token_id": None}
    search = SEARCHES[kind][0]()
    together = cf.generate(
        make("llama"), PROMPTS, search=search, **{**settings, "max_new_tokens": limits}
    )
    drawn = 0
    for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True)):
        own = {**settings, "seed": [5 + i], "max_new_tokens": limit}
        alone = cf.generate(make("llama"), [prompt], search=search, **own)
        assert alone.responses[0] == together.responses[i]
        drawn += alone.stats.models[0].tokens
        assert alone.stats.models[0].tokens - len(prompt) + 1 <= search.budget
    assert together.stats.models[0].tokens == drawn


def test_the_sizes_of_beams() -> None:
    search = cf.ChunkBeamSearch(4, 4, 5, value())
    sizes = [search.of_rows(rows) for rows in range(1, 17)]
    assert [s.rows for s in sizes] == [1, 2, 3, 4, 4, 6, 6, 8, 9, 9, 9, 12, 12, 12, 12, 16]
    assert [(s.width, s.samples) for s in sizes[4:9]] == [(1, 4), (2, 3), (2, 3), (2, 4), (3, 3)]
    best = cf.BestOfN(9, value()).of_rows(7)
    assert (best.width, best.samples, best.chunk_length) == (7, 1, None)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (
        lambda: cf.BestOfN(4, value(), budget=12),
        {},
        "budget is 12; it must be at least 13, the tokens of a row of max_new_tokens=13",
    ),
    (
        lambda: cf.ParticleFilter(4, 3, value(), budget=20),
        {},
        "budget is 20; it must be at least 26, the tokens of 2 rows of max_new_tokens=13",
    ),
    (
        lambda: cf.BestOfN(4, value(), budget=12),
        {"max_new_tokens": [4, 13, 5, 5]},
        "at least 13, the tokens of a row",
    ),
    (
        lambda: cf.BestOfN(4, value(), budget=20),
        {"max_new_tokens": None},
        "budget is 20 and max_new_tokens is None",
    ),
    (
        lambda: cf.BestOfN(4, value(), budget=30),
        {"num_return_sequences": 3},
        "num_return_sequences is 3; it must be at most 2, .* by its budget of",
    ),
]


@pytest.mark.parametrize(("search", "arguments", "message"), REFUSED)
def test_what_a_call_cannot_keep(search: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cf.generate(make("llama"), PROMPTS, search=search(), **{**DRAW, **arguments})


def test_what_is_no_budget() -> None:
    base = few_words(1)
    ratio = cf.LogRatio(base, few_words(2))
    for bad, error in ((0, ValueError), (2.5, TypeError), (True, TypeError)):
        for make_search in (
            lambda b: cf.ChunkBeamSearch(value=ratio, budget=b),
            lambda b: cf.BestOfN(4, ratio, budget=b),
            lambda b: cf.ParticleFilter(4, 5, ratio, budget=b),
            lambda b: cf.Tournament(ratio, budget=b),
        ):
            with pytest.raises(error, match=f"budget is {bad}"):
                make_search(bad)
