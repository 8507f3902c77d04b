"""Contenders that are timed beside their floor, and the hardware that they ran on.

A floor is a call that nothing can beat, such as reading the inputs once. Contenders take turns, and
the floor is called right before and right after each of them:

    floor, first contender, floor, second contender, floor, and so on, again and again.

A contender is bounded by the floors beside it. All calls of a turn begin alike. Where they are
cold, the inputs are in no cache, but their pages are in memory and the code, the threads and the
allocator are warm: the call runs once untimed, other memory is read until the caches hold nothing
else, and the same code runs over other inputs. Where they are warm, the call runs once untimed, as
where what wrote the inputs has just left them in a cache.

On a CPU a call during which a thread waited for a processor that another process had says what
else the machine did: a team of threads then waits for whole time slices, of 4 to 8 ms each. Such
calls are left out.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

COLD_BYTES = 256 << 20  # more than the caches hold, where the system does not tell their size
MIN_TURNS = 7
MIN_CALLS = 5  # of a contender and of its floors that nothing disturbed
TRIES, LONG_US = 4, 100_000  # an interrupted call is made anew, but not one that takes so long
MOST_WAITING = 0.05  # of a call's time; a call in which threads waited longer was interrupted
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
TASKS = Path("/proc/self/task")
# A median below its floor by more than this share did not read its inputs, or read them elsewhere.
# On a GPU the floor is a copy, whose writes take more of the memory's time than reads do.
NOISE = {"cpu": 0.1, "cuda": 0.2}

Ways = Sequence[Callable[[], Any]]  # the same call over inputs of its own each; two or more


class FasterThanItsFloor(AssertionError):
    """A contender took less time than what it cannot do without, so that one of both is wrong."""


class Interrupted(RuntimeError):
    """Other processes took the processors from nearly all calls of a floor, which is then none."""


@dataclass(frozen=True)
class Sample:
    """What one call took; `interrupted` if a thread waited for a processor meanwhile."""

    us: float
    interrupted: bool = False


@dataclass(frozen=True)
class Timing:
    """What the calls of a contender and of the floor beside them took, in microseconds.

    Attributes:
        us: the median of the contender's calls.
        floor_us: the median of the floor's calls right before and right after them. As both are
            medians of the same turns, what slows the memory down slows both.
        floor_quarter_us: a quarter of these calls of the floor took less.
        spread: the interquartile range of the contender's calls over their median.
        interrupted: the share of the contender's calls that were interrupted.
        floor_interrupted: that of the floor's.
    """

    us: float
    floor_us: float
    floor_quarter_us: float
    spread: float = 0.0
    interrupted: float = 0.0
    floor_interrupted: float = 0.0


def cpu_times(
    ways: Mapping[str, Ways], floor: str, seconds: float, cold: bool = True
) -> dict[str, Timing]:
    """The timing of each contender but the floor, over some `seconds`.

    It takes up to three times as long where calls were interrupted.

    Raises:
        Interrupted: nearly all calls of the floor were.
    """

    start = perf_counter()

    def spent() -> float:
        return perf_counter() - start

    def sample(name: str, turn: int) -> Sample:
        found = timed(prepared(ways[name], turn, cold))
        for _ in range(TRIES - 1):
            if found.interrupted and found.us < LONG_US and spent() < 3 * seconds:
                found = timed(prepared(ways[name], turn, cold))
        return found

    turns: list[Turn] = []
    while (
        len(turns) < MIN_TURNS or spent() < seconds or (spent() < 3 * seconds and not enough(turns))
    ):
        turns.append(one_turn(sample, ways, floor, len(turns)))
    return summed_up(turns)


def cuda_times(ways: Mapping[str, Ways], floor: str, rounds: int) -> dict[str, Timing]:
    """The timing of each contender but the floor, of one call, over some `rounds`.

    All calls of a contender are captured in one CUDA graph, which is replayed twice in each of its
    turns, the first time untimed. Its inputs are larger than the caches, so that they are cold.
    """
    graphs = {}
    for name, calls in ways.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # on which the inputs are made
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError as error:  # as where a contender waits for the device
            print(f"{name} cannot be captured: {error}", file=sys.stderr)
            continue
        graphs[name] = graph

    def sample(name: str, turn: int) -> Sample:
        graphs[name].replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graphs[name].replay()
        end.record()
        end.synchronize()
        return Sample(start.elapsed_time(end) * 1e3 / len(ways[name]))

    return summed_up([one_turn(sample, graphs, floor, turn) for turn in range(rounds)])


@dataclass(frozen=True)
class Turn:
    """A call of each contender, and the two calls of the floor beside it."""

    calls: dict[str, Sample]
    floors: dict[str, tuple[Sample, Sample]]


def one_turn(
    sample: Callable[[str, int], Sample], names: Mapping[str, Any], floor: str, turn: int
) -> Turn:
    """`sample` calls a contender by its name, in the turn of this number."""
    calls, floors = {}, {}
    before = sample(floor, turn)
    for name in names:
        if name != floor:
            calls[name], after = sample(name, turn), sample(floor, turn)
            floors[name] = before, after
            before = after
    return Turn(calls, floors)


def samples(turns: Sequence[Turn], name: str) -> tuple[list[Sample], list[Sample]]:
    """The calls of a contender, and those of the floor beside it."""
    return [t.calls[name] for t in turns], [f for t in turns for f in t.floors[name]]


def enough(turns: Sequence[Turn]) -> bool:
    kinds = (kind for name in turns[0].calls for kind in samples(turns, name))
    return all(len(undisturbed(kind)) >= MIN_CALLS for kind in kinds)


def summed_up(turns: Sequence[Turn]) -> dict[str, Timing]:
    result = {}
    for name in turns[0].calls:
        calls, floors = samples(turns, name)
        calm = len(undisturbed(floors))
        if calm < MIN_CALLS:
            raise Interrupted(
                f"other processes interrupted all but {calm} of the {len(floors)} calls "
                f"of the floor beside {name!r}; measure on a machine that does nothing else"
            )
        result[name] = timing_of(calls, floors)
    return result


def timing_of(calls: Sequence[Sample], floors: Sequence[Sample]) -> Timing:
    """The timing of a contender, from its calls and those of the floor beside them."""
    times, of_floor = (undisturbed(x) or sorted(s.us for s in x) for x in (calls, floors))
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    median = statistics.median(times)
    return Timing(
        us=median,
        floor_us=statistics.median(of_floor),
        floor_quarter_us=of_floor[len(of_floor) // 4],
        spread=(high - low) / median,
        interrupted=sum(c.interrupted for c in calls) / len(calls),
        floor_interrupted=sum(f.interrupted for f in floors) / len(floors),
    )


def undisturbed(samples: Sequence[Sample]) -> list[float]:
    """The times of the calls that nothing interrupted, in ascending order."""
    return sorted(s.us for s in samples if not s.interrupted)


def check_floors(what: str, timings: Mapping[str, Timing], device: str) -> None:
    """Check that nothing beats its floor by more than the noise.

    Noise mostly adds time, so that the least that the floor is sure to take is what a quarter of
    its calls stay below.

    Raises:
        FasterThanItsFloor: names the case `what`, the contender, and both times.
    """
    for name, t in timings.items():
        if t.us < (1 - NOISE[device]) * t.floor_quarter_us:
            raise FasterThanItsFloor(
                f"{what}: {name!r} takes {t.us:,.2f} us, but its floor {t.floor_us:,.2f} us (a "
                f"quarter of its calls less than {t.floor_quarter_us:,.2f}); of the floor's calls "
                f"{t.floor_interrupted:.0%} were interrupted, and of the contender's "
                f"{t.interrupted:.0%}"
            )


def inputs_needed(nbytes: int, device: str) -> int:
    """How many inputs of this size a contender has calls for.

    A CPU's caches are emptied before a call, so that two are enough. On a GPU all of them together
    exceed the caches; but a graph holds the launches of all, and must stay small.
    """
    return 2 if device == "cpu" else min(max(2, -(-COLD_BYTES // nbytes)), 64)


# ---- One call on a CPU ---------------------------------------------------------------------------


def prepared(ways: Ways, turn: int, cold: bool) -> Callable[[], Any]:
    """The call of this turn, after all that has to run untimed before it."""
    call, elsewhere = ways[turn % len(ways)], ways[(turn + 1) % len(ways)]
    call()
    if cold:
        empty_caches()
        elsewhere()
    return call


def timed(call: Callable[[], Any]) -> Sample:
    waited, start = waited_us(), perf_counter()
    call()
    us = (perf_counter() - start) * 1e6
    return Sample(us, waited_us() - waited > MOST_WAITING * us)


def waited_us() -> float:
    """How long this process's threads have waited for a processor; 0 where no system tells it."""
    total = 0
    for path in TASKS.glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # of a thread that ended
            total += int(path.read_text().split()[1])
    return total / 1e3


