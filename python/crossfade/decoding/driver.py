"""Runs a job: chooses how models are run, cuts long lists into what fits, and gathers results."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..blend import Blend
from ..progress import progress_bar
from .contexts import Reader, Room
from .engine import Engine
from .engine_runner import EngineRunner
from .graph import Stepper
from .loop import Job, Loop
from .memory import is_out_of_memory
from .mixer import Mixer, Weights
from .modules import Unsupported
from .output import ModelStats
from .prefix import PrefixCache, states
from .rows import Results, Slots
from .search_loop import SearchLoop
from .simple_runner import SimpleRunner
from .streaming import Stream
from .term_model import TermModel
from .valuer import Valuer

ROWS = {"cpu": 32, "cuda": 64}  # decoded at a time where rows come and go, by default


class Driver:
    """Decodes all rows of a job, in as many batches as it takes.

    Attributes:
        results: what the rows have written.
        ended: rows that are done: finished, failed or at their limit.
        notes: why something was not done as the settings say.
        cache: for a call that goes on, if `keep_cache`.
    """

    def __init__(
        self,
        blend: Blend,
        models: Sequence[TermModel],
        job: Job,
        vocabulary: int,
        engine: Engine,
        max_batch: int | None = None,
        progress: bool | Callable[[int], object] | None = None,
        cache: PrefixCache | None = None,
        keep_cache: bool = False,
    ) -> None:
        if job.streamer is not None:
            job = replace(job, streamer=Stream(job.streamer))
        self.blend, self.models, self.job, self.vocabulary = blend, models, job, vocabulary
        self.engine, self.max_batch, self.progress = engine, max_batch, progress
        self.given, self.keep_cache = cache, keep_cache
        self.cache: PrefixCache | None = None
        self.states: list[Hashable] = []  # of models, where caches are given or kept
        self.device = models[0].device
        terms = len(blend.terms) if job.term_logprobs else 0
        values = 0 if job.search is None else 1 + job.search.weights.shape[1]
        references = len(job.references)
        requests = job.rows // job.copies
        self.room = Room(self._readers(), requests, job.limit)
        self.limit = max(1, int(self.room.new.max()))  # the most that any row may write
        try:
            self.results = Results(job.rows, self.limit, terms, references, values, self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"memory ran out for what {job.rows} rows may write, {self.limit} new tokens each; "
                "max_new_tokens must be smaller"
            ) from error
        self.results.limits[:-1] = self.room.new.repeat_interleave(job.copies).to(self.device)
        self.weights, self.value_weights = self._weights(blend, requests)
        self.references = [self._weights(r.blend, requests) for r in job.references]
        self.simple = engine.simple
        self.given_back = set(job.returned)
        self.ended: set[int] = set()
        self.interrupted = False
        self.tell: Callable[[int], object] | None = None
        self.notes: list[str] = []
        self.models_stats: list[list[ModelStats]] = []
        self.cache_bytes = self.peak_bytes = 0
        self.seconds = 0.0

    def _readers(self) -> list[Reader]:
        """Every model that reads the rows, those of a search's value too."""
        readers = list(map(Reader, self.models, self.job.prompts))
        for question, sources in () if self.job.search is None else self.job.search.asked:
            for s in sources:
                own = s.writing is not None or s.whole is not None  # It reads tokens of its own.
                readers.append(Reader(s.model, s.prompts, None if own else int(question.predicted)))
        return readers

    def _refuse(self) -> None:
        """Rows whose prompts no context holds fail; the others go on."""
        for request in (self.room.new == 0).nonzero()[:, 0].tolist():
            rows = [request * self.job.copies + j for j in range(self.job.copies)]
            self.results.failed[rows] = True
            self._on_end(rows)
            warnings.warn(
                f"request {request} was not decoded: {self.room.why(request)}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _warn_of_full(self) -> None:
        """Say of rows that were ended, before the call's limit, where a context was full."""
        r = self.results
        full = (r.lengths >= r.limits) & (r.limits < self.job.limit) & ~r.finished & ~r.failed
        for row in full[:-1].nonzero()[:, 0].tolist():
            if row in self.given_back:
                warnings.warn(
                    f"{self.job.name(row)} was ended at its token {int(r.lengths[row])}: "
                    f"{self.room.why(row // self.job.copies)}",
                    RuntimeWarning,
                    stacklevel=4,
                )

    def _weights(self, blend: Blend, requests: int) -> tuple[Weights, Weights]:
        """The weights of a blend's terms and of its values, for every row."""
        terms = blend.row_weights(requests, self.device)
        values = blend.row_value_weights(requests, self.device)
        return self._of_rows(terms), self._of_rows(values)

    def _of_rows(self, weights: Weights) -> Weights:
        if isinstance(weights, Tensor):
            return weights.repeat_interleave(self.job.copies, 0)
        return weights

    @torch.no_grad()
    def run(self) -> None:
        """Decode, as far as time, memory and the user let it."""
        start, stream = time.perf_counter(), self.job.streamer
        show = self._most() < self.job.rows if self.progress is None else self.progress is True
        with progress_bar(len(self.given_back), "row") if show else nullcontext() as bar:
            self.tell = self.progress if callable(self.progress) else bar and bar.update
            self._refuse()
            try:
                if stream is not None:
                    stream.put(0, self.job.prompts[0].ids.repeat_interleave(self.job.copies, 0))
                with nullcontext() if self.given is None else self.given.lent(self.job.rows):
                    self._run()
            except KeyboardInterrupt:
                self.interrupted = True
                warnings.warn(
                    f"interrupted when {len(self.ended)} of {self.job.rows} rows had ended",
                    RuntimeWarning,
                    stacklevel=3,
                )
            except BaseException:
                if stream is not None:  # whoever reads it in another thread would wait for ever
                    with suppress(Exception):
                        stream.end()
                raise
        if stream is not None:
            stream.end()
        self._warn_of_full()
        self.seconds = time.perf_counter() - start

    def _run(self) -> None:
        most, deadline = self._most(), self.job.deadline
        if self.job.aligned is not None and most < self.job.rows:
            self.notes.append(f"fixed batches: {self.job.aligned}")
        while todo := [r for r in range(self.job.rows) if r not in self.ended]:
            batch = todo[:most] if self._aligned else todo
            count, short = self.job.rows if self._together else min(most, len(batch)), False
            try:
                self._decode(batch, count)
            except Unsupported as reason:
                if self._whole or self.simple:
                    what = "the simple path" if self.simple else "cache and return_cache"
                    raise NotImplementedError(f"{what}: {reason}") from None
                self.notes.append(f"the simple path: {reason}")
                self.simple = True
                most = self._most()
            except (RuntimeError, MemoryError) as error:
                fewer = self._fewer(count)
                if fewer == 0 or not is_out_of_memory(error):
                    raise
                self.notes.append(f"memory ran out: {fewer} rows at a time")
                most, short = fewer, True
            if short:  # what was tried is let go by now, but for what others tied into cycles
                gc.collect()
            if deadline is not None and time.time() > deadline:
                return
            if again := [r for r in batch if r not in self.ended]:
                self.results.forget(torch.tensor(again, device=self.device))

    @property
    def _aligned(self) -> bool:
        return self.simple or self.job.aligned is not None

    @property
    def _whole(self) -> bool:
        """Whether all rows must be decoded at a time, as caches are for given rows."""
        return self.given is not None or self.keep_cache

    @property
    def _together(self) -> bool:
        """Whether all rows are decoded at a time, each in the slot of its number."""
        return self._whole or self.job.streamer is not None

    def _most(self) -> int:
        """Rows at a time."""
        most = self.max_batch
        if most is None:
            together = self._aligned or self._whole
            most = self.job.rows if together else ROWS.get(self.device.type, ROWS["cuda"])
        return self._of_requests(most) or self.job.copies

    def _fewer(self, count: int) -> int:
        """Rows at a time where memory ran out for `count`; 0: there is no smaller batch."""
        if self._together:
            return 0
        half = count // 2  # rows of one request may be apart, but in a search
        return self._of_requests(half) or (half if self.job.search is None else 0)

    def _of_requests(self, rows: int) -> int:
        """So many rows; of whole requests, where those start at one step."""
        whole = self._aligned or self.job.search is not None
        return rows - rows % self.job.copies if whole else rows

    def _decode(self, rows: Sequence[int], count: int) -> None:
        """Decode `rows`, `count` at a time."""
        job, engine = self.job, self.engine
        search = job.search
        if search is not None and search.settings.chunk_end is not None and self._aligned:
            why = job.aligned or "the simple path keeps all rows at one step"
            raise NotImplementedError(f"chunk_end lets rows wait for others, but {why}")
        chunk = None if search is None else search.settings.chunk_length
        slots = Slots(
            count,
            self.results,
            job.seeds,
            job.streams,
            self.weights,
            self.value_weights,
            chunk,
            self.references,
        )
        runner: Any = self._runner(slots)
        mixer = Mixer(
            self.blend,
            slots.weights,
            slots.value_weights,
            self.vocabulary,
            runner.columns,
            [
                (Mixer(r.blend, *weights, self.vocabulary), r.columns)
                for r, weights in zip(job.references, slots.references, strict=True)
            ],
        )
        valuer: Valuer | None = None
        if search is None:
            loop: Loop = Loop(job, runner, mixer, slots, rows, self._aligned)
        else:
            simple = replace(engine, simple=self.simple)
            valuer = Valuer(search, job.copies, count, self.limit, simple, self.results)
            loop = SearchLoop(
                job, search, valuer, runner, mixer, slots, rows, self._aligned, self.keep_cache
            )
        host = job.watched or self.simple or self.device.type == "cpu"
        stepper = Stepper(engine.cuda_graph and not host)
        every = 1 if host else 8 if search is None else _divisor(slots.chunk, 8)
        if engine.sync_every is not None and not job.watched and not self.simple:
            every = engine.sync_every
        if not self.simple:
            self._note_left_out(runner)
        try:
            loop.run(stepper, every, self._on_end)
        finally:
            self.models_stats.append(runner.stats(loop.drawn(), len(rows)))
            self.cache_bytes, peak = runner.cache_bytes, runner.peak_bytes
            self.notes += [] if stepper.note is None else [stepper.note]
            if valuer is not None:
                self.models_stats.append(valuer.stats())
                self.cache_bytes += valuer.cache_bytes
                peak += valuer.peak_bytes
                self.notes += [n for n in valuer.notes if n not in self.notes]
            self.peak_bytes = max(self.peak_bytes, peak + self.results.nbytes)
        if self.keep_cache:
            tokens, lengths = (x[:-1].tolist() for x in (self.results.tokens, self.results.lengths))
            written = [t[:n] for t, n in zip(tokens, lengths, strict=True)]
            self.cache = PrefixCache(runner, self.states, written, job.returned)

    def _on_end(self, rows: Sequence[int]) -> None:
        self.ended.update(rows)
        given = [r for r in rows if r in self.given_back]
        if self.tell is not None and given:
            self.tell(len(given))

    def _runner(self, slots: Slots) -> SimpleRunner | EngineRunner:
        """The simple path, or the engine with what the settings, the blend and the job allow."""
        job, blend, engine = self.job, self.blend, self.engine
        count = len(slots.row)
        if self.simple:
            return SimpleRunner(self.models, job.prompts, job.copies, count, self.limit)
        runner = EngineRunner(self.models, job.prompts, job.copies, count, self.limit, engine)
        each_term = None  # why all logits of every term are needed
        if job.term_logprobs:
            each_term = "the log-probs of each term are asked for"
        elif job.references:
            each_term = "the divergence of each step is asked for"
        mean = f"the blend has power {blend.power:g}" if blend.power != 0 else None
        if engine.share_head:
            cut = None if blend.support is None else "the blend has a support"
            w = torch.as_tensor(slots.weights, dtype=torch.float32, device=self.device)
            w = w if w.dim() == 2 else w.expand(count, -1)
            runner.share_heads(w, each_term or mean or cut)
        on_cpu = all(g.device.type == "cpu" for g in runner.groups)
        if blend.support is not None and on_cpu:
            restrict = engine.restrict_guides and mean is None
            if engine.restrict_guides and mean is not None:
                runner.notes.append(f"all columns of guides: {mean}")
            if restrict or engine.skip_guides:
                runner.rest_guides(
                    blend.support, self.vocabulary, restrict, engine.skip_guides, each_term
                )
        if self._whole:
            self.states = states(runner)
        if self.given is not None:
            self.notes += self.given.give(runner, self.states)
        self.notes += [n for n in runner.notes if n not in self.notes]
        return runner

    def _note_left_out(self, runner: Any) -> None:
        """Name the engine's options for steps that are on and that this job leaves out."""
        engine, watched = self.engine, "the host looks at the rows after each"
        found = []
        if engine.cuda_graph and self.device.type == "cuda" and self.job.watched:
            found.append(f"steps are not captured in a CUDA graph: {watched}")
        if engine.sync_every not in (None, 1) and self.job.watched:
            found.append(f"sync_every is 1 and not {engine.sync_every}: {watched}")
        if engine.compile and runner.lazy is not None:
            found.append("guides are not compiled: they rest, and then read several tokens")
        self.notes += [n for n in found if n not in self.notes]

    def stats(self) -> tuple[ModelStats, ...]:
        """Each model's work, over all batches."""
        total: dict[tuple[str, ...], ModelStats] = {}
        for s in (s for batch in self.models_stats for s in batch):
            old = total.get(s.names, ModelStats(s.names, 0, 0))
            total[s.names] = ModelStats(s.names, old.forwards + s.forwards, old.tokens + s.tokens)
        return tuple(total.values())


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`: looks at the device fall on chunks' ends."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
