"""What a judge reads: each prompt's shared beginning once, and two prompts for each match."""

from __future__ import annotations

import random
from typing import Any

import crossfade as cf
import pytest
from crossfade.decoding.engine import branches
from judge_cases import make_judge
from tiny_models import make, make_tokenizer

N = 6
WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(autouse=True)
def every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few tokens a beginning has, it is worth to be read once."""
    monkeypatch.setitem(branches.WORTH, "cpu", 1)


def beginnings(judge: cf.Judge, prompts: list[str]) -> int:
    """How many tokens are read if no beginning is read twice."""
    ids = [judge.tokenizer(x, add_special_tokens=False)["input_ids"] for x in prompts]
    return len({tuple(x[: n + 1]) for x in ids for n in range(len(x))})


def watched(judge: cf.Judge, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked: list[str] = []
    inner = judge.prompt

    def prompt(*args: Any) -> str:
        asked.append(inner(*args))
        return asked[-1]

    monkeypatch.setattr(judge, "prompt", prompt)
    return asked


def test_pairs_of_some_contexts_read_no_beginning_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, chance = make_judge(principles=["plot", "cast"]), random.Random(0)
    contexts, firsts, seconds = (
        [" ".join(chance.choices(WORDS, k=9)) for _ in range(8)] for _ in "cab"
    )
    asked = watched(judge, monkeypatch)
    found = judge([c for c in contexts[:2] for _ in range(4)], firsts, seconds)
    (stats,) = found.stats.models
    assert len(asked) == 8 * 2 * 2
    assert stats.tokens == beginnings(judge, asked)
    assert stats.tokens < sum(len(x.split()) for x in asked) / 1.5


def test_a_tournament_reads_two_prompts_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are 2 (N - 1); the context is read once, and each answer that stands first once."""
    tokenizer = make_tokenizer()
    judge = make_judge(make("llama", 1))
    asked = watched(judge, monkeypatch)
    out = cf.generate(
        cf.Model(make(), tokenizer=tokenizer, name="policy"),
        ["the film was"],
        search=cf.Tournament(judge, n=N),
        max_new_tokens=12,
        seed=3,
    )
    assert out.bracket is not None
    matches = [m for played in out.bracket[0] for m in played if m.b is not None]
    assert len(matches) == N - 1
    assert len(asked) == 2 * (N - 1)
    policy, own = out.stats.models
    assert policy.names == ("policy",)
    assert own.tokens == beginnings(judge, asked)
