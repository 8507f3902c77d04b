"""Rows that join, leave and change in a running loop: all the others are as they are alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import batching
from crossfade.decoding.generation import Generation
from crossfade.decoding.inputs import Requests
from crossfade.decoding.job import Job, Row
from crossfade.decoding.rows import Written
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from loops import Open, begins, same
from tiny_models import EOS, VOCAB, lora, make, make_letters

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PIECE = 5  # tokens of prompts that one forward takes in these tests
PLACES = 4
SAMPLES = 2
STEADY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=8,  # bench/loop_fuzz.py runs as many as one asks for
    stateful_step_count=25,
    phases=[Phase.generate],  # Without shrinking, which takes minutes.
    suppress_health_check=list(HealthCheck),
)
KINDS = ("three", "adapters", "support")

# The requests that tests choose among: those of one prompt in a row share no job, but may share
# what a place still holds of the prompt.
LENGTHS = (3, 1, 9, 30, 17, 3)
GENERATOR = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(5, VOCAB, (n,), generator=GENERATOR).tolist() for n in LENGTHS]
PROMPTS[4][:12] = PROMPTS[3][:12]
REQUESTS = [
    {"prompt": p, "temperature": t, "limit": limit, "stop": stop, "weight": w}
    for p, t, limit, stop, w in (
        (PROMPTS[0], 1.0, 7, None, 0.5),
        (PROMPTS[1], 0.0, 12, None, 1.0),
        (PROMPTS[2], 0.8, 12, ["e", "nd"], 0.7),
        (PROMPTS[3], 1.0, 9, None, -0.3),
        (PROMPTS[4], 0.0, 5, ["th", "a"], 0.2),
        (PROMPTS[5], 1.3, 1, None, 1.1),
        (PROMPTS[3], 0.0, 6, None, 0.9),
    )
]


@contextmanager
def pieces(tokens: int = PIECE) -> Iterator[None]:
    """Prompts are read so many tokens at a time."""
    before = batching.MAX_TOKENS["cpu"]
    batching.MAX_TOKENS["cpu"] = tokens
    try:
        yield
    finally:
        batching.MAX_TOKENS["cpu"] = before


@functools.cache
def blend(kind: str) -> Any:
    """Weights are tensors, so that each row has its own, which can change."""
    w = torch.tensor([r["weight"] for r in REQUESTS])
    if kind == "adapters":
        model = lora(3, lora(2, make("llama", 1), "tuned"), "ref")
        base, tuned, ref = (cf.Model(model, adapter=a) for a in (None, "tuned", "ref"))
        return base + w * (tuned - ref)
    base, tuned, ref = (cf.Model(make(s, i)) for i, s in enumerate(("llama", "gpt2", "qwen3")))
    mixed = base + w * (tuned - ref)
    return mixed if kind == "three" else mixed.within(cf.Support(min_p=0.3))


@functools.cache
def generation(kind: str, copies: int) -> Generation:
    return Generation(
        blend(kind),
        tokenizer=make_letters(),
        return_term_logprobs=kind == "three",
        arguments={
            "do_sample": True,
            "temperature": [r["temperature"] for r in REQUESTS],
            "max_new_tokens": [r["limit"] for r in REQUESTS],
            "stop_strings": [r["stop"] for r in REQUESTS],
            "eos_token_id": [EOS, 20],
            "num_return_sequences": copies,
        },
    )


def job(kind: str, request: int, copies: int) -> Job:
    """A job of one request, whose draws are its own wherever it is."""
    part = Requests([REQUESTS[request]["prompt"]], numbers=[request], total=len(REQUESTS))
    return generation(kind, copies).job(part, [request])


Change = tuple[int, float]  # tokens that a row had written, and the weight that it got then


def weights(kind: str, w: float) -> torch.Tensor:
    return torch.tensor([1.0, w, -w])


@functools.cache
def alone(
    kind: str, request: int, copies: int, sample: int, changes: tuple[Change, ...] = ()
) -> Written:
    """What a row writes in a loop of its own, of one place, with the same changes."""
    its, todo = job(kind, request, copies), list(changes)
    while todo and todo[0][0] == 0:  # It began with another weight.
        table = {**its.table, "weights": weights(kind, todo.pop(0)[1]).expand(copies, -1)}
        its = dataclasses.replace(its, table=table)
    row = its.rows()[sample]
    loop = Open(generation(kind, copies), its, 1, longest=64, limit=16)
    loop.loop.join([row])
    while True:
        while todo and loop.slot(row) is not None and loop.count(row) == todo[0][0]:
            loop.loop.change(row, "weights", weights(kind, todo.pop(0)[1]))
        if not loop.advance():
            assert not todo
            return loop.left[row]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_place_are_those_of_a_call(kind: str) -> None:
    """The measure of all else in this file is what `cf.generate` gives for whole lists."""
    for copies in (1, SAMPLES):
        out = cf.generate(
            blend(kind),
            [r["prompt"] for r in REQUESTS],
            tokenizer=make_letters(),
            seed=list(range(len(REQUESTS))),
            do_sample=True,
            temperature=[r["temperature"] for r in REQUESTS],
            max_new_tokens=[r["limit"] for r in REQUESTS],
            stop_strings=[r["stop"] for r in REQUESTS],
            eos_token_id=[EOS, 20],
            num_return_sequences=copies,
            max_batch=3,
        )
        for i in range(len(REQUESTS)):
            for sample in range(copies):
                row, written = i * copies + sample, alone(kind, i, copies, sample)
                assert written.ids == out.responses[row]
                assert written.finished == bool(out.finished[row])
                torch.testing.assert_close(
                    written.columns["logprobs"], out.logprobs[row, : len(written)]
                )


def reading(kind: str, *requests: tuple[int, int], places: int = PLACES) -> tuple[Open, list[Row]]:
    """A loop that the rows of some requests, each with so many copies, have joined."""
    jobs = [job(kind, i, copies) for i, copies in requests]
    loop = Open(generation(kind, 1), jobs[0], places)
    rows = [row for its in jobs for row in its.rows()]
    loop.loop.join(rows)
    return loop, rows


@pytest.mark.parametrize("kind", KINDS)
def test_rows_under_way_go_on_while_a_prompt_is_read(kind: str) -> None:
    """A step of theirs comes between two pieces, also where another row waited for the same."""
    loop, (short,) = reading(kind, (1, 1))  # of 12 new tokens
    loop.advance()
    assert loop.count(short) == 1
    its = job(kind, 3, 3)  # of 30 tokens, for three rows
    long = its.rows()
    loop.loop.join(long)
    counts = []
    with pieces(5):
        for step in range(5):
            loop.advance()
            counts.append((loop.count(short), loop.count(long[0])))
            if step == 1:
                loop.loop.cancel(long[1:2])
                loop.check_places()
    assert counts == [(n, 0) for n in range(2, 7)]
    assert loop.left[long[1]].ids == []
    loop.drain()
    loop.check_places()
    same(loop.left[short], alone(kind, 1, 1, 0))
    for sample in (0, 2):
        same(loop.left[long[sample]], alone(kind, 3, 3, sample))


@pytest.mark.parametrize("cancelled", [[0], [1], [0, 1], [2, 0]])
def test_a_prompt_is_read_for_the_rows_that_are_left(cancelled: list[int]) -> None:
    """Whichever of them leave, also the one in whose place it is read."""
    loop, rows = reading("three", (3, 3))
    with pieces(5):
        loop.loop._seat()
        loop.loop.runner.read()  # a piece
        loop.loop.cancel([rows[i] for i in cancelled])
        loop.check_places()
        assert loop.loop.free_places == 1, "their places are taken while others read there"
        loop.drain()
    loop.check_places()
    for i, row in enumerate(rows):
        if i in cancelled:
            assert len(loop.left[row]) == 0
        else:
            same(loop.left[row], alone("three", 3, 3, i))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_together_begin_together(kind: str) -> None:
    """Their prompts take several forwards, and no row steps before the others can."""
    loop, rows = reading(kind, (0, 1), (1, 2), (5, 1))
    with pieces(2):
        assert loop.advance()
        assert not loop.loop.reading
        assert [loop.count(row) for row in rows if row not in loop.left] == [1, 1, 1]
        loop.drain()
    for row, which in zip(rows, [(0, 1, 0), (1, 2, 0), (1, 2, 1), (5, 1, 0)], strict=True):
        same(loop.left[row], alone(kind, *which))


def test_nobody_reads_for_rows_that_have_gone() -> None:
    loop, rows = reading("three", (1, 1), (3, 3))
    with pieces(5):
        loop.advance()
        loop.loop.cancel(rows[1:3])
        loop.loop.cancel(rows[3:])
        loop.check_places()
        assert not loop.loop.reading
        assert loop.loop.free_places == 3
        read = [g.tokens_read for g in loop.runner.groups]
        loop.drain()
    assert not any(g.unread for g in loop.runner.groups)
    assert [g.tokens_read for g in loop.runner.groups] == read
    assert not loop.runner.joining
    same(loop.left[rows[0]], alone("three", 1, 1, 0))


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    """Those that are read take turns, so that the one that joined later begins sooner."""
    loop, (first, long) = reading("three", (1, 1), (3, 1))
    (short,) = job("three", 2, 1).rows()  # of 9 tokens
    with pieces(5):
        loop.advance()
        loop.loop.join([short])
        for _ in range(4):
            loop.advance()
        assert loop.count(short) > 0
        assert loop.slot(long) in loop.loop.reading
        loop.drain()
    for row, i in ((first, 1), (short, 2), (long, 3)):
        same(loop.left[row], alone("three", i, 1, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_taken_as_they_are_free(kind: str) -> None:
    """Through two places, many rows, each after another of another kind in the same place."""
    several = [(i, 1 + (i + j) % SAMPLES) for j in range(3) for i in range(len(REQUESTS))]
    loop, rows = reading(kind, *several, places=2)
    loop.drain()
    loop.check_places()
    expected = [(i, copies, s) for i, copies in several for s in range(copies)]
    for row, which in zip(rows, expected, strict=True):
        same(loop.left[row], alone(kind, *which), str(which))
    assert list(loop.left) != rows, "some end before others that began before them"


def test_what_is_written_stays_when_its_place_is_taken_again() -> None:
    loop, rows = reading("three", *[(i, 1) for i in range(len(REQUESTS))], places=1)
    kept: dict[Row, tuple[list[int], torch.Tensor]] = {}
    while loop.advance():
        for row, written in loop.left.items():
            kept.setdefault(row, (written.ids, written.columns["logprobs"].clone()))
    assert list(kept) == rows
    for row, (ids, logprobs) in kept.items():
        assert loop.left[row].ids == ids
        assert torch.equal(loop.left[row].columns["logprobs"], logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_hold_from_the_next_token_on(kind: str) -> None:
    """A greedy row goes on as another call does from what is written, with other weights."""
    loop, rows = reading(kind, (1, 1), (6, 1))
    row, other = rows
    for _ in range(4):
        loop.advance()
    loop.loop.change(row, "weights", weights(kind, -1.0))
    loop.drain()
    same(loop.left[other], alone(kind, 6, 1, 0))
    before, whole = alone(kind, 1, 1, 0), loop.left[row]
    assert whole.ids[:4] == before.ids[:4]
    terms, w = blend(kind).terms, -1.0
    after: Any = terms[0] + w * (terms[1] - terms[2])
    if kind == "support":
        after = after.within(cf.Support(min_p=0.3))
    rest = cf.generate(
        after,
        [[*REQUESTS[1]["prompt"], *whole.ids[:4]]],
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=[EOS, 20],
    )
    assert whole.ids[4:] == rest.responses[0]
    assert whole.ids != before.ids


def test_what_all_rows_share_cannot_change() -> None:
    loop, (row,) = reading("three", (1, 1))
    loop.advance()
    with pytest.raises(ValueError, match="do_sample is True for all rows"):
        loop.loop.change(row, "do_sample", torch.tensor(False))


class Machine(RuleBasedStateMachine):
    """Anything may happen to rows of a running loop."""

    kind: str

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[tuple[int, int, Job]] = []
        self.rows: dict[Row, tuple[int, int, int]] = {}
        self.cut: set[Row] = set()
        self.changes: dict[Row, list[Change]] = {}
        self.open = Open(generation(self.kind, 1), job(self.kind, 0, 1), PLACES)

    @rule(request=st.integers(0, len(REQUESTS) - 1), copies=st.sampled_from([1, SAMPLES]))
    def join(self, request: int, copies: int) -> None:
        its = job(self.kind, request, copies)
        rows = its.rows()
        for row in rows:
            self.rows[row] = (request, copies, row.sample)
            self.changes[row] = []
        self.open.loop.join(rows)

    @rule(steps=st.integers(1, 6))
    def advance(self, steps: int) -> None:
        with pieces():
            for _ in range(steps):
                self.open.advance()

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """Rows that wait, that read, that write, or that have left already."""
        if self.rows:
            chosen = data.draw(st.lists(st.sampled_from(list(self.rows)), max_size=3))
            self.open.loop.cancel(chosen)
            self.cut |= {row for row in chosen if row not in self.open.left}

    @precondition(lambda self: self.open.loop.seated)
    @rule(data=st.data(), weight=st.sampled_from([0.0, 0.4, -1.0, 2.0]))
    def change(self, data: st.DataObject, weight: float) -> None:
        row = data.draw(st.sampled_from(list(self.open.loop.seated.values())))
        self.changes[row].append((self.open.count(row), weight))
        self.open.loop.change(row, "weights", weights(self.kind, weight))

    @invariant()
    def places(self) -> None:
        self.open.check_places()

    @invariant()
    def told(self) -> None:
        """What was told is what rows have written."""
        for row, written in self.open.left.items():
            assert self.open.told.get(row, []) == written.ids

    def teardown(self) -> None:
        with pieces():
            self.open.drain()
        self.open.check_places()
        assert not self.open.loop.seated
        assert len(self.open.loop.places.free) == PLACES
        assert self.open.left.keys() == self.rows.keys(), "every row leaves"
        for row, which in self.rows.items():
            written = self.open.left[row]
            made = tuple(self.changes[row])
            whole = alone(self.kind, *which, made_before(made, len(written)))
            if row in self.cut and not written.ended:
                begins(written, whole, f"{which} {made}")
            else:
                same(written, whole, f"{which} {made}")


def made_before(changes: tuple[Change, ...], tokens: int) -> tuple[Change, ...]:
    """The changes that came before a row's last token."""
    return tuple(c for c in changes if c[0] < tokens)


for _kind in KINDS:
    _machine = type(f"Machine_{_kind}", (Machine,), {"kind": _kind})
    _case = _machine.TestCase
    _case.settings = STEADY
    globals()[f"Test_{_kind}"] = _case
del _case, _machine
