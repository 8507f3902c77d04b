"""What a session's thread does: it lets requests join loops, advances these, and ends requests."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.options import Engine
from ..rows import Written
from .lane import Lane
from .request import Request
from .waiting import Waiting

LANES = 4  # loops without rows that are kept for later requests, with what their caches hold


class Full(RuntimeError):
    """As many requests wait as may. Later one more can be submitted."""


class Closed(RuntimeError):
    """The session was closed, or its thread has died: nothing can be asked of it any more."""


@dataclass(frozen=True)
class SessionStats:
    """What a session has done so far.

    Attributes:
        requests: that have ended, by their reasons.
        tokens: that were written.
        prompt_tokens: of the prompts of the requests that were begun, as the first term reads them.
        reused_tokens: of prompts, summed over the models, that were not read, as caches held them.
        running, waiting: requests that are being decoded, and that wait for a place.
        rows: that are being decoded: a request with a search has several.
        cache_bytes: of the caches of all loops.
        busy_seconds: in which there was something to decode.
        notes: what is not done as the engine's options say, and why.
    """

    requests: Mapping[str, int]
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    running: int
    waiting: int
    rows: int
    cache_bytes: int
    busy_seconds: float
    notes: tuple[str, ...]


class Worker:
    """The loops of a session and the requests that wait for them.

    Any thread may call the methods above the line. Those below it are the session's thread's.

    Attributes:
        waiting: requests without a place.
        lanes: the loops, by the kinds of their requests.
        closing: whether no more requests are taken.
        death: what the thread died of.

    Args:
        max_batch, max_waiting, engine: as of `Session`.
    """

    def __init__(self, max_batch: int, max_waiting: int, engine: Engine) -> None:
        self.max_batch, self.max_waiting, self.engine = max_batch, max_waiting, engine
        self.waiting = Waiting()
        self.lanes: dict[Any, Lane] = {}
        self.closing = False
        self.death: BaseException | None = None
        self._wake = threading.Condition()
        self._todo: deque[Callable[[], None]] = deque()  # what the thread is to do between steps
        self._ended: Counter[str] = Counter()
        self._tokens = self._prompt_tokens = self._reused = 0
        self._busy = 0.0
        self._steps = itertools.count()

    def add(self, request: Request, priority: int) -> None:
        """Let a request wait for its turn.

        Raises:
            Full, Closed: it may not.
        """
        with self._wake:
            self.check_room()
            self.waiting.add(request, priority)
            self._wake.notify()

    def check_room(self) -> None:
        """Refuse one more request where none may wait, or none is taken.

        Raises:
            Full, Closed: as they say.
        """
        self._check_alive()
        free = max(0, self.max_batch - self._rows())  # Those that wait for these begin at once.
        waiting = len(self.waiting) - free
        if waiting >= self.max_waiting:
            raise Full(f"{max(0, waiting)} requests wait; at most {self.max_waiting} may")

    def cancel(self, request: Request) -> None:
        """As `Request.cancel`."""
        self._later(lambda: self._cancel(request))

    def move(
        self, request: Request, faders: Mapping[str, float], weights: Mapping[str, Tensor]
    ) -> None:
        """Give a request other weights, as its faders have moved."""
        self._later(lambda: self._move(request, dict(faders), weights))

    def call(self, function: Callable[[], Any], timeout: float | None) -> Any:
        """What a function gives that the thread calls between two steps.

        Raises:
            TimeoutError, Closed: it was not called in time, or not at all.
        """
        done = threading.Event()
        found: dict[str, Any] = {}

        def act() -> None:
            try:
                if self.death is not None:
                    self._check_alive()
                found["result"] = function()
            except BaseException as error:
                found["error"] = error
            done.set()

        with self._wake:
            self._check_alive()
            self._later(act)
        if not done.wait(timeout):
            raise TimeoutError(f"the session did not come to it in {timeout} s")
        if "error" in found:
            raise found["error"]
        return found["result"]

    def close(self, *, drain: bool) -> None:
        """Take no more requests, and end once there are none; cancel those there are, if not
        `drain`."""
        with self._wake:
            self.closing = True
            if not drain:
                self._todo.append(self._cancel_all)
            self._wake.notify()

    @property
    def running(self) -> int:
        """How many requests have a place."""
        return sum(len(lane.requests) + len(lane.begins) for lane in [*self.lanes.values()])

    def stats(self) -> SessionStats:
        lanes = [*self.lanes.values()]
        return SessionStats(
            requests=dict(self._ended),
            tokens=self._tokens,
            prompt_tokens=self._prompt_tokens,
            reused_tokens=self._reused + sum(lane.all_reused for lane in lanes),
            running=self.running,
            waiting=len(self.waiting),
            rows=self._rows(),
            cache_bytes=sum(lane.cache_bytes for lane in lanes),
            busy_seconds=self._busy,
            notes=tuple(dict.fromkeys(n for lane in lanes for n in lane.notes)),
        )

    def _check_alive(self) -> None:
        if self.death is not None:
            raise Closed(f"the session's thread died: {self.death!r}") from self.death
        if self.closing:
            raise Closed("the session was closed")

    def _later(self, act: Callable[[], None]) -> None:
        """Let the thread do something between two steps."""
        with self._wake:
            self._todo.append(act)
            self._wake.notify()

    def _rows(self) -> int:
        """The rows under way."""
        return sum(lane.rows for lane in [*self.lanes.values()])

    # ---- The session's thread --------------------------------------------------------------------

    def run(self, threads: int) -> None:
        """Work until the session is closed and nothing is left to do."""
        torch.set_num_threads(threads)
        error: BaseException | None = None
        try:
            with torch.no_grad():
                while self._wait():
                    self.step()
        except BaseException as e:
            error = e
        self._die(error)

    def _wait(self) -> bool:
        """Wait until there is something to do; False if there never will be."""
        with self._wake:
            self._wake.wait_for(lambda: self._todo or self.waiting or self.running or self.closing)
            return bool(self._todo or self.waiting or self.running or not self.closing)

    def step(self) -> None:
        """Do what others asked for, let requests join, and advance all loops."""
        while self._todo:
            self._todo.popleft()()  # One by one: if it dies of one, `_die` finds the others.
        self._seat()
        busy = [lane for lane in self.lanes.values() if lane.busy]
        start = time.monotonic()
        for lane in busy:
            for request, written in lane.advance():
                lane.idle_since = next(self._steps)
                self._end(request, written)
        self._busy += time.monotonic() - start if busy else 0.0
        self._forget_lanes()

    def _seat(self) -> None:
        """Let requests that wait join their loops, as long as there is room."""
        for late in self.waiting.late(time.time()):
            self._end(late, [])
        running = Counter(r.asked.given.scope for x in self.lanes.values() for r in x.all)
        full: set[Hashable] = set()
        while (request := self.waiting.first(running, full)) is not None:
            kind = request.asked.kind
            if self._rows() + len(request.asked.job) > self.max_batch:
                return  # Those behind it wait too, or it might wait for ever.
            lane = self.lanes.get(kind)
            if lane is None:
                lane = self.lanes[kind] = Lane(request, self.max_batch, self.engine)
            if lane.room < 1:
                full.add(kind)
                continue
            self._prompt_tokens += len(request.prompt_ids)
            running[request.asked.given.scope] += 1
            lane.join(request)
            self.waiting.remove(request)

    def _end(self, request: Request, written: list[Written]) -> None:
        """A request has ended with these rows; with none of them, it was never begun."""
        if not request.done:
            if any(w.failed and w.row.is_returned for w in written):
                request.fail(RuntimeError(request.why or f"request {request.id} failed"))
            else:
                request.end(written)
        self._count(request, sum(map(len, written)))

    def _count(self, request: Request, tokens: int) -> None:
        self._ended[request.reason or "error"] += 1
        self._tokens += tokens

    def _cancel(self, request: Request) -> None:
        if request.done:
            return
        request.cancelled = True
        if self.waiting.remove(request):
            return self._end(request, [])
        lane = self.lanes.get(request.asked.kind)
        if lane is not None and lane.cancel(request):
            self._end(request, [])

    def _cancel_all(self) -> None:
        for request in self._all():
            self._cancel(request)

    def _all(self) -> list[Request]:
        """All requests that have not ended."""
        return [*self.waiting.all(), *(r for x in self.lanes.values() for r in x.all)]

    def _move(
        self, request: Request, faders: dict[str, float], weights: Mapping[str, Tensor]
    ) -> None:
        if request.done or request.cancelled:
            return
        lane = self.lanes.get(request.asked.kind)
        tokens = 0 if lane is None else lane.move(request, weights)
        request.moves.append((tokens, weights))
        request.changes.append((tokens, faders))

    def _forget_lanes(self) -> None:
        """Drop loops that nobody can join any more, and of others those idle for longest, beyond a
        few."""
        idle = sorted(
            (key for key, lane in self.lanes.items() if not lane.busy),
            key=lambda key: (not self.lanes[key].once, self.lanes[key].idle_since),
        )
        once = sum(self.lanes[key].once for key in idle)
        for key in idle[: max(once, len(self.lanes) - LANES)]:
            self._reused += self.lanes.pop(key).all_reused

    def _die(self, error: BaseException | None) -> None:
        """Let everybody who waits for something raise."""
        with self._wake:
            self.closing, self.death = True, error
            todo, self._todo = self._todo, deque()
        why = "the session was closed" if error is None else f"the session's thread died: {error!r}"
        closed = Closed(why)
        closed.__cause__ = error
        for request in self._all():
            self.waiting.remove(request)
            request.fail(closed)
        for act in todo:  # Whoever waits for a call finds that nobody is there any more.
            act()
        self.lanes.clear()
