"""Faders that move while a text is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from served import FADED, PROMPT, adapters, alone, apart, until

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.usefixtures("slow"),
]

Terms = dict[str, Any]
LONG: dict[str, Any] = {"do_sample": True, "max_new_tokens": 40, "eos_token_id": None, "seed": 5}


def check(terms: Terms, request: cf.Request, at_first: float, formula: str = FADED) -> None:
    """The log-probs of each token are those of where its fader stood by then."""
    output, faders = request.result(30), [(0, at_first)]
    faders += [(n, moved["w"]) for n, moved in request.changes]
    ends = [n for n, _ in faders[1:]] + [len(output.responses[0])]
    for (start, w), end in zip(faders, ends, strict=True):
        blend = cf.parse(formula, **terms, w=w)
        want = cf.score(blend, [request.prompt_ids], output.responses).logprobs[0, start:end]
        torch.testing.assert_close(output.logprobs[0, start:end], want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("make", [apart, adapters])
def test_each_token_is_of_where_the_fader_stood(make: Callable[[], Terms]) -> None:
    terms = make()
    with cf.Session(terms, max_batch=4) as session:
        other = session.submit(PROMPT, blend=FADED, weights={"w": 0.2}, **LONG)
        request = session.submit(PROMPT, blend=FADED, weights={"w": 0.5}, **LONG)
        pieces = iter(request)
        for w in (3.0, 7.0):
            next(pieces)
            request.weights(w=w)
        request.result(30)
        assert [moved for _, moved in request.changes] == [{"w": 3.0}, {"w": 7.0}]
        check(terms, request, 0.5)
        check(terms, other, 0.2)
        assert other.changes == []
        want = alone(terms, PROMPT, blend=FADED, weights={"w": 0.2}, **LONG)
        assert other.result().responses == want.responses


def test_a_clamp_and_a_draft_have_faders_too() -> None:
    terms, formula = apart(), "base + (w * (x - y)).clamp(max=2)"
    with cf.Session(terms) as session:
        clamped = session.submit(PROMPT, blend=formula, weights={"w": 0.5}, **LONG)
        drafted = session.submit(
            PROMPT, blend=FADED, weights={"w": 0.5}, draft=cf.Draft("prompt"), **LONG
        )
        for r in (clamped, drafted):
            next(iter(r))
            r.weights(w=-1.5)
        check(terms, clamped, 0.5, formula)
        check(terms, drafted, 0.5)
        assert len(clamped.changes) == len(drafted.changes) == 1


def test_a_request_that_waits() -> None:
    """It is written with the weights that it was given last."""
    terms = apart()
    with cf.Session(terms, max_batch=1) as session:
        first = session.submit(PROMPT, **LONG | {"max_new_tokens": 200})
        until(lambda: first.begun)
        waits = session.submit(PROMPT, blend=FADED, weights={"w": 0.1}, **LONG)
        waits.weights(w=0.9)
        waits.weights(w=1.3)
        first.cancel()
        want = alone(terms, PROMPT, blend=FADED, weights={"w": 1.3}, **LONG)
        assert waits.result(30).responses == want.responses
        assert waits.changes == [(0, {"w": 0.9}), (0, {"w": 1.3})]


def test_a_search_moves_all_its_rows() -> None:
    terms = apart()
    search = cf.ChunkBeamSearch(2, 2, 4, cf.Reward(lambda prompts, texts: [0.0] * len(texts)))
    asked = LONG | {"max_new_tokens": 60, "search": search}
    with cf.Session(terms) as session:
        request = session.submit(PROMPT, blend=FADED, weights={"w": 0.2}, **asked)
        until(lambda: session.stats().rows == 4)
        request.weights(w=0.8)
        assert len(request.result(30).responses[0]) == 60
        ((tokens, moved),) = request.changes
        assert moved == {"w": 0.8}
        assert 0 <= tokens < 60
        check(terms, request, 0.2)


def test_what_cannot_be_moved() -> None:
    with cf.Session(apart(), weights={"w": 0.5}) as session:
        request = session.submit(PROMPT, blend=FADED, **LONG | {"max_new_tokens": 400})
        for faders, error, says in (
            ({"v": 1.0}, ValueError, "v is no fader .*faders: w"),
            ({"x": 1.0}, ValueError, "x is no fader"),
            ({"w": math.nan}, ValueError, "w is nan; it must be finite"),
            ({"w": math.inf}, ValueError, "w is inf; it must be finite"),
            ({"w": "1"}, TypeError, "w is '1'; it must be a number"),
            ({"w": True}, TypeError, "w is True; it must be a number"),
        ):
            with pytest.raises(error, match=says):
                request.weights(**faders)
        request.cancel()
        request.weights(w=2.0)  # It has not ended by now, and will not move any more.
        request.result(30)
        assert request.changes == []
        with pytest.raises(ValueError, match="has ended"):
            request.weights(w=1.0)
        assert session.alive
