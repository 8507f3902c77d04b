"""Places hold what their rows write and no more: nothing grows with the number of requests."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.generation import Generation
from crossfade.decoding.inputs import Requests
from crossfade.decoding.job import Row
from crossfade.decoding.rows import AHEAD, Slots, kept
from loops import Open
from tiny_models import EOS, make, make_letters

PLACES = 4
OPTIONS: dict[str, Any] = {
    "do_sample": True,
    "max_new_tokens": 6,
    "eos_token_id": [EOS, 20, 30],
    "stop_strings": ["e", "th"],
}


@pytest.fixture(scope="module")
def generation() -> Generation:
    base, tuned = cf.Model(make("llama", 0)), cf.Model(make("gpt2", 1))
    blend = (1.4 * base - 0.4 * tuned).within(cf.Support(min_p=0.3))
    return Generation(blend, tokenizer=make_letters(), arguments=dict(OPTIONS))


class Session:
    """Requests of one row each. Whenever one has left, the next one joins."""

    def __init__(self, generation: Generation) -> None:
        self.generation, self.made = generation, 0
        self.jobs: list[weakref.ref[Any]] = []
        self.open = Open(generation, self._job(), PLACES)

    def _job(self) -> Any:
        prompt = [5 + self.made % 40, *range(7, 8 + self.made % 11)]
        self.made += 1
        found = self.generation.job(Requests([prompt]), [self.made])
        self.jobs.append(weakref.ref(found))
        return found

    def run(self, requests: int) -> None:
        loop = self.open.loop
        for i in range(requests):
            while loop.free_places < 1:
                self.open.advance()
                self.open.left.clear()
                self.open.told.clear()
            rows = self._job().rows()
            loop.join(rows)
            if i % 7 == 3:
                loop.cancel(rows)  # while it waits
            if i % 5 == 2:
                self.open.advance()
                loop.cancel([*loop.seated.values()][:1])
        self.open.drain()
        self.open.left.clear()
        self.open.told.clear()


@contextmanager
def no_collection() -> Iterator[None]:
    """Objects that only a garbage collection would free count as held."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_nothing_of_requests_stays(generation: Generation) -> None:
    """Nothing holds rows or jobs that have left, but for the last ones."""
    with no_collection():
        session = Session(generation)
        session.run(60)
        assert session.made > 60
        assert sum(job() is not None for job in session.jobs) <= 1 + PLACES
        session.open.check_places()
        assert not session.open.loop.warned


def test_memory_does_not_grow_with_requests(generation: Generation) -> None:
    session = Session(generation)
    session.run(40)  # whatever is made once
    slots, groups = session.open.slots, session.open.runner.groups
    buffers = {name: x.data_ptr() for name, x in slots.written.items()}
    tracemalloc.start()
    try:
        with no_collection():
            session.run(5)
            gc.collect()  # It also empties Python's lists of free objects.
            before, _ = tracemalloc.get_traced_memory()
            cache = [g.cache.nbytes for g in groups]
            session.run(100)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 200_000, "a request alone holds more than 2,000 bytes"
    assert [g.cache.nbytes for g in groups] == cache
    assert {name: x.data_ptr() for name, x in slots.written.items()} == buffers


def test_rows_that_failed_are_forgotten() -> None:
    """A loop knows which rows it has warned of only while they have places."""
    model = make("llama", 0)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    generation = Generation(model, arguments={"max_new_tokens": 4, "do_sample": False})
    bad, good = (generation.job(Requests([[5, i]]), None) for i in (9, 8))
    loop = Open(generation, bad, 2)
    loop.loop.join([*bad.rows(), *good.rows()])
    with pytest.warns(RuntimeWarning, match="request 0 was ended at its token 0"):
        loop.drain()
    assert [w.failed for w in loop.left.values()] == [True, False]
    assert not loop.loop.warned


