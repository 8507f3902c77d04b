"""Chunk-level beam search as a loop: sample a chunk, score, keep the best rows, fork them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .loop import Job, Loop
from .mixer import Mixer
from .rows import Slots
from .valuer import Search, Valuer, Written

NAN = float("nan")


class SearchLoop(Loop):
    """Decodes each prompt in a group of ``width * samples`` neighbouring slots.

    A slot's row stops at its chunk's end. Where all of a group's have stopped, the group is at a
    boundary: it is scored, and its best rows fork into its slots, until all that stay have ended.
    """

    def __init__(
        self,
        job: Job,
        search: Search,
        valuer: Valuer,
        runner: Any,
        mixer: Mixer,
        slots: Slots,
        rows: Sequence[int],
        aligned: bool,
        keep_cache: bool,
    ) -> None:
        super().__init__(job, runner, mixer, slots, rows, aligned)
        self.search, self.valuer, self.keep_cache = search, valuer, keep_cache
        self.size = search.settings.rows
        count = len(slots.row)
        self.parts = torch.full(
            (count, search.weights.shape[1]), NAN, dtype=torch.float64, device="cpu"
        )
        self.begun = [0] * count  # tokens that a slot's row had when its chunk began
        self.idle = [False] * count  # slots that hold no candidate
        # tokens of the response that a slot has in common with each of its group
        self.shared = torch.zeros(count, self.size, dtype=torch.int64, device="cpu")
        self.counted = 0  # tokens drawn before the chunks under way

    def run(self, stepper: Any, sync_every: int, on_end: Any) -> None:
        super().run(stepper, sync_every, on_end)
        if self.seated:  # time is up: the best as far as it is written
            self._select(sorted({s // self.size for s in self.seated}), last=True)

    def drawn(self) -> int:
        """Tokens drawn so far, those of rows that were dropped too."""
        new = self.slots.new.tolist()
        under_way = (new[s] - self.begun[s] for s in self.seated if not self.idle[s])
        return self.counted + sum(under_way)

    def _begin(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        super()._begin(slots, rows)
        self.valuer.join(slots, rows)
        self.parts[slots] = NAN
        self.shared[slots] = 0
        for s in slots:
            self.begun[s], self.idle[s] = 0, False

    def _watch(self) -> None:
        super()._watch()
        chunk_end, slots = self.search.settings.chunk_end, self.slots
        if chunk_end is not None:
            going = (slots.live & slots.wrote).tolist()
            going = [s for s in self.seated if going[s]]
            for s, chunk in zip(going, self._written(going).since(self.begun), strict=True):
                if chunk_end(chunk):
                    slots.live[s] = False

    def _end(self, stopped: list[int]) -> list[int]:
        going = {s // self.size for s in self.seated.keys() - set(stopped)}
        return self._select(sorted({s // self.size for s in stopped} - going))

    def _select(self, groups: list[int], *, last: bool = False) -> list[int]:
        """Score groups and keep their best rows; the slots of groups that are done.

        Where a group goes on, its best rows fork into its slots; else, or at the `last` time, they
        are put in order.
        """
        if not groups:
            return []
        settings, size = self.search.settings, self.size
        slots = [g * size + j for g in groups for j in range(size)]
        scores, ended = self._score(slots)
        finished = ended & (not settings.duplicate_finished)
        parents = ops.chunk_select(scores, finished, settings.width)
        kept = parents[:, :: settings.samples]
        over = ended.gather(1, kept).all(dim=1, keepdim=True) | last
        ranked = torch.full_like(parents, -1)
        ranked[:, : settings.width] = kept
        parents = torch.where(over, ranked, parents)
        going = (~over & ~ended.gather(1, parents.clamp(min=0))).flatten().tolist()
        self._fork(groups, parents, over, going)
        return [s for s, done in zip(slots, over.expand(-1, size).flatten(), strict=True) if done]

    def _score(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        """``[groups, size]``: the values of slots' rows, and which rows cannot go on."""
        results, row = self.slots.results, self.slots.row[slots]
        new = self.slots.new[slots]
        failed = results.failed[row]
        ended = (results.finished[row] | failed | (new >= results.limits[row])).cpu()
        grown = []
        for s, n, bad in zip(slots, new.tolist(), failed.tolist(), strict=True):
            if not self.idle[s]:
                self.counted += n - self.begun[s]
                if bad:
                    self.parts[s] = NAN
                elif n > self.begun[s]:
                    grown.append(s)
        if grown:
            self.parts[grown] = self.valuer.score(self._written(grown))

        weights = self.search.weights[row.cpu() // self.job.copies]
        parts = self.parts[slots]
        total = torch.where(weights == 0, 0.0, weights * parts).sum(dim=1)
        values = torch.cat([total[:, None], parts], dim=1).float()
        results.values[row] = values.to(row.device)
        idle = torch.tensor([self.idle[s] for s in slots], device="cpu")
        scores = values[:, 0].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        scores = scores.masked_fill(failed.cpu(), -torch.inf).masked_fill(idle, NAN)
        return scores.view(-1, self.size), ended.view(-1, self.size)

    def _fork(
        self, groups: list[int], parents: Tensor, over: Tensor, going: Sequence[bool]
    ) -> None:
        """Slot j of a group becomes what its slot ``parents[group, j]`` is; -1 makes it idle."""
        size, new = self.size, self.slots.new.tolist()
        own = torch.arange(size, device="cpu")
        at, source, live = [], [], []
        caches = [-1] * len(new)  # parents of all slots, where caches are used again
        same = [0] * len(new)
        for i, g in enumerate(groups):
            here = slice(g * size, (g + 1) * size)
            of = torch.where(parents[i] < 0, own, parents[i])
            shared = self.shared[here]
            if self.keep_cache or not over[i]:
                caches[here] = torch.where(parents[i] < 0, -1, parents[i] + g * size).tolist()
                same[here] = shared.gather(1, of[:, None])[:, 0].tolist()
            lengths = torch.tensor(new[here], device="cpu")[of]
            self.shared[here] = torch.where(of[:, None] == of, lengths[:, None], shared[of][:, of])
            for j, p in enumerate(parents[i].tolist()):
                self.idle[g * size + j] = p < 0
                if p >= 0:
                    at.append(g * size + j)
                    source.append(g * size + p)
                    live.append(going[i * size + j])
        self.slots.fork(at, source, live)
        self.parts[at] = self.parts[source]
        for s, p in zip(at, source, strict=True):
            self.begun[s] = new[p]
        if self.ids is not None:
            self.ids[at] = self.ids[source]
        if any(p >= 0 for p in caches):
            self.runner.fork(caches, same)
            self.valuer.fork(caches)

    def _written(self, slots: list[int]) -> Written:
        results, row = self.slots.results, self.slots.row[slots]
        lengths, rows = results.lengths[row].tolist(), row.tolist()
        tokens = results.tokens[row, : max(lengths, default=0)].tolist()
        return Written(
            slots,
            rows,
            [r // self.job.copies for r in rows],
            [t[:n] for t, n in zip(tokens, lengths, strict=True)],
            results.finished[row].tolist(),
            self.search.writing,
        )
