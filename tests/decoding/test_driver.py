"""Several jobs in one run: interrupts, time that is up and memory that runs out in the middle."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.driver import Driver
from crossfade.decoding.engine.group import Group
from crossfade.decoding.engine.options import Engine
from crossfade.decoding.generation import Generation
from crossfade.decoding.inputs import Requests
from crossfade.decoding.job import Job
from crossfade.decoding.rows import Written
from loops import begins, same
from tiny_models import EOS, VOCAB, make

GENERATOR = torch.Generator().manual_seed(4)
PROMPTS = [
    torch.randint(5, VOCAB, (1 + 5 * i % 7,), generator=GENERATOR).tolist() for i in range(9)
]
PARTS = [(0, 1), (2,), (3, 4, 5), (6, 7), (8,)]  # the requests of each job
PLACES = 4


@pytest.fixture(scope="module")
def generation() -> Generation:
    blend = cf.Model(make("llama", 0)) + 0.5 * cf.Model(make("gpt2", 1))
    return Generation(
        blend,
        arguments={
            "do_sample": True,
            "temperature": [0.0 if i % 3 == 1 else 1.0 for i in range(len(PROMPTS))],
            "max_new_tokens": [12 - i for i in range(len(PROMPTS))],
            "eos_token_id": [EOS, 20],
        },
    )


def jobs(generation: Generation) -> list[Job]:
    return [
        generation.job(
            Requests([PROMPTS[i] for i in part], numbers=part, total=len(PROMPTS)), list(part)
        )
        for part in PARTS
    ]


def run(
    generation: Generation, several: list[Job], places: int = PLACES, simple: bool = False
) -> tuple[Driver, dict[int, Written]]:
    """What each request wrote, by its number."""
    call = generation.call
    driver = Driver(call.blend, call.models, call.vocabulary, Engine(simple=simple), places)
    found: dict[int, Written] = {}
    for written in driver.decode(several):
        number = written.row.job.numbers[written.row.request]
        assert number not in found, "a row leaves once"
        found[number] = written
    return driver, found


@pytest.fixture(scope="module")
def alone(generation: Generation) -> dict[int, Written]:
    """What each request writes in a run of its job alone."""
    found: dict[int, Written] = {}
    for job in jobs(generation):
        found |= run(generation, [job], 1)[1]
    assert len({tuple(w.ids) for w in found.values()}) > 5
    return found


def failing_at(step: int, error: BaseException) -> Callable[..., Any]:
    whole, count = Group.step, iter(range(10**6))

    def failing(self: Group, *args: Any) -> Any:
        if next(count) == step:
            raise error
        return whole(self, *args)

    return failing


@pytest.mark.parametrize("places", [1, 3, 4, 20])
@pytest.mark.parametrize("simple", [False, True], ids=["engine", "simple path"])
def test_jobs_share_places(
    simple: bool, places: int, generation: Generation, alone: dict[int, Written]
) -> None:
    _, found = run(generation, jobs(generation), places, simple)
    assert found.keys() == alone.keys()
    for number, written in found.items():
        same(written, alone[number], str(number))


@pytest.mark.parametrize("step", [0, 3, 9, 25])
def test_memory_that_runs_out(
    step: int, generation: Generation, alone: dict[int, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several jobs begin again in their order; those that had ended are not repeated."""
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(Group, "step", failing_at(step, error))
    driver, found = run(generation, jobs(generation))
    assert driver.notes == ["memory ran out: 2 rows at a time"]
    assert found.keys() == alone.keys()
    for number, written in found.items():
        same(written, alone[number], str(number))


@pytest.mark.parametrize("step", [0, 3, 9, 25])
def test_interrupts(
    step: int, generation: Generation, alone: dict[int, Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows of all jobs taken so far are given as they are; no other job is taken."""
    monkeypatch.setattr(Group, "step", failing_at(step, KeyboardInterrupt()))
    driver, found = run(generation, jobs(generation))
    assert driver.interrupted
    assert PLACES <= len(found) <= len(PROMPTS)
    assert any(not written.ended for written in found.values())
    for number, written in found.items():
        if written.ended:
            same(written, alone[number], str(number))
        else:
            begins(written, alone[number], str(number))


def test_time_that_is_up_is_each_jobs_own(
    generation: Generation, alone: dict[int, Written]
) -> None:
    """A job whose time is up is cut, also while it waits, and the others go on."""
    several = [
        dataclasses.replace(job, deadline=time.time() + (-1 if i in (0, 3) else 1e4))
        for i, job in enumerate(jobs(generation))
    ]
    _, found = run(generation, several)
    assert found.keys() == alone.keys()
    for part, job in zip(PARTS, several, strict=True):
        for number in part:
            if job.deadline is not None and job.deadline > time.time():
                same(found[number], alone[number], str(number))
            else:
                begins(found[number], alone[number], str(number))
                assert len(found[number]) <= 1
    assert len(found[0]) == 1, "what has a place at once writes a token"


def test_no_more_jobs_are_taken_than_there_are_places_for(generation: Generation) -> None:
    """So a list of any length is read as it is decoded."""
    taken: list[int] = []

    def coming() -> Any:
        for i, job in enumerate(jobs(generation)):
            taken.append(i)
            yield job

    call = generation.call
    driver = Driver(call.blend, call.models, call.vocabulary, Engine(), 2)
    for left, _ in enumerate(driver.decode(coming())):
        rows = sum(len(PARTS[i]) for i in taken)
        assert rows - left <= 2 + max(map(len, PARTS))
    assert taken == list(range(len(PARTS)))
