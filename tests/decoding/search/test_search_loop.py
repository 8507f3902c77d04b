"""Searches that join and leave a running loop: each finds what it finds alone."""

from __future__ import annotations

import functools
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import batching
from crossfade.decoding.generation import Generation
from crossfade.decoding.inputs import Requests
from crossfade.decoding.job import Job, Row
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from judges import Keeper, words
from loops import Open, same
from tiny_models import EOS, VOCAB, make

GENERATOR = torch.Generator().manual_seed(9)
PROMPTS = [torch.randint(5, VOCAB, (n,), generator=GENERATOR).tolist() for n in (3, 1, 25, 9)]
LIMITS = [7, 12, 5, 10]
WEIGHTS = [0.3, 1.0, -0.5, 0.8]
GROUPS = 2  # searches that have places at a time
KINDS = (
    *("beams", "beams, support", "best of n", "tournament", "particles", "uncertain"),
    *("uncertain, support", "budget"),
)
STEADY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=12,
    phases=[Phase.generate],  # Without shrinking, which takes minutes.
    suppress_health_check=list(HealthCheck),
)


@functools.cache
def generation(kind: str) -> Generation:
    base, tuned, ref = (cf.Model(make(s, i)) for i, s in enumerate(("llama", "gpt2", "qwen3")))
    blend = base + torch.tensor(WEIGHTS) * (tuned - ref)
    value = cf.LogRatio(cf.Model(make("llama", 5)), cf.Model(make("gpt2", 6)))
    search: Any = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=3, value=value)
    if kind == "particles":
        search = cf.ParticleFilter(4, 3, value, temperature=2.0)
    if kind.startswith("uncertain"):
        search = cf.ChunkBeamSearch(2, 2, 6, value, chunk_end=cf.entropy_above(2.3))
    if kind == "budget":  # The limits leave 4, 2, 4 and 2 rows.
        search = cf.ChunkBeamSearch(2, 2, 3, value, budget=28)
    if kind == "best of n":
        search = cf.BestOfN(3, value=value)
    if kind == "tournament":
        search = cf.Tournament(Keeper(lambda context, a, b: len(a) / len(a + b)), n=5)
    if kind.endswith("support"):
        blend = blend.within(cf.Support(min_p=0.3))
    arguments = {"max_new_tokens": LIMITS, "eos_token_id": [EOS, 20, 30]}
    return Generation(blend, tokenizer=words(), search=search, arguments=arguments)


def job(kind: str, request: int) -> Job:
    part = Requests([PROMPTS[request]], numbers=[request], total=len(PROMPTS))
    return generation(kind).job(part, [request])


@functools.cache
def alone(kind: str, request: int) -> list[Any]:
    """What the rows of a search have written when they leave a loop that has no other."""
    its = job(kind, request)
    loop = Open(generation(kind), its, len(its), longest=64, limit=16, tells=False)
    loop.loop.join(its.rows())
    loop.drain()
    return [loop.left[row] for row in sorted(loop.left, key=lambda row: row.index)]


@pytest.mark.parametrize("kind", KINDS)
def test_searches_alone_are_those_of_a_call(kind: str) -> None:
    """What all other tests of this file compare with is what `cf.generate` gives."""
    of = generation(kind)
    out = cf.generate(
        of.call.blend,
        PROMPTS,
        tokenizer=words(),
        search=of.search,
        seed=list(range(len(PROMPTS))),
        max_new_tokens=LIMITS,
        eos_token_id=[EOS, 20, 30],
    )
    for i in range(len(PROMPTS)):
        best = alone(kind, i)[0]
        assert best.ids == out.responses[i]
        torch.testing.assert_close(best.values[0], out.values[i])
        if kind == "tournament":
            assert str(best.outcome.rounds) == str(out.bracket[i])


@pytest.mark.parametrize("kind", KINDS)
def test_searches_that_come_and_go(kind: str) -> None:
    """At every step a search may join, and one may be cancelled by one of its rows."""

    @settings(STEADY, max_examples=12 if kind == "beams" else 4)
    @given(
        st.lists(
            st.one_of(
                st.tuples(st.just("join"), st.integers(0, len(PROMPTS) - 1)),
                st.tuples(st.just("cancel"), st.integers(0, 40)),
                st.tuples(st.just("advance"), st.integers(1, 7)),
            ),
            min_size=6,
            max_size=16,
        )
    )
    def run(events: list[tuple[str, int]]) -> None:
        first = job(kind, 0)
        size = len(first)
        loop = Open(generation(kind), first, GROUPS * size, tells=False)
        rows: dict[Row, int] = {}
        cancelled: set[int] = set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(batching.MAX_TOKENS, "cpu", 6)
            for name, n in events:
                if name == "join":
                    its = job(kind, n).rows()
                    rows |= dict.fromkeys(its, n)
                    loop.loop.join(its)
                elif name == "cancel" and rows:
                    row = list(rows)[n % len(rows)]
                    if row not in loop.left:
                        cancelled.add(id(row.job))
                    loop.loop.cancel([row])
                else:
                    for _ in range(n):
                        loop.advance()
                loop.check_places()
            loop.drain()
        loop.check_places()
        assert loop.left.keys() == rows.keys()
        assert len(loop.loop.places.free) == GROUPS * size
        for row, request in rows.items():
            written = loop.left[row]
            if id(row.job) in cancelled:
                assert not written.ended, "all of a request leave together"
            elif row.is_returned:
                same(written, alone(kind, request)[row.index], f"{request} {events}")

    run()
