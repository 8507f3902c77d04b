"""Searches as a loop: sample a chunk, put the rows in order, keep the best of them, fork them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ... import ops
from ...models.hf import is_scalar
from ...search import Search
from ..job import Row
from ..loop import Loop
from ..mixer import Mixer
from ..rows import Slots
from ..runner import Runner
from ..stats import ModelStats
from .answers import totals
from .candidates import Candidates
from .job import search_of
from .valuer import Valuer

NAN = float("nan")


def gumbel(draw: random.Random) -> float:
    """Gumbel noise. Python promises the same `random.random` in all its versions."""
    return -math.log(-math.log(max(draw.random(), 1e-300)))


class SearchLoop(Loop):
    """Decodes each prompt in a group of ``width * samples`` neighbouring slots.

    A row stops at the end of its chunk. When all rows of a group have stopped, the group is at a
    boundary: its rows are put in order, and the best of them fork into its slots and go on. A group
    is over when all rows that stay have ended.

    The order is that of the rows' values: chunk-level beam search. A search that has another order
    overrides `_ranked`, and one that keeps other rows overrides `_kept`.

    A request that keeps a budget with fewer rows leaves the last slots of its group idle.

    A scalar head that rides on the rows' forwards says what a chunk is worth once its last token is
    fed, which the next chunk's first step does anyhow. So a group that has stopped waits for that
    step (`fed`), is put in order and forks, and then draws the first tokens of its next chunk from
    the logits that this step gave, by `_go_on`. Only the last boundary takes a forward more.

    Args:
        valuer: scores what rows have written.
        keep_cache: whether caches are used again after the last fork.
        others: as of `Loop`.

    Attributes:
        size: the slots of a group.
        totals: ``[slots]`` float64: the value of each row, as last scored.
        parts: ``[slots, parts]``: the parts of each row's value, as last scored.
        started: of each slot, how many tokens its row had when its chunk began.
        idle: of each slot, whether it holds no candidate.
        shared: ``[slots, size]``: how many tokens of its response a slot's row has in common with
            the row of each slot of its group.
        counted: how many tokens were drawn before the chunks under way.
        fed: the groups at a boundary whose last tokens the next step feeds.
        last_read: how many tokens were fed at boundaries after which nothing was drawn.
    """

    def __init__(
        self,
        valuer: Valuer,
        runner: Runner,
        mixer: Mixer,
        slots: Slots,
        places: Iterable[int],
        aligned: Sequence[Row] | None = None,
        *,
        keep_cache: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(runner, mixer, slots, places, aligned, **others)
        self.valuer, self.keep_cache = valuer, keep_cache
        self.settings, self.feeds_some = valuer.settings, False
        self.size = self.settings.rows
        count, parts = slots.values.shape
        self.totals = torch.full((count,), NAN, dtype=torch.float64, device="cpu")
        self.parts = torch.full((count, parts - 1), NAN, dtype=torch.float64, device="cpu")
        self.started = [0] * count
        self.idle = [False] * count
        self.shared = torch.zeros(count, self.size, dtype=torch.int64, device="cpu")
        self.counted = 0
        slots.keep_heads([is_scalar(head.bare) for head in runner.heads])
        self.fed: set[int] = set()
        self.last_read = 0

    def cancel(self, rows: Iterable[Row]) -> None:
        """Let all rows of the requests that these rows belong to leave as they are."""
        gone = {id(row.prompt_ids) for row in rows}
        each = [*self.waiting, *self.seated.values()]
        super().cancel([row for row in each if id(row.prompt_ids) in gone])

    def stats(self) -> list[ModelStats]:
        return [*super().stats(), *self.valuer.stats()]

    def _undrawn(self) -> int:
        return super()._undrawn() + self.last_read

    @property
    def notes(self) -> list[str]:
        return [*super().notes, *self.valuer.notes]

    @property
    def cache_bytes(self) -> int:
        return super().cache_bytes + self.valuer.cache_bytes

    @property
    def peak_bytes(self) -> int:
        return super().peak_bytes + self.valuer.peak_bytes

    def drawn(self) -> int:
        """Tokens drawn so far, also those of rows that were dropped."""
        new = self.slots.new.tolist()
        under_way = (new[s] - self.started[s] for s in self.seated if not self.idle[s])
        return self.counted + sum(under_way)

    def _occupy(self, seated: dict[int, Row]) -> None:
        slots = [*seated]
        self.parts[slots] = NAN
        self.shared[slots] = 0
        for s, row in seated.items():
            self.started[s] = 0
            self.idle[s] = s % self.size >= search_of(row).of(row.request).rows
        self.fed -= {s // self.size for s in slots}
        super()._occupy(seated)
        self.valuer.join(seated)

    def _start(self, slots: Sequence[int]) -> None:
        super()._start([s for s in slots if not self.idle[s]])

    def _after_step(self) -> None:
        """Stop the rows whose chunks end here, as a function of their texts says."""
        chunk_end, slots = self.settings.text_end, self.slots
        if chunk_end is not None:
            going = (slots.live & slots.wrote).tolist()
            going = [s for s in self.seated if going[s]]
            for s, chunk in zip(going, self._written(going).since(self.started), strict=True):
                if chunk_end(chunk):
                    slots.live[s] = False

    @property
    def _steps(self) -> int:
        return 1 if self.fed else super()._steps

    def _ended(self, stopped: list[int], logits: list[Tensor]) -> list[int]:
        """Which slots are free: those of groups at a boundary after which nothing goes on."""
        going = {s // self.size for s in self.seated.keys() - set(stopped)}
        at_boundary = {s // self.size for s in stopped} - going
        if not self.valuer.waits:
            return self._select(sorted(at_boundary))
        fed, self.fed = self.fed & at_boundary, at_boundary - self.fed
        over = self._select(sorted(fed), logits)
        live = self.slots.live.view(-1, self.size).any(dim=1).tolist()
        # A group whose next chunk is one token is at its end already.
        self.fed |= {g for g in fed if not live[g]} - {s // self.size for s in over}
        return over

    def _time_is_up(self, slots: list[int]) -> None:
        """Put the best rows of these groups in order, as far as they are written."""
        groups = {s // self.size for s in slots}
        if self.valuer.waits:
            self._feed()
            self.fed -= groups
        self._select(sorted(groups), last=True)

    def _feed(self) -> None:
        """A step that draws nothing: scalar heads say of each row what it has written by now."""
        slots = self.slots
        self.reserve()
        self.stepper.forget()
        self.runner.step(slots.tokens, torch.zeros_like(slots.live))
        said = self.runner.values(slots.tokens)
        assert said is not None  # `Valuer.waits` says that there are heads.
        slots.heads.copy_(torch.where(slots.of_fed, said, slots.heads))

    def _select(
        self, groups: list[int], logits: list[Tensor] | None = None, *, last: bool = False
    ) -> list[int]:
        """Put the rows of groups in order, and keep the best ones.

        Where a group goes on, its best rows fork into its slots. Where it is over, as all are at
        the `last` boundary, they are put in order.

        Args:
            logits: of the step that fed the rows' last tokens, from which those that go on draw
                their next ones. None: it was not fed yet.

        Returns:
            The slots of the groups that are over.
        """
        over: list[int] = []
        alike: dict[int, tuple[Search, list[int]]] = {}
        for g in groups:
            row = self.seated[g * self.size]
            settings = search_of(row).of(row.request)
            alike.setdefault(settings.rows, (settings, []))[1].append(g)
        for settings, its in alike.values():
            over += self._select_alike(its, settings, logits, last)
        return over

    def _select_alike(
        self, groups: list[int], settings: Search, logits: list[Tensor] | None, last: bool
    ) -> list[int]:
        """The same for groups that have as many rows, those of `settings`."""
        size, rows = self.size, settings.rows
        slots = [g * size + j for g in groups for j in range(rows)]
        scores, ended = self._order(slots, settings)
        parents, over = self._kept(groups, settings, scores, ended, last)
        going = ~over & ~ended.gather(1, parents.clamp(min=0))
        if logits is not None:
            self._keep(slots, ended, over)
        idle = (0, size - rows)  # the slots that the groups do not use
        self._fork(
            groups,
            functional.pad(parents, idle, value=-1),
            over,
            functional.pad(going, idle).flatten().tolist(),
        )
        if logits is not None:
            self._go_on(groups, parents, going, logits)
        done = [g for g, is_over in zip(groups, over[:, 0].tolist(), strict=True) if is_over]
        return [g * size + j for g in done for j in range(size)]

    def _kept(
        self, groups: Sequence[int], settings: Search, scores: Tensor, ended: Tensor, last: bool
    ) -> tuple[Tensor, Tensor]:
        """The row that each slot's becomes, and which groups are over.

        Args:
            scores, ended: ``[groups, rows]``, as `_order` gives them.
            last: whether all groups are over.

        Returns:
            ``[groups, rows]`` int64, places within a group, or -1 where a slot becomes idle, and
            ``[groups, 1]`` bool. The rows of a group that is over are in order, the best first.
        """
        finished = ended & (not settings.duplicate_finished)
        if settings.selection_temperature > 0:
            scores = self._drawn_order(groups, settings.selection_temperature, scores)
        parents = ops.chunk_select(scores, finished, settings.width)
        kept = parents[:, :: settings.samples]
        over = ended.gather(1, kept).all(dim=1, keepdim=True) | last
        ranked = torch.full_like(parents, -1)
        ranked[:, : settings.width] = kept
        return torch.where(over, ranked, parents), over

    def _drawn_order(self, groups: Sequence[int], temperature: float, scores: Tensor) -> Tensor:
        """Scores ``[groups, rows]`` whose order is that of draws by ``exp(scores / temperature)``.

        They have Gumbel noise, which depends on the seed and the stream of each group's first row
        and on how much the group has written.
        """
        new, noise = self.slots.new.tolist(), []
        for g in groups:
            slots = range(g * self.size, g * self.size + scores.shape[1])
            row = self.seated[slots[0]]
            longest = max(new[s] for s in slots)
            draw = random.Random(f"{row.value('seed')} {row.value('stream')} {longest}")
            noise.append([gumbel(draw) for _ in slots])
        drawn = scores.double() / temperature + torch.tensor(noise, device="cpu").double()
        return drawn.float()

    def _order(self, slots: list[int], settings: Search) -> tuple[Tensor, Tensor]:
        """Scores by which the rows of groups are in order, and whether each has ended.

        Both are ``[groups, rows]``. The score of a slot without a candidate is NaN.
        """
        here = self.slots
        new, failed = here.new[slots], here.failed[slots]
        ended = (here.finished[slots] | failed | (new >= here.limits[slots])).cpu()
        grown = []
        for s, n, bad in zip(slots, new.tolist(), failed.tolist(), strict=True):
            if not self.idle[s]:
                self.counted += n - self.started[s]
                if bad:
                    self.parts[s] = NAN
                elif n > self.started[s]:
                    grown.append(s)
        if grown:
            self.parts[grown] = self.valuer.score(self._written(grown))

        weights = self.valuer.weights([self.seated[s] for s in slots])
        parts = self.parts[slots]
        self.totals[slots] = total = totals(weights, parts)
        values = torch.cat([total[:, None], parts], dim=1).float()
        scores, values = self._ranked(slots, settings.rows, values, failed.cpu())
        here.values[slots] = values.to(here.device)
        idle = torch.tensor([self.idle[s] for s in slots], device="cpu")
        scores = scores.masked_fill(idle, NAN)
        return scores.view(-1, settings.rows), ended.view(-1, settings.rows)

    def _ranked(
        self, slots: list[int], rows: int, values: Tensor, failed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores that put the rows in order, and the values that are kept of them.

        Args:
            slots: those of whole groups that are at a boundary.
            rows: how many of them each group has.
            values: ``[slots, 1 + parts]`` float32: the value of each row, then its parts. Without a
                value there are no parts, and the first column says nothing.
            failed: ``[slots]`` bool.

        Returns:
            ``[slots]`` float32, of which a higher one is better and none is NaN, and the values.
        """
        scores = values[:, 0].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return scores.masked_fill(failed, -torch.inf), values

    def _fork(
        self, groups: list[int], parents: Tensor, over: Tensor, going: Sequence[bool]
    ) -> None:
        """Slot j of a group becomes what its slot ``parents[group, j]`` is; -1 makes it idle.

        Args:
            over: ``[groups, 1]``: whether each group is over.
            going: of each slot of the groups, whether its row goes on.
        """
        size, new = self.size, self.slots.new.tolist()
        own = torch.arange(size, device="cpu")
        at, source, live = [], [], []
        # Of every slot: whose cache it takes, if that is used again, and the new tokens that it has
        # in common with it.
        caches = [-1] * len(new)
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
            self.started[s] = new[p]
        self.watch.fork(at, source)
        if self.rounds is not None:
            self.rounds.drafter.fork(at, source)
        if any(p >= 0 for p in caches):
            self.runner.fork(caches, same)
            self.valuer.fork(caches)

    def _keep(self, slots: list[int], ended: Tensor, over: Tensor) -> None:
        """Keep the tokens that the last step fed the rows of groups that go on.

        Args:
            slots: those of the groups, of which each has as many rows.
            ended, over: ``[groups, rows]``, ``[groups, 1]`` bool.
        """
        which = torch.zeros_like(self.slots.live)
        which[slots] = (~ended & ~over).flatten().to(which.device)
        self.runner.keep(which)
        done = over.expand_as(ended).flatten().tolist()
        self.last_read += sum(d and not self.idle[s] for s, d in zip(slots, done, strict=True))

    def _go_on(
        self, groups: Sequence[int], parents: Tensor, going: Tensor, logits: list[Tensor]
    ) -> None:
        """Draw the next tokens of the rows that go on, from the logits of their parents.

        No chunk ends before these tokens, which are the first ones of their chunks.

        Args:
            parents, going: ``[groups, rows]``, as of `_fork`.
        """
        here, device = self.slots, self.slots.device
        first = self.size * torch.tensor(groups, device="cpu")[:, None]
        at = (first + torch.arange(parents.shape[1], device="cpu")).flatten().to(device)
        source = here.each.clone()
        source[at] = (first + parents.clamp(min=0)).flatten().to(device)
        others, which = here.live.clone(), torch.zeros_like(here.live)
        which[at] = going.flatten().to(device)
        here.live.copy_(which)
        of_parents = [z[source.to(z.device)] for z in logits]
        self.write(of_parents, self.sample(of_parents), source)
        self.watch.look()
        self._after_step()
        here.live |= others & ~which

    def _written(self, slots: list[int]) -> Candidates:
        """What the rows in these slots have written so far."""
        new = self.slots.new[slots].tolist()
        tokens = self.slots.written["tokens"][slots, : max(new, default=0)].tolist()
        return Candidates(
            slots,
            [self.seated[s] for s in slots],
            [ids[:n] for ids, n in zip(tokens, new, strict=True)],
            self.slots.finished[slots].tolist(),
        )
