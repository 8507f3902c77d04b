"""Runs jobs: chooses how models are run, hands rows to loops, and tries again what failed."""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any

from ..blends.blend import Blend
from ..checks import warn
from ..progress import progress_bar
from .building import Builder
from .engine.modules import Unsupported
from .engine.options import Engine
from .engine.prefix import PrefixCache
from .engine.runner import EngineRunner
from .job import Job, Row
from .loop import Loop, is_late
from .memory import is_out_of_memory
from .ranks import kind_of
from .rows import Written, unwritten
from .simple.term_model import TermModel
from .stats import ModelStats

ROWS = {"cpu": 32, "cuda": 64}  # how many are decoded at a time by default, if they come and go
TOKEN_BYTES = 16  # the least that is kept of a token: its id and two log-probs
ADDRESSABLE = 1 << 47  # the most bytes that a process can have


class Driver:
    """Decodes the rows of jobs of one call, in as many batches as it takes.

    Args:
        models: the terms', the values', the references'.
        vocabulary: how many tokens all of them share.
        max_batch: rows decoded at a time.
        progress: as in `crossfade.generate`.
        cache: the cache of an earlier call, to go on from.
        keep_cache: whether a later call is to go on from a cache of this one. With either of these
            two there is one job.
        waits: whether jobs come while others are decoded. The iterator of jobs may end for now, and
            give more when it is asked again; all places are made ready for them.

    Attributes:
        notes: what was not done as the settings say, and why.
        cache: for a later call, if `keep_cache`.
        interrupted: whether Ctrl-C cut the rows.
        drafted: the fields of `Stats` about guesses.
    """

    def __init__(
        self,
        blend: Blend,
        models: Sequence[TermModel],
        vocabulary: int,
        engine: Engine,
        max_batch: int | None = None,
        progress: bool | Callable[[int], object] | None = None,
        cache: PrefixCache | None = None,
        keep_cache: bool = False,
        waits: bool = False,
    ) -> None:
        self.waits = waits
        self.builder = Builder(blend, models, vocabulary, engine, cache, keep_cache)
        self.max_batch, self.progress = max_batch, progress
        self.cache_in, self.keep_cache = cache, keep_cache
        self.cache: PrefixCache | None = None
        self.device = models[0].device
        self.jobs: Iterator[Job] = iter(())
        self.job: Job  # The first one. All others are of its kind.
        self.todo: deque[Row] = deque()  # rows of the jobs taken so far that no loop has yet
        self.under_way: dict[Row, None] = {}  # the rows that a loop has, in order
        self.left: deque[Written] = deque()  # what `decode` has yet to give
        self.by_row: dict[int, Written] = {}  # what each row wrote, if a cache is kept
        self.interrupted = False
        self.on_rows: Callable[[int], object] | None = None  # is told how many rows have ended
        self.notes = self.builder.notes
        self.loop: Loop | None = None  # the one that is running
        self._models: list[ModelStats] = []  # of the loops before it
        self._drafted: Counter[str] = Counter()  # the same of guesses
        self._times: dict[str, Any] = {}
        self._cache_bytes = self._peak_bytes = 0
        self.start = 0.0
        self.end: float | None = None

    def decode(self, jobs: Iterable[Job]) -> Iterator[Written]:
        """Decode all jobs, and give what each row has written as soon as it leaves its place.

        A job is taken when there are places for its rows, so that a list of any length is decoded
        at the rate of a full batch. All jobs are of one kind: they have the same options, and their
        tables have tensors of the same names. A row that was never begun has written nothing.

        At Ctrl-C the rows under way are given as they are, and `interrupted` is set.
        """
        self.start, self.jobs = time.perf_counter(), iter(jobs)
        first = next(self.jobs, None)
        if first is None:
            return
        self.job = first
        self._check_ranks(first)
        self.todo.extend(first.rows())
        _check_addressable(first)
        stream, count = first.streamer, len(first)
        show = self._rows_at_a_time() < count if self.progress is None else self.progress is True
        total = sum(row.is_returned for row in self.todo)
        with progress_bar(total, "row") if show else nullcontext() as bar:
            self.on_rows = self.progress if callable(self.progress) else bar and bar.update
            try:
                if stream is not None:
                    stream.put(0, first.prompts[0].ids.repeat_interleave(first.copies, 0))
                with nullcontext() if self.cache_in is None else self.cache_in.lent(count):
                    yield from self._batches()
            except KeyboardInterrupt:
                self.interrupted = True
                yield from self._given()
                for row in dict.fromkeys([*self.under_way, *self.todo]):
                    yield self._unwritten(row)
            except BaseException:
                if stream is not None:  # Whoever reads it in another thread would wait for ever.
                    with suppress(Exception):
                        stream.end()
                raise
        if stream is not None:
            stream.end()
        self.end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long decoding has taken so far."""
        return (time.perf_counter() if self.end is None else self.end) - self.start

    @property
    def models_stats(self) -> list[ModelStats]:
        """What the models did, of each loop so far."""
        return [*self._models, *([] if self.loop is None else self.loop.stats())]

    @property
    def drafted(self) -> dict[str, Any]:
        rounds = None if self.loop is None else self.loop.rounds
        counts = self._drafted + (Counter() if rounds is None else rounds.drafted)
        return {**counts, **self._times}

    @property
    def cache_bytes(self) -> int:
        return self._cache_bytes if self.loop is None else self.loop.cache_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that caches and what was written have taken so far."""
        return max(self._peak_bytes, 0 if self.loop is None else self.loop.peak_bytes)

    def _next_rows(self, count: int, one_job: bool) -> tuple[list[Row], list[Written]]:
        """Up to so many rows to decode, and what is given of rows that cannot be decoded.

        `one_job` says that the rows must all be of one job.
        """
        rows: list[Row] = []
        others: list[Written] = []
        now = time.time()
        while len(rows) < count:
            if not self.todo:
                job = None if one_job and rows else next(self.jobs, None)
                if job is None:
                    break
                self._check_ranks(job)
                self.todo.extend(job.rows())
                continue
            if one_job and rows and self.todo[0].job is not rows[0].job:
                break
            row = self.todo[0]
            self.under_way[row] = None  # first, so that an interrupt finds it in one of the two
            self.todo.popleft()
            if row.limit < 1:
                others.append(self._refused(row))
            elif self._models and is_late(row, now):  # The first batch writes a token at least.
                others.append(self._unwritten(row))
            else:
                rows.append(row)
        return rows, others

    def _refused(self, row: Row) -> Written:
        """Let a row fail that is refused, or whose prompt is longer than a model's context; the
        others go on."""
        why = row.job.context_room.why(row.request)
        if row.sample == 0 and why is not None:
            warn(f"{row.request_name} was not decoded: {why}", RuntimeWarning)
        return self._unwritten(row, failed=True)

    def _unwritten(self, row: Row, *, failed: bool = False) -> Written:
        return unwritten(
            row,
            self.builder.kept(self.job),
            self.builder.value_size(self.job),
            self.device,
            failed=failed,
        )

    def _given(self, left: Iterable[Written] = ()) -> Iterator[Written]:
        """Give what rows have written that are done or were cut, and tell whoever watches of each.

        What an interrupt keeps from being given is given when this is called again, and nothing
        twice: from the last test on nothing is called, and only a call lets an interrupt in.
        """
        self.left.extend(left)
        while self.left:
            written = self.left[0]
            if written.row in self.under_way:
                self._tell_of(written)
            del self.left[0]
            if written.row in self.under_way:
                del self.under_way[written.row]
                yield written

    def _tell_of(self, written: Written) -> None:
        """Tell whoever watches of a row that is done or was cut."""
        row = written.row
        if self.keep_cache:
            self.by_row[row.index] = written
        if written.ended and row.is_returned:
            if self.on_rows is not None:
                self.on_rows(1)
            if not (written.finished or written.failed) and row.limit < row.asked_limit:
                warn(
                    f"{row} was ended at its token {len(written)}: "
                    f"{row.job.context_room.why(row.request)}",
                    RuntimeWarning,
                )

    def _batches(self) -> Iterator[Written]:
        """Decode all rows: in one loop where they come and go, or in batches that start together.

        Where the engine turns out not to support a model, the rows begin again on the simple path,
        and where memory runs out, in smaller batches.
        """
        most = self._rows_at_a_time()
        if self.job.why_aligned is not None and most < len(self.job):
            self.notes.append(f"fixed batches: {self.job.why_aligned}")
        while True:
            rows, others = self._next_rows(most, self.builder.same_step(self.job))
            yield from self._given(others)
            if not rows:
                if others:
                    continue
                return
            own_slots, ran_out = self.builder.slot_is_index(self.job), False
            count = len(self.job) if own_slots else len(rows)
            if self.waits and not self.builder.same_step(self.job):
                count = most
            try:
                yield from self._decode(rows, count)
            except Unsupported as reason:
                if self.builder.has_cache or self.builder.simple:
                    what = "the simple path" if self.builder.simple else "cache and return_cache"
                    raise NotImplementedError(f"{what}: {reason}") from None
                self.notes.append(f"the simple path: {reason}")
                self.builder.simple = True
                most = self._rows_at_a_time()
            except (RuntimeError, MemoryError) as error:
                fewer = self._fewer_rows(count)
                if fewer == 0 or not is_out_of_memory(error):
                    raise
                self.notes.append(f"memory ran out: {fewer} rows at a time")
                most, ran_out = fewer, True
            if ran_out:  # Most of the failed loop is freed by now, but not what forms circles.
                gc.collect()
            self.todo.extendleft(reversed(self.under_way))  # They begin again.
            self.under_way.clear()

    def _check_ranks(self, job: Job) -> None:
        """Refuse what would let one rank go where the others do not follow."""
        builder, search = self.builder, job.search
        if builder.ranks is None:
            return
        at_a_time = min(self._rows_at_a_time(), len(job))
        settings = {} if search is None else vars(search.settings)
        numbers = {n: x for n, x in settings.items() if isinstance(x, (int, float, str))}
        builder.ranks.check_same(
            {
                "the list of requests": [list(map(list, ids)) for ids in job.prompt_ids],
                "the kind of blend": kind_of(builder.blend),
                **job.table,
                "search": None if search is None else (type(search.settings).__name__, numbers),
                "engine": repr(builder.engine),
                "max_batch": len(job) if builder.slot_is_index(job) else at_a_time,
                "whether a cache is given": self.cache_in is None,
                "the list of logits processors": job.processors is None,
                "the list of stopping criteria": len(job.criteria),
                "return_term_logprobs": job.term_logprobs,
                "return_pushes": job.pushes,
                "the list of divergences": [kind_of(r.blend) for r in job.references],
            }
        )

    def _rows_at_a_time(self) -> int:
        """How many rows are decoded at a time."""
        most = self.max_batch
        if most is None:
            if self.builder.same_step(self.job) or self.builder.has_cache:
                most = len(self.job)
            else:
                most = ROWS.get(self.device.type, ROWS["cuda"])
        return self._whole_requests(most) or self.job.copies

    def _fewer_rows(self, count: int) -> int:
        """How many rows to try at a time after memory ran out for `count`; 0: no fewer will do."""
        if self.builder.slot_is_index(self.job):
            return 0
        half = count // 2  # Only a search must keep the rows of a request together.
        return self._whole_requests(half) or (half if self.job.search is None else 0)

    def _whole_requests(self, rows: int) -> int:
        """So many rows, or a few less where a request's rows must be decoded together."""
        whole = self.builder.same_step(self.job) or self.job.search is not None
        return rows - rows % self.job.copies if whole else rows

    def _decode(self, rows: Sequence[Row], count: int) -> Iterator[Written]:
        """Decode `rows` in `count` slots, and the rows after them as slots become free."""
        job, same_step = self.job, self.builder.same_step(self.job)
        loop = self.loop = self.builder.loop(job, rows, count)
        try:
            loop.join(rows)
            loop.refilled = bool(self.todo) and not same_step
            while (happened := loop.advance()) is not None:
                yield from self._given(happened.left)
                if not same_step:
                    rows, others = self._next_rows(loop.free_places, False)
                    yield from self._given(others)
                    loop.join(rows)
                    loop.refilled = self.waits or bool(self.todo)
        except KeyboardInterrupt:
            self.interrupted = True
            yield from self._given(loop.cut())
            raise
        finally:
            self._models, self._cache_bytes = self.models_stats, self.cache_bytes
            if loop.rounds is not None:
                costs = loop.rounds.drafter.costs
                self._drafted += loop.rounds.drafted
                self._times = {"step_seconds": costs.medians, "guess_seconds": costs.guess}
            self._peak_bytes, self.loop = self.peak_bytes, None
            self.notes += [n for n in loop.notes if n not in self.notes]
        if self.keep_cache:
            each = [(row.prompt_ids, self.by_row[row.index].ids) for row in job.rows()]
            returned = [row.index for row in job.rows() if row.is_returned]
            assert isinstance(loop.runner, EngineRunner)  # `_batches` refuses the simple path.
            self.cache = PrefixCache(loop.runner, self.builder.fingerprints, each, returned)


def _check_addressable(job: Job) -> None:
    """Refuse limits of new tokens that no memory can hold, before hours are spent on them."""
    most = max(job.limits)
    if len(job) * most * TOKEN_BYTES > ADDRESSABLE:
        raise MemoryError(
            f"no memory holds what {len(job)} rows may write, {most} new tokens each; "
            "max_new_tokens must be smaller"
        )
