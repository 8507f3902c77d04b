"""The loop that decodes the requests of one kind."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping

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
        requests: those that have joined and not ended.
        most: how many of them may be in the loop at a time.
        again: requests that begin again, first of all.
        idle_since: the number of the step at which the last one ended.

    Args:
        first: one of the requests.
        places: rows that the loop has slots for.
    """

    def __init__(self, first: Request, places: int, engine: Engine) -> None:
        call = first.asked.generation.call
        self.rows_each = len(first.asked.job)
        self.places = max(1, places // self.rows_each)
        self.builder = Builder(call.blend, call.models, call.vocabulary, engine, None, False)
        self.loop: Loop | None = None
        self.requests: dict[int, Request] = {}
        self.most = self.places
        self.again: list[Request] = []
        self.written: dict[int, list[Written]] = {}
        self.reused = 0  # by loops that were taken down
        self.idle_since = 0

    @property
    def room(self) -> int:
        """How many more requests may join now."""
        if self.again:
            return 0
        if self.loop is not None and self._alone:
            return 0 if self.requests else 1
        return self.most - len(self.requests)

    @property
    def _alone(self) -> bool:
        """Whether the loop takes one request at a time, as rows cannot join it later."""
        return self.builder.simple

    @property
    def busy(self) -> bool:
        return bool(self.requests or self.again)

    def join(self, request: Request) -> None:
        """Let a request take its place."""
        job = request.asked.job
        rows = job.rows()
        self.requests[request.id] = request
        request.rows = rows
        if self.loop is None or (self._alone and not self._seated()):
            places = self.rows_each * (1 if self._alone else self.places)
            self.loop = self.builder.loop(job, rows, places, tells=True)
            self.loop.refilled = True
            self.loop.report = self._report
        self.loop.join(rows)

    def _seated(self) -> bool:
        return self.loop is not None and bool(self.loop.seated or self.loop.waiting)

    def _report(self, row: Row, why: str) -> None:
        """Keep why a row failed, for whoever waits for it."""
        request = self._request_of(row)
        if request is not None:
            request.why = why.replace(row.request_name, f"request {request.id}")

    def _request_of(self, row: Row) -> Request | None:
        return next((r for r in self.requests.values() if r.asked.job is row.job), None)

    def cancel(self, request: Request) -> None:
        """Let a request leave as it is."""
        if request in self.again:
            self.again.remove(request)
            self.requests[request.id] = request
            self._take(request, [])
        elif self.loop is not None:
            self.loop.cancel(request.rows)

    def move(self, request: Request, weights: Mapping[str, Tensor]) -> int:
        """Give a request's rows other weights from their next tokens on.

        Returns:
            How many tokens the first row has by now.
        """
        assert self.loop is not None
        for row in request.rows:
            for name, w in weights.items():
                self.loop.change(row, name, w[0])
        slots = [s for s, row in self.loop.seated.items() if row is request.rows[0]]
        return int(self.loop.slots.new[slots[0]]) if slots else 0

    def _move_again(self, request: Request) -> None:
        """Where a request began again, let its faders move where they had moved."""
        while request.moves_left and request.moves_left[0][0] <= request.lived:
            self.move(request, request.moves_left.pop(0)[1])

    def advance(self) -> Iterator[tuple[Request, list[Written]]]:
        """Take some steps, and give the requests that have ended with what they have written.

        A request that failed alone is told of its error, and given with nothing.
        """
        self._begin_again()
        if self.loop is None:
            return
        try:
            happened = self.loop.advance()
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
            request = by_row.get(news.row)
            if request is not None and len(request.rows) == 1:
                request.tell(news.columns)
                self._move_again(request)
        for written in happened.left:
            request = by_row.get(written.row)
            if request is None:
                continue
            its = self.written.setdefault(request.id, [])
            its.append(written)
            if len(its) == len(request.rows):
                yield self._take(request, its)
        if not self.busy:
            self.most = self.places

    def _take(self, request: Request, written: list[Written]) -> tuple[Request, list[Written]]:
        self.written.pop(request.id, None)
        del self.requests[request.id]
        if self.most < self.places and not self.again:
            self.most = self.places  # What failed is over.
        return request, written

    def _failed(self, error: Exception) -> Iterator[tuple[Request, list[Written]]]:
        """Take the loop down. A request that was alone in it has failed; others begin again."""
        its = list(self.requests.values())
        self._take_down()
        if len(its) == 1:
            (request,) = its
            self.again.remove(request)
            request.fail(error)
            self.most = self.most if self.again else self.places
            yield request, []
            return
        self.most = max(1, min(len(its), self.most) // 2)

    def _take_down(self) -> None:
        """Let all requests begin again in a new loop."""
        self.again = [*self.requests.values(), *self.again]
        self.requests.clear()
        self.written.clear()
        if self.loop is not None:
            self.reused += self.loop.places.reused
        self.loop = None
        gc.collect()  # What of it forms circles keeps memory.

    def _begin_again(self) -> None:
        while self.again and len(self.requests) < (1 if self._alone else self.most):
            request = self.again.pop(0)
            request.begin_again()
            self.join(request)
            self._move_again(request)

    @property
    def rows(self) -> int:
        """The rows of its requests."""
        return self.rows_each * (len(self.requests) + len(self.again))

    @property
    def all_reused(self) -> int:
        """Tokens of prompts that were not read, as caches held them."""
        return self.reused + (0 if self.loop is None else self.loop.places.reused)

    @property
    def cache_bytes(self) -> int:
        return 0 if self.loop is None else self.loop.cache_bytes

    @property
    def notes(self) -> list[str]:
        own = [] if self.loop is None else self.loop.notes
        return list(dict.fromkeys([*self.builder.notes, *own]))