def written(slots: Slots, live: list[bool], tokens: list[int]) -> None:
    """One step in which these places write these tokens."""
    from crossfade.ops import BlendSample

    slots.reserve()
    slots.live[:] = torch.tensor(live)
    numbers = torch.tensor(tokens, dtype=torch.float32)
    slots.write(BlendSample(torch.tensor(tokens), numbers, numbers, None, None), {})


def slots_of(count: int, limit: int) -> tuple[Slots, list[Row]]:
    arguments = {"max_new_tokens": limit, "eos_token_id": EOS}
    job = Generation(make("llama", 0), arguments=arguments).job(
        Requests([[5, 6]] * count), list(range(count))
    )
    device = torch.device("cpu")
    return Slots(count, job.table, kept(0, 0), 0, limit, device), job.rows()


def test_buffers_grow_with_the_longest_response_alone() -> None:
    """Two places take rows of 20 tokens again and again; a third row outgrows the first buffers."""
    count = 3
    slots, rows = slots_of(count, 2 * AHEAD)
    slots.seat([0, 1], rows[:2])
    for step in range(3 * AHEAD):
        if step and step % 20 == 0:
            taken = slots.take({0: rows[0], 1: rows[1]})
            assert [len(w) for w in taken] == [20, 20]
            slots.seat([0, 1], rows[:2])
        written(slots, [True, True, False], [3, 4, 0])
        assert slots.capacity == AHEAD
    slots.seat([2], rows[2:])
    for _ in range(AHEAD + 1):
        slots.new[:2] = 0
        written(slots, [True, True, True], [3, 4, 5])
    assert slots.capacity == 2 * AHEAD
    (long,) = slots.take({2: rows[2]})
    assert long.ids == [5] * (AHEAD + 1)


def test_a_place_that_is_free_needs_no_room() -> None:
    """A response that filled the buffers has left, and they do not grow by what others write."""
    slots, rows = slots_of(2, AHEAD)
    slots.seat([0, 1], rows)
    for _ in range(AHEAD):
        written(slots, [True, False], [3, 0])
    (whole,) = slots.take({0: rows[0]})
    assert len(whole) == AHEAD
    for _ in range(4):
        written(slots, [False, True], [0, 4])
    assert slots.capacity == AHEAD
    slots.seat([0], rows[:1])
    written(slots, [True, True], [9, 4])
    assert slots.take({1: rows[1]})[0].ids == [4] * 5
    assert whole.ids == [3] * AHEAD, "what left is a copy"


def test_ends_are_each_rows_own() -> None:
    """EOS, a failed draw and a limit end one row each; a row that is not live writes nothing."""
    slots, rows = slots_of(4, 3)
    slots.seat(range(4), rows)
    written(slots, [True, True, True, False], [EOS, -1, 7, 8])
    assert slots.finished.tolist() == [True, False, False, False]
    assert slots.failed.tolist() == [False, True, False, False]
    assert slots.live.tolist() == [False, False, True, False]
    for token in (8, 9):
        written(slots, slots.live.tolist(), [0, 0, token, 0])
    assert not slots.live.any()
    found = slots.take(dict(enumerate(rows)))
    assert [w.ids for w in found] == [[EOS], [], [7, 8, 9], []]
    assert [w.columns["logprobs"].tolist() for w in found] == [
        [float(EOS)],
        [],
        [7.0, 8.0, 9.0],
        [],
    ]
    assert all(w.ended for w in found)


def test_a_fork_copies_what_was_written() -> None:
    slots, rows = slots_of(3, 9)
    slots.seat(range(3), rows)
    for token in (3, 4, 5):
        written(slots, [True, True, False], [token, 10 + token, 0])
    slots.fork([2, 0], [0, 0], [True, False])
    written(slots, slots.live.tolist(), [6, 16, 26])
    found = slots.take(dict(enumerate(rows)))
    assert [w.ids for w in found] == [[3, 4, 5], [13, 14, 15, 16], [3, 4, 5, 26]]
