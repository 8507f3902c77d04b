"""The loop that decodes the requests of one kind."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

from torch import Tensor

from ..building import Builder
from ..engine.modules import Unsupported
from ..engine.options import Engine
from ..job import Row
from ..loop import Loop
from ..rows import Written
from .request import Request


class Lane:
    """Requests of one kind, as rows of one loop.

    A loop that fails is taken down, and its rows begin again in a new one, half as many at a time,
    until one fails alone: that request has failed, and the others go on. So memory that ran out is
    shared by fewer, and a request that breaks something breaks it for itself. What rows have told
    by then is not told again, as they write the same again.

    Attributes:
        requests: those in the loop.
        begins: those that are to begin, or to begin again, in this order.
        most: how many of them may be in the loop at a time.
        idle_since: the number of the step at which the last one ended.
        once: whether nobody but the first request can ever join.

    Args:
        first: one of the requests.
        places: rows that the loop has slots for.
    """

    def __init__(self, first: Request, places: int, engine: Engine) -> None:
        call = first.asked.generation.call
        self.rows_each = len(first.asked.job)
        self.once = first.asked.given.search is not None
        self.places = 1 if self.once else max(1, places // self.rows_each)
        self.builder = Builder(call.blend, call.models, call.vocabulary, engine, None, False)
        self.loop: Loop | None = None
        self.requests: dict[int, Request] = {}
        self.begins: list[Request] = []
        self.most = self.places
        self.written: dict[int, list[Written]] = {}
        self.reused = 0  # by loops that were taken down
        self.idle_since = 0

    @property
    def room(self) -> int:
        """How many more requests may join now."""
        return self._at_a_time - len(self.requests) - len(self.begins)

    @property
    def _at_a_time(self) -> int:
        """How many requests the loop takes: on the simple path one, as no row can join it later."""
        return 1 if self.builder.simple else self.most

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.begins)

    @property
    def all(self) -> list[Request]:
        """All requests under way."""
        return [*self.requests.values(), *self.begins]

    def join(self, request: Request) -> None:
        """Let a request begin at the next `advance`."""
        self.begins.append(request)

    def _begin(self) -> None:
        """Let requests begin for which there is room in the loop."""
        while self.begins and len(self.requests) < self._at_a_time:
            request = self.begins.pop(0)
            self.requests[request.id] = request  # first, as it may be what fails here
            job, request.rows = request.asked.job, request.asked.job.rows()
            request.begin()
            if self.loop is None or self.builder.simple:
                count = self.rows_each * self._at_a_time
                self.loop = self.builder.loop(job, request.rows, count, tells=True)
                self.loop.refilled = True
                self.loop.report = self._report
            self.loop.join(request.rows)
            self._move_again(request)

    def _report(self, row: Row, why: str) -> None:
        """Keep why a row failed, for whoever waits for it."""
        for request in self.requests.values():
            if request.asked.job is row.job:
                request.why = why.replace(row.request_name, f"request {request.id}")

    def cancel(self, request: Request) -> bool:
        """Let a request leave as it is.

        Returns:
            Whether it has left. Otherwise the next `advance` gives it.
        """
        if request in self.begins:
            self.begins.remove(request)
            return True
        if self.loop is not None and request.id in self.requests:
            self.loop.cancel(request.rows)
        return False

    def move(self, request: Request, weights: Mapping[str, Tensor]) -> int:
        """Give a request other weights, from its next token on that was not told yet.

        Returns:
            How many tokens it has by then.
        """
        if request.id not in self.requests:
            return request.told  # `moves` has them when it begins.
        tokens = self._tokens(request)
        if tokens >= request.told:
            self._change(request, weights)
            return tokens
        request.moves_left.append((request.told, weights))
        return request.told

    def _change(self, request: Request, weights: Mapping[str, Tensor]) -> None:
        """Give a request's rows these weights from their next tokens on."""
        assert self.loop is not None
        here = {*self.loop.waiting, *self.loop.seated.values()}
        for row in request.rows:
            for name, w in weights.items() if row in here else ():
                self.loop.change(row, name, w[0])

    def _tokens(self, request: Request) -> int:
        """How many tokens the first row of a request in the loop has by now."""
        assert self.loop is not None
        slots = [s for s, row in self.loop.seated.items() if row is request.rows[0]]
        return int(self.loop.slots.new[slots[0]]) if slots else 0

    def _move_again(self, request: Request) -> None:
        """Let faders move where they had moved before the request began, or began again."""
        while request.moves_left and request.moves_left[0][0] <= self._tokens(request):
            self._change(request, request.moves_left.pop(0)[1])

    def advance(self) -> Iterator[tuple[Request, list[Written]]]:
        """Take some steps, and give the requests that have ended with what they have written.

        A request that failed alone is told of its error, and given with nothing.
        """
        now = time.time()
        for request in [r for r in self.begins if r.is_late(now)]:
            self.begins.remove(request)
            yield request, []
        try:
            self._begin()
            happened = None if self.loop is None else self.loop.advance()
        except Unsupported as reason:
            if self.builder.simple:
                yield from self._failed(NotImplementedError(f"the simple path: {reason}"))
            else:
                self.builder.simple = True
                self._take_down()
            return
        except Exception as error:
            yield from self._failed(error)
            return
        if happened is None:
            return
        by_row = {row: r for r in self.requests.values() for row in r.rows}
        for news in happened.news:
            request = by_row[news.row]
            if len(request.rows) == 1:
                request.tell(news.columns)
        for written in happened.left:
            request = by_row[written.row]
            its = self.written.setdefault(request.id, [])
            its.append(written)
            if len(its) == len(request.rows):
                del self.written[request.id], self.requests[request.id]
                yield request, its
        for request in self.requests.values():
            self._move_again(request)
        if not self.busy and self.most < self.places:  # What failed is over.
            self._take_down()
            self.most = self.places

    def _failed(self, error: Exception) -> Iterator[tuple[Request, list[Written]]]:
        """Take the loop down. A request that was alone in it has failed; others begin again."""
        its = list(self.requests.values())
        self._take_down()
        self.most = max(1, len(its) // 2)
        if len(its) == 1:
            self.begins.remove(its[0])
            self.most = self.places
            its[0].fail(error)
            yield its[0], []

    def _take_down(self) -> None:
        """Let all requests begin again in a new loop."""
        loop, self.loop = self.loop, None
        if loop is not None:
            self.reused += loop.places.reused
            with suppress(Exception):  # It may be in any state.
                so_far = {written.row: written for written in loop.cut()}
                for request in self.requests.values():
                    request.keep([so_far[row] for row in request.rows])
        self.begins = self.all
        self.requests.clear()
        self.written.clear()
        del loop
        gc.collect()  # What of it forms circles keeps memory.

    @property
    def rows(self) -> int:
        """The rows of its requests."""
        return self.rows_each * (len(self.requests) + len(self.begins))

    @property
    def all_reused(self) -> int:
        """Tokens of prompts that were not read, as caches held them."""
        loop = self.loop
        return self.reused + (0 if loop is None else loop.places.reused)

    @property
    def cache_bytes(self) -> int:
        loop = self.loop
        return 0 if loop is None else loop.cache_bytes

    @property
    def notes(self) -> list[str]:
        loop = self.loop
        own = [] if loop is None else loop.notes
        return list(dict.fromkeys([*self.builder.notes, *own]))
