"""Timing on a machine of our own making: what is in a figure, and what is kept out of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade.bench import timing
from crossfade.bench.contenders import ROWS, WEIGHTS
from crossfade.bench.timing import Sample, Timing, Turn

CACHED, FROM_MEMORY, PAGES, CODE, SLICE = 10, 90, 8000, 500, 8000  # microseconds
PAGES_STAY, EMPTYING = 200_000, 30_000


class Machine:
    """Its memory is as slow as it is cold, and pages leave it that nothing touches for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.us = 0.0
        self.waited = 0.0
        self.own_memory = False
        self.log: list[str] = []
        self.cached: set[Any] = set()
        self.touched: dict[Any, float] = {}
        monkeypatch.setattr(timing, "perf_counter", lambda: self.us / 1e6)
        monkeypatch.setattr(timing, "waited_us", lambda: self.waited)
        monkeypatch.setattr(timing, "empty_caches", self.empty_caches)

    def empty_caches(self) -> None:
        self.cached.clear()
        self.us += EMPTYING

    def ways(self, name: str, reads: int = 1) -> list[Callable[[], None]]:
        """Calls of a contender that goes over either of two inputs, so many times."""
        return [lambda i=i: self.run(name, i, reads) for i in range(2)]

    def run(self, name: str, inputs: int, reads: int) -> None:
        self.log.append(name)
        memory = (name if self.own_memory else "shared", inputs)
        if reads:
            self.us += PAGES * (self.touched.get(memory, -1e9) + PAGES_STAY < self.us)
            self.us += FROM_MEMORY * (memory not in self.cached)
            self.cached.add(memory)
        self.us += CODE * (name not in self.cached)
        self.cached.add(name)
        self.us += CACHED * reads or 1
        self.touched[memory] = self.us


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("names", list(itertools.permutations(("read", "one", "long"))))
@pytest.mark.parametrize(("cold", "memory"), [(True, FROM_MEMORY), (False, 0)])
@pytest.mark.parametrize("own_memory", [True, False])
def test_nobody_pays_for_being_first(
    machine: Machine, names: tuple[str, ...], cold: bool, memory: int, own_memory: bool
) -> None:
    """Neither pages nor code are in a figure; where it is cold, all read from memory once.

    Pages leave the memory in the turn of the long contender, unless something touches them.
    """
    machine.own_memory = own_memory
    reads = {"read": 1, "one": 1, "long": 3 * PAGES_STAY // 4 // CACHED}
    ways = {name: machine.ways(name, reads[name]) for name in names}
    found = timing.cpu_times(ways, "read", 0.0, cold)
    assert set(found) == {"one", "long"}
    for name, t in found.items():
        assert t.us == pytest.approx(memory + CACHED * reads[name])
        assert t.floor_us == pytest.approx(memory + CACHED)
        assert t.spread == pytest.approx(0, abs=1e-9)
    timing.check_floors("a case", found, "cpu")


def test_time_and_turns(machine: Machine) -> None:
    """There are turns until the time is over, but never too few for a median."""
    for seconds, turns in ((0.0, timing.MIN_TURNS), (3.0, 34)):  # a turn takes some 0.09 s
        machine.log.clear()
        timing.cpu_times(
            {"read": machine.ways("read"), "one": machine.ways("one")}, "read", seconds
        )
        assert machine.log.count("one") == pytest.approx(3 * turns, rel=0.05)


def test_the_floor_is_beside_what_it_bounds() -> None:
    """It is called before and after each contender, and its next call serves the next one too."""
    clock = itertools.count(1.0)
    seen = []

    def sample(name: str, turn: int) -> Sample:
        seen.append((name, turn))
        return Sample(next(clock))

    turn = timing.one_turn(sample, {"a": None, "floor": None, "b": None}, "floor", 4)
    assert seen == [(name, 4) for name in ("floor", "a", "floor", "b", "floor")]
    assert turn.calls == {"a": Sample(2.0), "b": Sample(4.0)}
    assert turn.floors == {
        "a": (Sample(1.0), Sample(3.0)),
        "b": (Sample(3.0), Sample(5.0)),
    }


def test_memory_that_slows_down_slows_the_floor_too() -> None:
    """Each contender is set against the floors beside it, whatever the memory does later."""
    turns = [
        Turn(
            {"a": Sample(15.0), "b": Sample(60.0)},
            {"a": (Sample(10.0), Sample(10.0)), "b": (Sample(40.0), Sample(40.0))},
        )
    ] * timing.MIN_CALLS
    found = timing.summed_up(turns)
    assert {name: t.us / t.floor_us for name, t in found.items()} == {"a": 1.5, "b": 1.5}


def interrupt(machine: Machine, when: Callable[[str], bool]) -> None:
    """Let a thread wait for its processor, for a whole time slice, in some calls."""

    def run(name: str, inputs: int, reads: int) -> None:
        Machine.run(machine, name, inputs, reads)
        if when(name):
            machine.waited += SLICE
            machine.us += SLICE

    machine.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("every", [4, 2])
def test_interrupted_calls_are_left_out(machine: Machine, every: int) -> None:
    """They are made anew, until nothing interrupts them."""
    calls = itertools.count()
    interrupt(machine, lambda _: next(calls) % every == 0)
    ways = {"read": machine.ways("read"), "three": machine.ways("three", 3)}
    (t,) = timing.cpu_times(ways, "read", 5.0).values()
    assert t.us == pytest.approx(FROM_MEMORY + 3 * CACHED)
    assert t.floor_us == pytest.approx(FROM_MEMORY + CACHED)
    assert (t.interrupted, t.floor_interrupted) == (0, 0)


def test_a_long_call_is_not_made_anew(machine: Machine) -> None:
    reads = timing.LONG_US // CACHED
    ways = {"read": machine.ways("read"), "long": machine.ways("long", reads)}
    interrupt(machine, lambda name: name == "long")
    (t,) = timing.cpu_times(ways, "read", 3.0).values()
    assert 2 * machine.log.count("long") == machine.log.count("read")
    assert t.interrupted == 1
    assert t.us == pytest.approx(timing.LONG_US + FROM_MEMORY + SLICE)


def test_more_turns_are_taken_where_calls_are_interrupted(machine: Machine) -> None:
    """Until enough of each were not, or three times the seconds are over."""
    ways = {"read": machine.ways("read"), "busy": machine.ways("busy", 3)}
    for good_after, most in ((5.0, 6.2), (1e9, 9.5)):
        machine.us = 0.0
        interrupt(machine, lambda name, good=good_after: name == "busy" and machine.us < good * 1e6)
        (t,) = timing.cpu_times(ways, "read", 3.0).values()
        assert most - 1 < machine.us / 1e6 < most
        assert t.us == pytest.approx(FROM_MEMORY + 3 * CACHED + SLICE * (good_after > most))


def test_figures_of_a_timing() -> None:
    calls, floors = ([Sample(float(us)) for us in order] for order in ((12, 10, 14), range(8)))
    t = timing.timing_of(calls, floors)
    assert (t.us, t.floor_us, t.floor_quarter_us) == (12.0, 3.5, 2.0)
    assert t.spread == pytest.approx(4 / 12)


def test_a_contender_that_is_always_interrupted_is_as_slow_as_it_was() -> None:
    floors = Sample(1.0), Sample(3.0, True)
    turns = [Turn({"a": Sample(9.0, True)}, {"a": floors})] * timing.MIN_CALLS
    (t,) = timing.summed_up(turns).values()
    assert (t.us, t.floor_us, t.interrupted, t.floor_interrupted) == (9.0, 1.0, 1.0, 0.5)


def test_a_floor_that_is_nearly_always_interrupted_is_none() -> None:
    bad = Sample(8.0, True)
    turns = [Turn({"a": Sample(9.0)}, {"a": (bad, bad)})] * 7
    turns.append(Turn({"a": Sample(9.0)}, {"a": (Sample(8.0), bad)}))
    with pytest.raises(timing.Interrupted, match=r"all but 1 of the 16 calls .* beside 'a'"):
        timing.summed_up(turns)


def test_what_beats_its_floor_fails(machine: Machine) -> None:
    """As what reads nothing does."""
    ways = {"read": machine.ways("read"), "ours": machine.ways("ours", 0)}
    found = timing.cpu_times(ways, "read", 0.0)
    with pytest.raises(
        timing.FasterThanItsFloor, match=r"the case: 'ours' takes 1.00 us, but its floor 100.00 us"
    ):
        timing.check_floors("the case", found, "cpu")


@pytest.mark.parametrize("device", timing.NOISE)
def test_noise_is_allowed_for(device: str) -> None:
    """A floor that is noisy is worth what a quarter of its calls stay below."""
    least = 80.0 * (1 - timing.NOISE[device])
    timing.check_floors("a case", {"a": Timing(least + 1, 100.0, 80.0)}, device)
    with pytest.raises(timing.FasterThanItsFloor):
        timing.check_floors("a case", {"a": Timing(least - 1, 100.0, 80.0)}, device)


@pytest.mark.parametrize(("waits", "interrupted"), [(4, False), (6, True)])
def test_a_call_is_interrupted_if_threads_wait(
    machine: Machine, waits: int, interrupted: bool
) -> None:
    def call() -> None:
        machine.us += 100
        machine.waited += waits

    sample = timing.timed(call)
    assert sample.us == pytest.approx(100)
    assert sample.interrupted == interrupted


def test_how_long_threads_have_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the second number of each thread's file, in nanoseconds."""
    monkeypatch.setattr(timing, "TASKS", tmp_path)
    assert timing.waited_us() == 0
    for i in (1, 2):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "schedstat").write_text(f"9000000 {i}500 77\n")
    assert timing.waited_us() == pytest.approx(1.5 + 2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [2, 3, 8, 4099])
