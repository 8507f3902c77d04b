"""Puts a loop together for rows of one kind: its slots, its runner and its mixer."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..blends.blend import Blend
from .classifiers import Classifiers
from .engine.drafting import Guessers
from .engine.graph import Stepper
from .engine.lazy import Lazy
from .engine.options import Engine
from .engine.prefix import PrefixCache, fingerprints_of
from .engine.runner import EngineRunner
from .job import WEIGHTS, Drafted, Job, Row, weights_of
from .loop import Loop
from .mixer import Mixer
from .ranks import ranks_of
from .rows import AHEAD, Kept, Slots, kept_of
from .runner import Runner
from .search.loops import search_loop
from .simple.runner import SimpleRunner
from .simple.term_model import TermModel
from .speculation.drafter import Drafter, TextDrafter
from .speculation.models import ModelDrafter
from .speculation.pace import Costs
from .speculation.rounds import Rounds
from .strays import Strays


class Builder:
    """Makes the loops of a call, on the engine or on the simple path.

    Args:
        blend, models, vocabulary, engine, cache, keep_cache: as of `Driver`.

    Attributes:
        simple: whether loops are on the simple path: as the engine's options say, or as the engine
            does not support a model.
        notes: what was not done as the settings say, and why.
        fingerprints: of the engine's models, from before they run: for a cache that is given or
            kept.
    """

    def __init__(
        self,
        blend: Blend,
        models: Sequence[TermModel],
        vocabulary: int,
        engine: Engine,
        cache: PrefixCache | None,
        keep_cache: bool,
    ) -> None:
        self.blend, self.models, self.vocabulary, self.engine = blend, models, vocabulary, engine
        self.cache_in, self.keep_cache = cache, keep_cache
        self.device, self.simple = models[0].device, engine.simple
        self.notes: list[str] = []
        self.fingerprints: list[Hashable] = []
        self.strays = Strays(blend, vocabulary)
        self.ranks = ranks_of(models)

    def kept(self, job: Job) -> Kept:
        """What is kept of every token of a job's rows."""
        return kept_of(self.blend, job)

    def value_size(self, job: Job) -> int:
        """How many numbers a search keeps of a row's value: the value itself and its parts."""
        search = job.search
        return 0 if search is None else 1 + search.weights.shape[1]

    def same_step(self, job: Job) -> bool:
        """Whether the rows of a loop start at once, so that all are at the same step."""
        return self.simple or job.why_aligned is not None

    @property
    def has_cache(self) -> bool:
        """Whether a cache is given or kept. It has a place for each row, so all run at once."""
        return self.cache_in is not None or self.keep_cache

    def slot_is_index(self, job: Job) -> bool:
        """Whether all rows are decoded at a time, each in the slot of its own index."""
        return self.has_cache or job.streamer is not None

    @torch.no_grad()
    def loop(self, job: Job, rows: Sequence[Row], count: int, *, tells: bool = False) -> Loop:
        """A loop with so many slots, and the runner and the mixer that rows of this kind take.

        Args:
            tells: whether it tells of each token as it comes. It is to run for long then, and
                remembers what its caches hold.
        """
        engine, search = self.engine, job.search
        if search is not None and search.settings.chunk_end is not None:
            why = "the simple path keeps all rows at one step" if self.simple else job.why_in_step
            if why is not None:
                raise NotImplementedError(f"chunk_end lets rows wait for others, but {why}")
        limit = max(1, *job.limits, *(row.limit for row in rows))
        limit = max(limit, AHEAD) if tells else limit  # Longer rows may join it.
        chunk = None if search is None else search.settings.chunk_length
        slots = Slots(
            count,
            job.table,
            self.kept(job),
            self.value_size(job),
            limit,
            self.device,
            chunk,
            None if search is None else search.settings.most_entropy,
        )
        runner = self._runner(job, slots, rows, limit)
        mixer = self._mixer(job, slots, runner)
        own_slots = self.slot_is_index(job)
        places = [row.index for row in rows] if own_slots else range(count)
        together = job.rows() if own_slots else rows
        how: dict[str, Any] = {
            "aligned": together if self.same_step(job) else None,
            # Steps of several ranks are not captured: the host takes part in their draws.
            "stepper": Stepper(
                engine.cuda_graph and not self._host_acts(job) and self.ranks is None
            ),
            "every": self._steps_between_looks(job, limit, chunk),
            # What runs for long has rows of many formulas, and nobody who reads a warning.
            "strays": self.strays if self._looks_for_strays(runner, tells) else None,
            "tells": tells,
            "remembers": tells and search is None,
        }
        if job.classified is not None:
            own = replace(engine, simple=self.simple)
            how["classifiers"] = Classifiers(mixer, count, limit, own)
        if job.draft is not None:
            drafter = self._drafter(job.draft, slots, runner)
            how["rounds"] = None if drafter is None else Rounds(drafter)
        if not self.simple:
            self._note_left_out(job, runner)
        if search is None:
            return Loop(runner, mixer, slots, places, **how)
        engine, how["keep_cache"] = replace(engine, simple=self.simple), self.keep_cache
        return search_loop(search, limit, engine, runner, mixer, slots, places, **how)

    def _mixer(self, job: Job, slots: Slots, runner: Runner) -> Mixer:
        """The arithmetic of the blend and its references, with the weights of the rows in slots."""
        table = slots.table
        references = [
            (Mixer(r.blend, [table[name] for name in weights_of(i)], self.vocabulary), r.places)
            for i, r in enumerate(job.references)
        ]
        own = [table[name] for name in WEIGHTS]
        shard = runner.shard if isinstance(runner, EngineRunner) else None
        return Mixer(self.blend, own, self.vocabulary, runner.models_of_logits, references, shard)

    def _looks_for_strays(self, runner: Runner, tells: bool) -> bool:
        in_shards = isinstance(runner, EngineRunner) and runner.shard is not None
        return self.strays.possible and not tells and not in_shards

    def _drafter(self, draft: Drafted, slots: Slots, runner: Runner) -> Drafter | None:
        """What guesses the tokens of rows; None where the engine cannot let it."""
        if not isinstance(runner, EngineRunner):
            self.notes.append("no draft: the simple path reads a token at a time")
            return None
        if self.ranks is not None:
            self.notes.append("no draft: how many tokens pay is measured, and ranks would differ")
            return None
        lanes = max(len(group.terms) for group in runner.groups)
        costs = Costs(self.device.type, lanes * len(slots.each))
        if draft.blend is None:
            return TextDrafter(slots, costs, draft.length, given=draft.texts is not None)
        if runner.drafting is None:
            return None
        weights = [slots.table[name] for name in weights_of(None)]
        mixer = Mixer(draft.blend, weights, self.vocabulary)
        return ModelDrafter(runner.drafting, mixer, slots, costs, draft.length)

    def _host_acts(self, job: Job) -> bool:
        """Whether the host takes part in every step, as it always does on CPUs."""
        return job.watched or self.simple or self.device.type == "cpu"

    def _steps_between_looks(self, job: Job, limit: int, chunk: int | None) -> int:
        """How many steps the host lets pass before it looks at what the device has done.

        By default a GPU is looked at after 8 steps, and in a search so that a look falls on the end
        of each chunk.
        """
        if not (job.watched or self.simple) and self.engine.sync_every is not None:
            return self.engine.sync_every
        if self._host_acts(job):
            return 1
        return 8 if chunk is None else _divisor(min(chunk, limit), 8)

    def _runner(
        self, job: Job, slots: Slots, rows: Sequence[Row], limit: int
    ) -> SimpleRunner | EngineRunner:
        """The simple path, or the engine with what the settings, the blend and the job allow."""
        blend, engine = self.blend, self.engine
        count = len(slots.each)
        if self.simple:
            return SimpleRunner(self.models, count)
        known = [*job.prompt_ids, *(row.prompt_ids for row in rows)]
        longest = [max(len(ids[k]) for ids in known) for k in range(len(self.models))]
        # Processors and streamers see every step, and waiting for a scalar head takes one more.
        heads = [] if job.search is None else job.search.heads(scalar=not self.same_step(job))
        drafts, guessers = job.draft is not None, None
        if heads and drafts:
            self.notes.append("value heads read chunks in forwards of their own: a draft")
            heads = []
        if job.draft is not None and job.draft.blend is not None:
            guessers = Guessers(job.draft.places, job.draft.first)
        runner = EngineRunner(self.models, longest, count, limit, engine, heads, draft=guessers)
        runner.fit(
            blend,
            slots.table["weights"],
            self.vocabulary,
            job.why_each_term,
            why_whole=job.why_whole,
            drafts=drafts,
        )
        if self.has_cache:
            self.fingerprints = fingerprints_of(runner)
        if self.cache_in is not None:
            self.notes += self.cache_in.give(runner, self.fingerprints, job.copies)
        self.notes += [n for n in runner.notes if n not in self.notes]
        return runner

    def _note_left_out(self, job: Job, runner: Any) -> None:
        """Note which options of the engine are on, but cannot be followed in this job."""
        engine, watched = self.engine, "the host looks at the rows after each step"
        found = []
        if engine.cuda_graph and self.device.type == "cuda" and job.watched:
            found.append(f"steps are not captured in a CUDA graph: {watched}")
        if engine.sync_every not in (None, 1) and job.watched:
            found.append(f"sync_every is 1 and not {engine.sync_every}: {watched}")
        if engine.compile and isinstance(runner.plan, Lazy):
            found.append(
                "models that rest are not compiled: later they read several tokens at once"
            )
        self.notes += [n for n in found if n not in self.notes]


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
