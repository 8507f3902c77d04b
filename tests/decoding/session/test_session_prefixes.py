"""Of a prompt only that is read which no free slot's caches hold, within one scope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
from served import FADED, adapters, alone, apart, until
from sweeps import every

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Terms = dict[str, Any]
ASKED: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": True, "seed": 4}
START = [7, 9, 30, 12, 41, 42]
LORA = {"x": 0.7, "y": -0.4}


def reused(session: cf.Session, before: int = 0) -> int:
    return session.stats().reused_tokens - before


@pytest.mark.parametrize("make", every(2, [adapters, apart]))
def test_a_conversation_reads_only_what_is_new(make: Callable[[], Terms]) -> None:
    """Each turn's prompt is the last one's, what was answered, and what is asked next. Formulas,
    weights and faders that move do not matter, as caches are of models and not of blends."""
    terms, prompt = make(), list(START)
    each = [("base", {}), (FADED, {"w": 0.9}), (FADED, {"w": -0.5}), ("x", {})]
    with cf.Session(terms, max_batch=3) as session:
        for blend, weights in each:
            before = session.stats().reused_tokens
            with session._worker._wake:  # No step begins before this is left.
                request = session.submit(prompt, blend=blend, weights=weights, **ASKED)
                if weights.get("w") == 0.9:
                    request.weights(w=1.4)
            answer = request.result(30).responses[0]
            if not request.changes:
                want = alone(terms, prompt, blend=blend, weights=weights, **ASKED)
                assert answer == want.responses[0]
            # All but the last token of the last answer, which was not fed.
            known = 0 if prompt == START else len(prompt) - 3
            assert reused(session, before) == 3 * known
            prompt = [*prompt, *answer, 20, 21]
        assert session.stats().prompt_tokens == sum(6 + 8 * i for i in range(4))


def test_never_of_another_scope() -> None:
    with cf.Session(apart(), max_batch=4) as session:
        session.submit(START, scope="a", **ASKED).result(30)
        session.submit(START, scope="b", **ASKED).result(30)
        assert reused(session) == 0
        session.submit(START, scope="b", **ASKED).result(30)
        assert reused(session) == 3 * (len(START) - 1)
        session.submit(START, **ASKED).result(30)
        assert reused(session) == 3 * (len(START) - 1)


def test_one_slot_forgets_the_scope_before() -> None:
    terms = apart()
    with cf.Session(terms, max_batch=1) as session:
        for scope in "abab":
            r = session.submit(START, scope=scope, **ASKED)
            assert r.result(30).responses == alone(terms, START, **ASKED).responses
        assert reused(session) == 0


def test_not_of_one_that_is_under_way() -> None:
    """Two requests with one prompt at once: each reads its own, of whatever scope they are."""
    with cf.Session(apart(), max_batch=4) as session:
        both = [session.submit(list(START), scope=s, **ASKED) for s in ("a", "b", "a", "")]
        for r in both:
            r.result(30)
        (lane,) = session._worker.lanes.values()
        assert all(len(j.slots) == 1 for j in lane.loop.runner.joining)
        assert reused(session) in (0, 15)  # The second of "a" may have begun after the first.


def test_after_a_cancel() -> None:
    terms = apart()
    with cf.Session(terms, max_batch=2) as session:
        cut = session.submit(START, **ASKED | {"max_new_tokens": 400})
        until(lambda: cut.begun)
        cut.cancel()
        written = cut.result(30).responses[0]
        prompt = [*START, *written, 20]
        r = session.submit(prompt, **ASKED)
        assert r.result(30).responses == alone(terms, prompt, **ASKED).responses
        assert reused(session) == 3 * (len(prompt) - 2)
        other = [*START[:3], 50, 51]  # It begins as the one before, and goes on otherwise.
        r = session.submit(other, **ASKED)
        assert r.result(30).responses == alone(terms, other, **ASKED).responses
        assert reused(session) == 3 * (len(prompt) - 2) + 3 * 3


def test_caches_are_of_one_mix_of_adapters() -> None:
    terms = adapters()
    with cf.Session(terms, max_batch=1) as session:
        for lora, known in ((LORA, 0), (LORA, 5), ({"x": 0.1}, 0), ({"x": 0.1, "y": 0.0}, 5)):
            before = session.stats().reused_tokens
            got = session.submit(START, lora=lora, **ASKED).result(30)
            assert reused(session, before) == known
            mix = cf.Model(terms["x"].model, adapter={"x": 0.0, "y": 0.0} | lora)
            assert got.responses == alone(terms, START, blend=mix, **ASKED).responses


def test_what_a_loop_that_failed_had_counts_on() -> None:
    with cf.Session(apart(), max_batch=2) as session:
        for _ in range(2):
            session.submit(START, **ASKED).result(30)
        before = reused(session)
        assert before == 15
        (lane,) = session._worker.lanes.values()
        session._worker.call(lane._take_down).result(30)
        assert reused(session) == before