def test_every_byte_is_read_once(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last seven at most, which both halves must be of one length for."""
    halves: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "dot", lambda *two: halves.extend(two))
    x = torch.ones(3, size, dtype=dtype)
    timing.read(x)
    assert halves[0].data_ptr() == x.data_ptr()
    assert halves[1].data_ptr() == x.data_ptr() + halves[0].nbytes
    assert len(halves[0]) == len(halves[1])
    assert 0 <= x.nbytes - sum(h.nbytes for h in halves) < 8


def test_a_read_needs_one_piece() -> None:
    timing.read(torch.ones(1000))
    with pytest.raises(RuntimeError, match="view"):
        timing.read(torch.ones(4, 6).t())


def test_the_largest_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "CACHES", tmp_path)
    assert timing.largest_cache() == 0
    for i, size in enumerate(("48K\n", "2048K\n", "300M\n")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size)
    assert timing.largest_cache() == 300 << 20


@pytest.mark.parametrize(
    ("rows", "least", "most"),
    [("flat", 100_000, 104_000), ("normal", 3000, 8000), ("real", 10, 80)],
)
def test_how_many_tokens_pass_top_p(rows: str, least: int, most: int) -> None:
    z = ROWS[rows](4, 128_256, torch.Generator().manual_seed(0))
    blended = sum(w * t.log_softmax(-1) for w, t in zip(WEIGHTS, z, strict=True))
    assert isinstance(blended, torch.Tensor)
    p = blended.softmax(-1).sort(-1, descending=True).values
    passed = (p.cumsum(-1) - p < 0.9).sum(-1)
    assert least < passed.min()
    assert passed.max() < most
