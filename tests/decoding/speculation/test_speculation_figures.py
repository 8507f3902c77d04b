"""What a call with a draft says that it did: rounds, guesses, and what each model read."""

from __future__ import annotations

from collections import Counter
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.group import Group
from crossfade.decoding.loop import Loop
from crossfade.decoding.speculation.rounds import Rounds
from drafted import PROMPTS, SAMPLED, blend, both, changed, model, noise
from sweeps import product

COUNTED: dict[str, Any] = {
    "right texts": lambda plain: {"texts": plain},
    "changed texts": lambda plain: {"texts": [changed(r, 4) for r in plain]},
    "wrong texts": lambda plain: {"texts": noise(len(plain), 40)},
    "prompt": lambda plain: {"source": "prompt"},
    "a term": lambda plain: {"source": blend().terms[1]},
    "a model": lambda plain: {"source": model("qwen3", 8)},
    "the target": lambda plain: {"source": blend()},
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many tokens of rows that were under way checks and plain steps fed, and how often."""
    found: Counter[str] = Counter()
    step, check = Loop.step, Rounds._check

    def stepped(self: Loop) -> Any:
        found.update(tokens=int(self.slots.live.sum()), steps=1)
        return step(self)

    def checked(self: Rounds, loop: Loop, guesses: Any) -> Any:
        fed = int(loop.slots.live.sum()) * (1 + guesses.tokens.shape[1])
        found.update(tokens=fed, rounds=1, guessed=sum(guesses.counts))
        return check(self, loop, guesses)

    monkeypatch.setattr(Loop, "step", stepped)
    monkeypatch.setattr(Rounds, "_check", checked)
    return found


@pytest.mark.parametrize(("kind", "most"), product([*COUNTED], [None, 2], together=1))
def test_what_was_read_and_guessed(kind: str, most: int | None, read: Counter[str]) -> None:
    how = {**SAMPLED, "max_new_tokens": [12, 5, 9, 1, 12], "max_batch": most}
    plain = cf.generate(blend(), PROMPTS, **how)
    prompts = sum(len(p) - 1 for p in PROMPTS)
    read.clear()
    draft = cf.Draft(**COUNTED[kind](plain.responses), length=3)
    out = cf.generate(blend(), PROMPTS, draft=draft, **how)
    assert out.responses == plain.responses
    stats = out.stats
    assert (stats.rounds, stats.guessed) == (read["rounds"], read["guessed"])
    assert stats.right == int(out.tokens_by_draft.sum()) <= stats.guessed
    assert stats.acceptance == (stats.right / stats.guessed if stats.guessed else 0.0)
    assert (out.tokens_by_draft < out.lengths).all()
    assert stats.tokens == plain.stats.tokens == sum(map(len, plain.responses))
    if kind != "the target":  # Whose models also guess, under the same names.
        for model_stats in stats.models[:2]:
            assert model_stats.tokens == prompts + read["tokens"]
    if kind in ("right texts", "the target"):
        assert stats.acceptance == 1.0
    steps = read["rounds"] + read["steps"]
    if kind in ("right texts", "changed texts", "the target"):
        assert steps < sum(x.forwards for x in plain.stats.models) / 2
    assert "guessed tokens were drawn" in repr(stats) or not stats.guessed


def test_a_draft_of_its_own_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fed: Counter[str] = Counter()
    feed, append = Group.feed, Group._append

    def feeding(self: Group, tokens: Any, at: Any = None, slots: Any = None) -> Any:
        fed[self.name] += 1
        return feed(self, tokens, at, slots)

    def appending(self: Group, *given: Any) -> Any:
        fed[self.name] += 1
        return append(self, *given)

    monkeypatch.setattr(Group, "feed", feeding)
    monkeypatch.setattr(Group, "_append", appending)
    how = {**SAMPLED, "max_new_tokens": 12}
    draft = cf.Draft(model("qwen3", 8), length=3)
    cf.generate(blend(), PROMPTS, draft=draft, **how)  # The engine has met the model by now.
    fed.clear()
    out = cf.generate(blend(), PROMPTS, draft=draft, **how)
    names = [m.names for m in out.stats.models]
    assert names == [("model0",), ("model1",), ("draft.model0",)]
    assert {m.names[0]: m.forwards for m in out.stats.models} == fed
    guesser = out.stats.models[-1]
    assert guesser.forwards > 2 * out.stats.rounds
    assert guesser.tokens > sum(len(p) - 1 for p in PROMPTS) + out.stats.guessed // 2


def test_a_shared_draft_runs_once_for_both() -> None:
    """Its own forwards guess and check at once; those of the others check several tokens."""
    target = blend()
    found = both(target, PROMPTS, cf.Draft(target.terms[0], length=3), **SAMPLED, max_new_tokens=13)
    first, second = found.drafted.stats.models
    rounds = found.drafted.stats.rounds
    assert first.names == ("model0",)
    assert second.forwards < found.plain.stats.models[1].forwards
    assert first.forwards > 3 * rounds
    assert first.tokens == second.tokens


def test_forwards_are_fewer_than_tokens() -> None:
    how = {**SAMPLED, "max_new_tokens": 40}
    plain = cf.generate(blend(), PROMPTS[:1], **how)
    out = cf.generate(blend(), PROMPTS[:1], draft=cf.Draft(texts=plain.responses, length=16), **how)
    assert out.stats.models[0].forwards < 40 / 8 < plain.stats.models[0].forwards
    assert out.stats.rounds == 3
    assert out.stats.right == 37


def test_searches_count_what_they_read(read: Counter[str]) -> None:
    """Also rows that wait before a guess, and those that were dropped."""
    ratio = cf.LogRatio(cf.Model(model("gpt2", 1)), cf.Model(model("qwen3", 2)))
    prompts = sum(len(p) - 1 for p in PROMPTS)
    for search in (
        cf.ChunkBeamSearch(2, 2, 3, ratio),
        cf.ParticleFilter(4, 6, ratio, chunk_end=cf.entropy_above(2.2)),
    ):
        for source in ("prompt", model()):
            read.clear()
            how = {**SAMPLED, "max_new_tokens": 11, "search": search}
            draft = cf.Draft(source, length=3)
            out = cf.generate(cf.Model(model()), PROMPTS, draft=draft, **how)
            assert out.stats.models[0].tokens == prompts + read["tokens"]
            assert out.stats.guessed == read["guessed"]


def test_without_a_draft_there_are_no_figures() -> None:
    out = cf.generate(blend(), PROMPTS, **SAMPLED, max_new_tokens=3)
    assert out.tokens_by_draft is None
    assert (out.stats.rounds, out.stats.guessed, out.stats.right) == (0, 0, 0)
    assert "draft" not in repr(out.stats)


def test_tokens_by_draft_are_of_rows_in_order() -> None:
    plain = cf.generate(blend(), PROMPTS, **SAMPLED, max_new_tokens=9)
    texts = [plain.responses[0], None, None, plain.responses[3], None]
    for most in (None, 2):
        how = {**SAMPLED, "max_new_tokens": 9, "max_batch": most}
        out = cf.generate(blend(), PROMPTS, draft=cf.Draft(texts=texts, length=8), **how)
        assert out.tokens_by_draft.dtype == torch.int64
        assert out.tokens_by_draft.tolist() == [8, 0, 0, 8, 0]