def empty_caches() -> None:
    """Read other memory until the caches hold nothing else."""
    read(_other_memory())


@functools.cache
def _other_memory() -> Tensor:
    return torch.ones(max(COLD_BYTES, 2 * largest_cache()) // 4)


def largest_cache() -> int:
    """The bytes of the largest cache that the system tells of; 0 where it tells of none."""
    units = {"K": 1 << 10, "M": 1 << 20}
    texts = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    return max((int(x[:-1]) * units[x[-1]] for x in texts if x[-1:] in units), default=0)


def read(x: Tensor) -> None:
    """Read a contiguous CPU tensor once, as fast as its memory and torch's threads allow.

    It is the dot product of both halves of its bytes. Each thread reads two streams, which keeps
    the memory busier than one does: this reaches what a loop of vector loads in C++ reaches, and
    sums over the same bytes take a tenth to a third longer.
    """
    whole = x.detach().view(-1).view(torch.uint8)
    words = whole[: len(whole) // 8 * 8].view(torch.float32)  # what numbers they are is no matter
    first, second = words.chunk(2)
    torch.dot(first, second)


# ---- The machine ---------------------------------------------------------------------------------


def hardware(device: str) -> dict[str, Any]:
    """What a reader of figures must know of the machine."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    from ..ops import native

    isa = native._native.cpu_isa() if native._native else "none"
    return {"device": name, "threads": torch.get_num_threads(), "isa": isa}
