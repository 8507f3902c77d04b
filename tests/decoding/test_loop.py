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
from crossfade.decoding import group
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

PIECE = 8  # tokens of prompts that one forward takes in these tests
PLACES = 4
SAMPLES = 2
STEADY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
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
    before = group.MAX_TOKENS["cpu"]
    group.MAX_TOKENS["cpu"] = tokens
    try:
        yield
    finally:
        group.MAX_TOKENS["cpu"] = before


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
    return mixed if kind == "three" else mixed.within(cf.Support(min_p=0.08))


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
        assert len(self.open.loop.free) == PLACES
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
