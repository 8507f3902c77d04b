"""Prompts that come while others are decoded, through one loop whose places stay full."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..decoding.driver import Driver
from ..decoding.engine.options import Engine
from ..decoding.forms import request
from ..decoding.generation import Generation
from ..decoding.inputs import Requests
from ..decoding.job import Job, of_any_loop
from ..decoding.output import Output
from ..decoding.results import output_of
from ..decoding.rows import Written
from ..decoding.simple.term_model import TermModel
from .prompts import Line
from .texts import Texts

NO_TOKEN = "no token could be chosen: the models gave no numbers for one"


@dataclass(eq=False)
class Item:
    """A prompt that waits for its text.

    Attributes:
        name: what errors call it.
        prompt: what the models read.
        line: what it has of its own.
        seed: of its draws.
        future: has its output, and why it could not be decoded, or None.
    """

    name: str
    prompt: Any
    line: Line
    seed: int
    future: Future[tuple[Output, str | None]] = field(default_factory=Future)


@dataclass(frozen=True, eq=False)
class Batch:
    """Some prompts as a job, whose rows can join the loop of their kind."""

    items: Sequence[Item]
    generation: Generation
    job: Job
    kind: Hashable


class OpenLoop:
    """Decodes prompts as they come, for as long as it is open.

    One thread owns the models. Prompts of several callers are rows of one batch, and a place that
    becomes free is taken by the next prompt, whoever has submitted it. What a prompt gets depends
    on the prompt, its settings and its seed alone, as in `decode`.

    Args:
        texts: how texts are written.
        max_batch: how many prompts are decoded at a time.
        engine: as in `decode`.
    """

    def __init__(self, texts: Texts, max_batch: int, engine: Engine | None = None) -> None:
        self.texts, self.max_batch, self.engine = texts, max_batch, engine or Engine()
        search = texts.search
        self.rows = (texts.n or 1) if search is None else search.rows
        self._known: dict[Hashable, TermModel] = {}
        self._waiting: deque[Item] = deque()
        self._alone: deque[Item] = deque()  # each is read by itself, as one of them is at fault
        self._next: Batch | None = None  # of another kind than the loop that runs
        self._under_way: dict[Job, Batch] = {}
        self._driver: Driver | None = None
        self._changed = threading.Condition()
        self._closed = self._dropped = False
        self._thread = threading.Thread(
            target=self._run, args=(torch.get_num_threads(),), name="crossfade.bulk", daemon=True
        )
        self._thread.start()
        # The interpreter does not end while torch is at work in the thread.
        atexit.register(self.close, drain=False)

    def submit(self, items: Sequence[Item]) -> None:
        """Let prompts be decoded. This returns at once; the items' futures have the outputs.

        Raises:
            RuntimeError: it is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("the loop is closed, and takes no more prompts")
            for item in items:
                item.future.set_running_or_notify_cancel()  # It can be cancelled no more.
            self._waiting.extend(items)
            self._changed.notify_all()

    def close(self, *, drain: bool = True) -> None:
        """Take no more prompts, and end.

        Args:
            drain: whether prompts that were submitted are decoded to their ends.
        """
        with self._changed:
            self._closed = True
            self._dropped |= not drain
            self._changed.notify_all()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # Each thread has a number of its own.
        while (first := self._next or self._batch(wait=True)) is not None:
            self._next = first
            try:
                self._decode(first)
            except Exception as error:
                for batch in [*self._under_way.values(), *([self._next] if self._next else [])]:
                    _fail(batch.items, error)
                self._under_way.clear()
                self._next = None

    def _decode(self, first: Batch) -> None:
        """Decode all prompts of one kind that come, until there is one of another kind."""
        call = first.generation.call
        driver = self._driver = Driver(
            call.blend,
            call.models,
            call.vocabulary,
            self.engine,
            self.max_batch * self.rows,
            False,
            waits=True,
        )
        unfinished: dict[tuple[Job, int], list[Written]] = {}
        for written in driver.decode(self._jobs_of(first.kind)):
            job, place = written.row.job, written.row.request
            if self._dropped:
                raise RuntimeError("the loop was closed before its prompts had ended")
            its = unfinished.setdefault((job, place), [])
            its.append(written)
            if len(its) < job.copies:
                continue
            del unfinished[job, place]
            self._give(job, place, its, driver)

    def _give(self, job: Job, place: int, its: Sequence[Written], driver: Driver) -> None:
        """Give a prompt's output to whoever waits for it."""
        batch = self._under_way[job]
        terms = self.texts.terms
        output = output_of(job, its, driver, alone=True, term_logprobs=terms)
        why = None
        if bool(output.failed.all()):
            why = job.context_room.why(place) or NO_TOKEN
        batch.items[place].future.set_result((output, why))
        if all(item.future.done() for item in batch.items):
            del self._under_way[job]

    def _jobs_of(self, kind: Hashable) -> Iterator[Job]:
        return _Jobs(self, kind)

    def next_job(self, kind: Hashable) -> Job | None:
        """The next job, if there is one and it is of this kind. Where nothing is under way, it
        waits for one."""
        if self._next is None:
            assert self._driver is not None
            self._next = self._batch(wait=not self._driver.under_way)
        if self._next is None or self._next.kind != kind:
            return None
        batch, self._next = self._next, None
        self._under_way[batch.job] = batch
        return batch.job

    def _batch(self, *, wait: bool) -> Batch | None:
        """The prompts that have come by now, as many as are decoded at a time.

        Args:
            wait: whether to wait for one, or for the end.
        """
        batch = None
        while batch is None and (items := self._take(wait)):
            batch = self._tried(items)
        return batch

    def _tried(self, items: Sequence[Item]) -> Batch | None:
        """Some prompts as a job. Where one of them is at fault, each is tried alone."""
        try:
            return self._read(items)
        except Exception as error:
            if len(items) > 1:
                self._alone.extend(items)
            else:
                _fail(items, error)
            return None

    def _take(self, wait: bool) -> list[Item]:
        if self._alone:
            return [self._alone.popleft()]
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
            count = min(self.max_batch, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _read(self, items: Sequence[Item]) -> Batch:
        """Some prompts as a job.

        Raises:
            TypeError, ValueError, NotImplementedError: one of them cannot be read.
        """
        lines = [item.line for item in items]
        generation = Generation(self.texts.moved(lines, each=True), **self._arguments(lines))
        read = [request(item.name, item.prompt) for item in items]
        requests = Requests(read, None, None, None, generation.chat)
        job = generation.job(requests, [item.seed for item in items], alone=True)
        job = of_any_loop(job)
        return Batch(items, generation, job, _kind(job))

    def _arguments(self, lines: Sequence[Line]) -> dict[str, Any]:
        given = self.texts.arguments(lines)
        own = {name: given.pop(name) for name in ("search", "draft", "return_term_logprobs")}
        return {**own, "arguments": given, "known": self._known}


class _Jobs(Iterator[Job]):
    """The jobs of one kind, which may end for now, and go on when more have come."""

    def __init__(self, loop: OpenLoop, kind: Hashable) -> None:
        self.loop, self.kind = loop, kind

    def __next__(self) -> Job:
        job = self.loop.next_job(self.kind)
        if job is None:
            raise StopIteration
        return job


def _kind(job: Job) -> Hashable:
    """What jobs must have in common to be rows of one loop."""
    # Rows have tensors of their own. Anything else in the table is one value for all rows.
    table = tuple((name, None if isinstance(x, Tensor) else x) for name, x in job.table.items())
    return table, job.processors is None, not job.criteria


def _fail(items: Sequence[Item], error: BaseException) -> None:
    for item in items:
        if not item.future.done():
            item.future.set_exception(error)
