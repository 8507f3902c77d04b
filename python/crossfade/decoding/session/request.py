"""A request under way: what it has written so far, piece by piece, and its result in the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..job import Row
from ..output import Output
from ..results import Ran, output_of
from ..rows import Written, kept_of, unwritten
from .asked import Asked
from .piece import Piece
from .text import TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

Columns = Mapping[str, Tensor]


class Owner(Protocol):
    """What a request asks of the session's worker."""

    def cancel(self, request: Request) -> None: ...

    def move(
        self, request: Request, faders: Mapping[str, float], weights: Mapping[str, Tensor]
    ) -> None: ...


class Request:
    """A request of a `Session`: iterate over its pieces, or ask for its result.

    One thread or task at a time reads pieces. All other methods may be called from any thread.

    Attributes:
        id: the number of the request in its session.
        prompt_ids: what the first term reads.
        changes: the faders that were moved while the text was written, each with how many tokens
            there were by then.
        begun: when its first token came, as ``time.monotonic()`` counts; None before.
        seconds: from when it was submitted until it ended.
    """

    def __init__(self, number: int, asked: Asked, owner: Owner) -> None:
        self.id, self.asked = number, asked
        self.prompt_ids: list[int] = list(asked.job.prompt_ids[0][0])
        self.changes: list[tuple[int, dict[str, float]]] = []
        self.submitted = time.monotonic()
        self.begun: float | None = None
        self.seconds = 0.0
        self.cancelled = self.late = False
        self.told = 0  # tokens that whoever reads pieces knows of, or will
        self.lived = 0  # tokens since it began, which it may have done more than once
        self.before: Sequence[Written] = ()  # what it had written when it had to begin again
        self.moves: list[tuple[int, Mapping[str, Tensor]]] = []  # the weights at each of `changes`
        self.moves_left: list[tuple[int, Mapping[str, Tensor]]] = []
        self.rows: list[Row] = []
        self.why: str | None = None  # why its row failed
        self._owner = owner
        self._news: list[Columns] = []
        self._changed = threading.Condition()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._written: Sequence[Written] | None = None
        self._error: BaseException | None = None
        self._output: Output | None = None
        self._text = TextStream(asked.job.writing, asked.stop_strings)
        self._ids: list[int] = []
        self._over = False  # whether the last piece was read

    # ---- For whoever asked ----------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether it has ended: with a result, or with an error."""
        return self._written is not None or self._error is not None

    @property
    def reason(self) -> str | None:
        """Why it ended; None before.

        "stop" by an end token or a stop string, "length" at a limit, "cancelled", "timeout", or
        "error".
        """
        if self._error is not None:
            return "error"
        if self._written is None:
            return None
        if self._first.finished:
            return "stop"
        if self._first.ended:
            return "length"
        return "timeout" if self.late and not self.cancelled else "cancelled"

    @property
    def text(self) -> str:
        """What was read so far by iteration; all of it once the request has ended."""
        if self._written is None or self._over:
            return self._text.told
        return self._text.whole(self._first.ids)

    def result(self, timeout: float | None = None) -> Output:
        """The `Output` of one row, once the request has ended.

        Its text has the stop string that ended it, as that of `crossfade.generate`. Of a request
        that was cancelled, or whose time was up, it is what was written by then.

        Args:
            timeout: seconds to wait at most; None: as long as it takes.

        Raises:
            TimeoutError: it has not ended in time. It goes on.
            BaseException: what made the request fail.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.id} has not ended in {timeout} s; it goes on")
        return self._result()

    def cancel(self) -> None:
        """Let the request end with what it has written. One that has ended stays as it is."""
        self._owner.cancel(self)

    def weights(self, /, **faders: float) -> None:
        """Move faders, from the next token on.

        Raises:
            TypeError, ValueError: the formula has no such fader, or not with such a number; or the
                request has ended.
        """
        if self.done:
            raise ValueError(f"request {self.id} has ended; faders move while one is under way")
        with self._changed:  # Two threads that move faders take turns.
            self._owner.move(self, faders, self.asked.moved(faders))

    def __iter__(self) -> Iterator[Piece]:
        while not self._over:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._news) or self.done)
            yield from self._pieces()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while not self._over:
            await self._wait(lambda: bool(self._news) or self.done)
            for piece in self._pieces():
                yield piece

    def __await__(self) -> Generator[Any, None, Output]:
        async def ended() -> Output:
            await self._wait(lambda: self.done)
            return self._result()

        return ended().__await__()

    # ---- For the session's thread ---------------------------------------------------------------

    def tell(self, columns: Columns) -> None:
        """Tell of new tokens. Those that were told before, by a loop that failed, are left out."""
        new = len(columns["tokens"])
        known = min(new, max(0, self.told - self.lived))
        self.lived += new
        if known == new:
            return
        with self._changed:
            if self.begun is None:
                self.begun = time.monotonic()
            self._news.append({name: x[known:].cpu() for name, x in columns.items()})
            self.told = self.lived
        self._notify()

    def expire(self, timeout: float) -> None:
        """Let its time be up so many seconds from now, or sooner, as `max_time` may say."""
        job, deadline = self.asked.job, time.time() + timeout
        if job.deadline is None or deadline < job.deadline:
            self.asked.job = replace(job, deadline=deadline)

    def is_late(self, now: float) -> bool:
        """Whether its time is up, at a time as ``time.time()`` counts it."""
        deadline = self.asked.job.deadline
        return deadline is not None and now > deadline

    def unwritten(self) -> list[Written]:
        """What its rows have written if it was never begun."""
        call, job, search = self.asked.generation.call, self.asked.job, self.asked.job.search
        kinds = kept_of(call.blend, job)
        size = 0 if search is None else 1 + search.weights.shape[1]
        return [unwritten(row, kinds, size, call.device) for row in job.rows()]

    def begin(self) -> None:
        """Its rows join a loop: the first one, or another where that has failed."""
        self.lived, self.moves_left = 0, list(self.moves)

    def keep(self, written: Sequence[Written]) -> None:
        """Keep what it has written in a loop that failed, if that is more than before."""
        if sum(map(len, written)) >= sum(map(len, self.before)):
            self.before = written

    def end(self, written: Sequence[Written]) -> None:
        """It has ended with what its rows have written; with none of them, it was not in a loop.

        What was told is part of the result, also where it was cut before it had written that again.
        """
        self.late = self.is_late(time.time())
        if self.before and sum(map(len, written)) < self.told:
            written = self.before
        written = written or self.unwritten()
        with self._changed:
            self._written, self.seconds = written, time.monotonic() - self.submitted
        self._notify()

    def fail(self, error: BaseException) -> None:
        """Let whoever waits raise an error. The first one counts."""
        with self._changed:
            if not self.done:
                self._error, self.seconds = error, time.monotonic() - self.submitted
        self._notify()

    @property
    def _first(self) -> Written:
        """What its first row has written, once it has ended: the best one of a search."""
        assert self._written is not None
        return next(w for w in self._written if w.row.index == 0)

    # ---- Both -----------------------------------------------------------------------------------

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with suppress(RuntimeError):  # A loop that was closed has nobody who waits.
                loop.call_soon_threadsafe(_wake, future)

    async def _wait(self, ready: Callable[[], bool]) -> None:
        while True:
            loop = asyncio.get_running_loop()
            with self._changed:
                if ready():
                    return
                future = loop.create_future()
                self._waiters.append((loop, future))
            await future

    def _result(self) -> Output:
        if self._error is not None:
            raise self._error
        with self._changed:
            if self._output is None:
                assert self._written is not None
                asked, ran = self.asked, Ran(self.asked.generation.call.device, self.seconds)
                terms = asked.given.return_term_logprobs
                self._output = output_of(asked.job, self._written, ran, term_logprobs=terms)
            return self._output

    def _pieces(self) -> Iterator[Piece]:
        """What has come so far, as one piece, and one more at the end if text was held back."""
        with self._changed:
            news, self._news = self._news, []
            done, error = self.done, self._error
        if news:
            columns = {n: torch.cat([x[n] for x in news]) for n in news[0]}
            ids = columns["tokens"].tolist()
            self._ids += ids
            yield self.asked.piece(self._text.add(self._ids), columns)
        if not done:
            return
        if error is not None:
            raise error
        self._over = True
        first, known = self._first, len(self._ids)
        text = self._text.end(first.ids)
        if len(first) > known:  # A search gives its response at the end.
            columns = {name: x[known:].cpu() for name, x in first.columns.items()}
            yield self.asked.piece(text, columns)
        elif text:
            yield Piece(text)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
