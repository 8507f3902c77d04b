"""What fails, fails alone: the others of its loop end with the right tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.backbone import Backbone
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.modules import Unsupported
from crossfade.decoding.loop import Loop
from crossfade.decoding.session.penalties import CountPenalty
from served import FADED, PROMPT, SAMPLED, alone, apart, until
from sweeps import every

Terms = dict[str, Any]
BAD = [50, 51, 52]  # the prompt that something fails at
W = {"w": 0.8}
LONG = SAMPLED | {"max_new_tokens": 12, "eos_token_id": None}


@pytest.fixture(scope="module")
def terms() -> Terms:
    return apart()


@pytest.fixture
def session(terms: Terms) -> Iterator[cf.Session]:
    with cf.Session(terms, weights=W, max_batch=6) as session:
        yield session


def five(session: cf.Session, **asked: Any) -> list[cf.Request]:
    return [session.submit(PROMPT, blend=FADED, seed=i, **LONG, **asked) for i in range(5)]


def check(terms: Terms, requests: list[cf.Request], **asked: Any) -> None:
    """They wrote what each writes alone, and no piece came twice."""
    for i, request in enumerate(requests):
        want = alone(terms, PROMPT, blend=FADED, weights=W, seed=i, **LONG, **asked).responses[0]
        assert request.result(60).responses == [want]
        assert [t for piece in request for t in piece.ids] == want


def test_logits_that_are_nan(terms: Terms) -> None:
    """A model that gives NaN, where its weight is not 0, fails the requests that blend it."""
    broken = cf.Model(apart()["x"].model, name="broken")
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(torch.nan)
    with cf.Session({**terms, "broken": broken}, weights=W, max_batch=6) as session:
        others = five(session)
        failing = session.submit(PROMPT, blend="base + w * broken", **LONG)
        check(terms, others)
        with pytest.raises(RuntimeError, match=f"request {failing.id} .* broken gave logits"):
            failing.result(30)
        with pytest.raises(RuntimeError, match="broken gave logits"):
            list(failing)
        assert failing.reason == "error"
        assert session.alive


def test_a_model_that_raises_for_one_prompt(
    terms: Terms, session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Backbone.run

    def fails(self: Backbone, ids: torch.Tensor, *rest: Any) -> Any:
        if (ids == BAD[0]).any():
            raise ArithmeticError("not this one")
        return run(self, ids, *rest)

    monkeypatch.setattr(Backbone, "run", fails)
    quiet = LONG | {"suppress_tokens": [BAD[0]]}
    others = [session.submit(PROMPT, blend=FADED, seed=i, **quiet) for i in range(5)]
    until(lambda: others[0].begun)
    failing = session.submit(BAD, blend=FADED, **LONG)
    with pytest.raises(ArithmeticError, match="not this one"):
        failing.result(60)
    check(terms, others, suppress_tokens=[BAD[0]])
    assert session.stats().requests == {"length": 5, "error": 1}


def test_a_processor_that_raises(
    terms: Terms, session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: CountPenalty, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > len(PROMPT) + 3:
            raise ArithmeticError("no more")
        return scores

    monkeypatch.setattr(CountPenalty, "__call__", fails)
    others = five(session)
    failing = session.submit(PROMPT, blend=FADED, presence_penalty=1.0, **LONG)
    with pytest.raises(RuntimeError, match=r"CountPenalty raised ArithmeticError .*no more"):
        failing.result(60)
    check(terms, others)


@pytest.mark.parametrize("rows", every(3, [2, 1, 3]))
def test_memory_for_few_rows(
    rows: int, terms: Terms, session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where forwards of more rows find no memory, fewer are decoded at a time."""
    run, most = Backbone.run, 99

    def runs_out(self: Backbone, ids: torch.Tensor, *rest: Any) -> Any:
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, ids, *rest)

    monkeypatch.setattr(Backbone, "run", runs_out)
    requests = five(session)
    until(lambda: all(r.begun for r in requests))
    most = rows
    check(terms, requests)
    most = 99
    more = five(session)
    check(terms, more)
    assert session.stats().requests == {"length": 10}


@pytest.mark.usefixtures("slow")
def test_faders_move_again(
    terms: Terms, session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that fails once, after faders have moved: requests write again what they had told."""
    advance, fails = Loop.advance, [False]

    def once(self: Loop) -> Any:
        if fails[0]:
            fails[0] = False
            raise ArithmeticError("once")
        return advance(self)

    monkeypatch.setattr(Loop, "advance", once)
    requests = five(session)
    for r in requests:
        next(iter(r))
        r.weights(w=2.0)
    until(lambda: all(r.changes for r in requests))
    fails[0] = True
    until(lambda: not fails[0])
    requests[1].weights(w=-1.0)
    for i, r in enumerate(requests):
        ids, output = r.result(30).responses[0], r.result()
        faders = [(0, W["w"]), *((n, moved["w"]) for n, moved in r.changes)]
        for (start, w), end in zip(faders, [n for n, _ in faders[1:]] + [len(ids)], strict=True):
            mixed = cf.parse(FADED, **terms, w=w)
            want = cf.score(mixed, [PROMPT], [ids]).logprobs[0, start:end]
            torch.testing.assert_close(output.logprobs[0, start:end], want, atol=2e-4, rtol=1e-4)
        assert len(r.changes) == (2 if i == 1 else 1)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_what_was_told_stays_where_it_is_cut(
    how: str, terms: Terms, session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that begins again, and is cut before it has written all of that again."""
    advance, state, now = Loop.advance, {"fails": False, "steps": 0}, time.time()

    def fails_late(self: Loop) -> Any:
        state["steps"] += 1
        if state["fails"]:
            state["fails"] = False
            state["steps"] = 0
            raise ArithmeticError("once")
        if state["steps"] == 2 and request.before:  # It has one token again.
            if how == "cancel":
                request.cancel()
            else:
                monkeypatch.setattr(time, "time", lambda: now + 7200)
        return advance(self)

    monkeypatch.setattr(Loop, "advance", fails_late)
    asked = LONG | {"max_new_tokens": 400, "blend": FADED}
    request = session.submit(PROMPT, seed=0, timeout=3600, **asked)
    other = session.submit(PROMPT, seed=1, **asked)
    told = [next(iter(request)) for _ in range(6)]
    state["fails"] = True
    output = request.result(30)
    told += list(request)
    assert request.reason == {"cancel": "cancelled", "timeout": "timeout"}[how]
    assert [t for piece in told for t in piece.ids] == output.responses[0]
    assert len(output.logprobs[0]) == len(output.responses[0]) >= 6
    other.cancel()


def test_a_lane_that_turns_simple(
    terms: Terms, session: cf.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the engine finds that it cannot run a model, requests go on by the simple path."""
    requests = five(session)
    until(lambda: requests[0].begun)

    def refuses(*args: Any, **options: Any) -> None:
        raise Unsupported("it does something else")

    with monkeypatch.context() as patched:
        patched.setattr(Group, "step", refuses)
        check(terms, requests)
    with monkeypatch.context() as patched:
        patched.setattr("crossfade.decoding.engine.group.refuse_unsupported", refuses)
        r = session.submit(PROMPT, seed=3, return_kl_to_base=True, **LONG)
        assert r.result(30).responses == alone(terms, PROMPT, seed=3, **LONG).responses
