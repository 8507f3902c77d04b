"""Steps feed few slots where few have rows, and the numbers are those of all slots fed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
from crossfade.decoding.engine.group import Group
from crossfade.decoding.loop import SIZES, Loop
from served import FADED, PROMPT, SAMPLED, adapters, alone, apart, until
from sweeps import product

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

Terms = dict[str, Any]


@pytest.fixture
def fed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step of a model had, as they come, without those that read prompts."""
    counts: list[int] = []
    feed = Group.feed

    def counted(self: Group, tokens: Any, at: Any = None, slots: Any = None) -> Any:
        counts.append(len(self.terms) * len(tokens if slots is None else slots))
        return feed(self, tokens, at, slots)

    monkeypatch.setattr(Group, "feed", counted)
    return counts


@pytest.mark.parametrize(("make", "tape"), product([apart, adapters], [True, False], together=1))
def test_few_rows_in_many_slots(make: Callable[[], Terms], tape: bool, fed: list[int]) -> None:
    terms, engine = make(), cf.Engine(tape=tape)
    want = [
        alone(terms, PROMPT, blend=FADED, weights={"w": 0.7}, seed=i, **SAMPLED) for i in range(3)
    ]
    fed.clear()
    with cf.Session(terms, max_batch=32, engine=engine, weights={"w": 0.7}) as session:
        one = session.submit(PROMPT, blend=FADED, seed=0, **SAMPLED)
        assert one.result(30).responses == want[0].responses
        most = 1 if make is apart else 3  # The adapters are rows of one forward.
        assert max(fed) <= most
        several = [session.submit(PROMPT, blend=FADED, seed=i, **SAMPLED) for i in range(3)]
        assert [r.result(30).responses for r in several] == [w.responses for w in want]
        assert max(fed) <= 3 * most
        for got, wanted in zip([one, *several], [want[0], *want], strict=True):
            assert (got.result().logprobs - wanted.logprobs).abs().max() < 1e-4
        (lane,) = session._worker.lanes.values()
        groups: Any = lane.loop.runner.groups
        for group in groups if tape else ():
            steps = group.backbone.tapes.steps
            assert steps, "it is used"
            assert all(some for *_, some in steps), "all of them fed some of the slots"
            assert all(s.program is not None and s.why is None for s in steps.values())
            assert any(s.proved for s in steps.values())
            assert not group.backbone.tapes.notes


def test_numbers_do_not_depend_on_how_many_are_fed(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = adapters()

    def told() -> list[Any]:
        with cf.Session(terms, max_batch=8, weights={"w": 1.1}) as session:
            each = [
                session.submit(
                    PROMPT[i:], blend=FADED, seed=i, return_term_logprobs=True, **SAMPLED
                )
                for i in range(3)
            ]
            return [r.result(30) for r in each]

    few = told()
    monkeypatch.setattr(Loop, "_to_feed", lambda self: None)
    for one, other in zip(few, told(), strict=True):
        assert one.responses == other.responses
        assert (one.logprobs - other.logprobs).abs().max() < 1e-4
        assert (one.term_logprobs - other.term_logprobs).abs().max() < 1e-4


def test_rows_come_and_go_through_all_sizes(
    fed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, then all, then fewer and fewer: each step feeds the next larger size."""
    terms = apart()
    asked_all, feed = threading.Event(), Group.feed

    def waits(*args: Any, **kwargs: Any) -> Any:
        assert asked_all.wait(60)
        return feed(*args, **kwargs)

    monkeypatch.setattr(Group, "feed", waits)
    with cf.Session({"base": terms["base"]}, max_batch=7) as session:
        asked = [SAMPLED | {"max_new_tokens": 4 + 3 * i, "eos_token_id": None} for i in range(7)]
        each = [session.submit([7, 8 + i], seed=i, **a) for i, a in enumerate(asked)]
        asked_all.set()
        until(lambda: all(r.done for r in each))
    assert {*fed} == {n for n in SIZES if n < 7} | {7}
    for i, r in enumerate(each):
        assert r.result().responses == alone(terms, [7, 8 + i], seed=i, **asked[i]).responses
