"""A blend that scores again reads on from what it has read before, and gives the same figures."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import branches
from crossfade.decoding.scoring import Scorer, Scoring
from tiny_models import lora, make

# PEFT 0.21 uses a name that Transformers 5.23 has changed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

CONTEXT = [9, 8, 7, 30, 31, 32, 6, 5, 44, 20, 21, 22]
ANSWERS = [[40, 41, 42, 43], [40, 11, 12], [50, 51, 52, 53, 54], [33, 34, 35], [26, 27, 28, 29]]
TAIL = [3, 17]
LABELS = [[24], [25]]


def prompt(a: int, b: int) -> list[int]:
    return [*CONTEXT, *ANSWERS[a], 19, *ANSWERS[b], *TAIL]


# The winners of each round meet again, in both orders.
ROUNDS = [[(0, 1), (1, 0), (2, 3), (3, 2)], [(0, 2), (2, 0)], [(0, 4), (4, 0)]]


def labels(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    return [p for p in prompts for _ in LABELS], LABELS * len(prompts)


@pytest.fixture(autouse=True)
def every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(branches.WORTH, "cpu", 1)


def two_adapters() -> Any:
    model = lora(4, lora(3, make("llama", 0), "tuned"), "other")
    tuned, other = (cf.Model(model, adapter=a) for a in ("tuned", "other"))
    return cf.Model(make("qwen3", 1)) + 0.8 * tuned - 0.3 * other


@pytest.mark.parametrize("make_blend", [lambda: make("llama", 0), two_adapters])
@pytest.mark.parametrize("rows", [256, 3, 1])
def test_the_figures_are_those_of_a_call_for_itself(
    make_blend: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "ROWS", rows)
    blend = make_blend()
    with Scorer(blend) as scorer:
        for pairs in ROUNDS:
            prompts, responses = labels([prompt(*pair) for pair in pairs])
            found, alone = scorer.score(prompts, responses), cf.score(blend, prompts, responses)
            torch.testing.assert_close(found.logprobs, alone.logprobs, atol=1e-5, rtol=1e-5)
            assert torch.equal(found.ranks, alone.ranks)


def test_each_round_reads_what_is_new() -> None:
    """The context once, each first answer once, then the second answer and the tail alone."""
    read, known = [], set()
    with Scorer(make("llama", 0)) as scorer:
        for pairs in ROUNDS:
            prompts = [prompt(*pair) for pair in pairs]
            found = scorer.score(*labels(prompts))
            (model,) = found.stats.models
            begun = {tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}
            assert model.tokens == len(begun - known)
            assert found.stats.tokens == 2 * len(prompts)
            known |= begun
            read.append(model.forwards)
    assert read == [3, 1, 1]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 256])
def test_however_few_rows_there_are_a_call_reads_no_token_twice(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branches, "ROWS", rows)
    prompts = [prompt(*pair) for pair in permutations(range(len(ANSWERS)), 2)]
    begun = {tuple(p[:n]) for p in prompts for n in range(1, len(p) + 1)}
    (model,) = cf.score(make("llama", 0), *labels(prompts)).stats.models
    assert model.tokens == len(begun)


def test_where_rows_are_few_those_that_hold_something_are_read_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last of the prompts that were asked before, whichever way they were read."""
    monkeypatch.setattr(branches, "ROWS", 2)
    monkeypatch.setattr(branches, "ROOM", 1)
    before = [[first, *[50 + first] * 8] for first in range(6)]
    again = [[*p, 40] for p in before]
    with Scorer(make("llama", 0)) as scorer:
        for prompts, new in ((before, 6 * 9), (again, 4 * 10 + 2), ([*again, [9]], 4 * 10 + 3)):
            found = scorer.score(prompts, [[3]] * len(prompts))
            assert found.stats.models[0].tokens == new


def test_few_prompts_take_few_rows_and_more_of_them_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branches, "FEWEST", 6)
    many = [[a, b, *TAIL] for a, b in permutations(range(30, 35), 2)]
    with Scorer(make("llama", 0)) as scorer:
        small, again, large, back = (
            scorer.score(*labels(prompts)).stats for prompts in (many[:2], many[:2], many, many[:2])
        )
    assert small.cache_bytes == again.cache_bytes
    assert large.cache_bytes == back.cache_bytes == small.cache_bytes / 6 * 2 * len(many)
    for kept in (again, back):
        assert kept.models[0].tokens == 2, "the last one of each prompt"


def test_models_that_change_read_anew() -> None:
    model = make("llama", 0)
    with Scorer(model) as scorer:
        scorer.score([prompt(0, 1)], [[24]])
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        found = scorer.score([prompt(0, 2)], [[24]])
    assert found.stats.notes == ("a model has changed since it was last asked: it reads anew",)
    assert found.stats.models[0].tokens == len(prompt(0, 2))
    torch.testing.assert_close(found.logprobs, cf.score(model, [prompt(0, 2)], [[24]]).logprobs)


def test_longer_prompts_come_later() -> None:
    model = make("llama", 0)
    with Scorer(model) as scorer:
        scorer.score([CONTEXT[:2]], [[24]])
        long = CONTEXT * 9
        found = scorer.score([long], [[24, 25]])
    assert found.stats.models[0].tokens == len(long) - 1  # Two tokens of the context are held.
    torch.testing.assert_close(
        found.logprobs, cf.score(model, [long], [[24, 25]]).logprobs, atol=1e-5, rtol=1e-5
    )


def test_nothing_is_kept_without_a_with() -> None:
    scorer = Scorer(make("llama", 0))
    for _ in range(2):
        found = scorer.score(*labels([prompt(0, 1)]))
        assert found.stats.models[0].tokens == len(prompt(0, 1))
    with scorer:
        scorer.score(*labels([prompt(0, 1)]))
        found = scorer.score(*labels([prompt(0, 1)]))
        assert found.stats.models[0].tokens == 1
        assert found.stats.cache_bytes > 0
    found = scorer.score(*labels([prompt(0, 1)]))
    assert found.stats.models[0].tokens == len(prompt(0, 1))


def test_calls_take_turns() -> None:
    kept = branches.Branches(kept=True)
    asked = [[prompt(0, 1)], [[24]]]
    each = Scoring(make("llama", 0), *asked, branches=kept).each()
    next(each)
    with pytest.raises(ValueError, match="in use by a call under way"):
        dict(Scoring(make("llama", 0), *asked, branches=kept).each())
    each.close()
    assert dict(Scoring(make("llama", 0), *asked, branches=kept).each())


def test_a_model_that_the_engine_cannot_run_says_so() -> None:
    model: Any = make("llama", 0)
    model._supports_attention_backend = False
    with Scorer(model) as scorer:
        found = scorer.score(*labels([prompt(0, 1)]))
    (note,) = found.stats.notes
    assert note == ("nothing is shared: model0 does not use Transformers' attention interface")
    assert [m.tokens for m in found.stats.models] == [2 * len(prompt(0, 1))]
