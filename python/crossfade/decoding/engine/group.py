"""One backbone as the engine runs it: the rows of all models over it in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..forms import Ids, common
from ..ranks import ranks_of
from ..runner import Shares
from ..simple.term_model import TermModel
from .backbone import Backbone
from .batching import MAX_LOGITS, Cost, batches, max_tokens
from .deltas import Deltas
from .head import Wanted, product
from .kv_cache import KVCache
from .lanes import Rider
from .modules import ForwardPass, Unsupported, refuse_unsupported
from .tape import SHORTEST
from .unread import Queue, Unread

AHEAD = 256  # the new tokens of a row that caches have room for at first, at most


class Group:
    """Models over one backbone, in one forward: row ``m * slots + s`` is lane m in slot s.

    A lane is read by a term, by its riders (models that have other heads over the same rows), or by
    riders alone; see `lanes.py`.

    `read` reads all of a prompt except its last token, which the first step feeds. Until then the
    row is `fresh`, and that token is `pending`.

    Attributes:
        terms: of each lane, the place of the first model that reads it.
        own: how many lanes, from the first on, go through the head of the model that runs.
        riders: the other models, by their places.
        lengths: ``[rows]``, on the device: how many tokens of each row are in the cache. Of those
            whose ids the host knows, `cache.held` has the ids.
        bounds: upper bounds of `lengths`, known without asking the device.
        most: how many tokens a row may have, prompt and response together.

    Args:
        models: of each lane, the first model that reads it. The first one of all runs.
        terms: their places among all models of the call.
        longest: tokens of the longest prompt, as far as it is known.
        limit: tokens of the longest response, as far as it is known. `extend` tells of longer rows.
        deltas: the lanes' adapters, each for its own rows. None: all lanes have one adapter, which
            is switched on in the modules.
        own, riders: None: all lanes are of terms over the model that runs, and there are no others.
        kernels, compile, tape: as in `Engine`.
        attention: Transformers' name of the function that layers attend by.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        terms: Sequence[int],
        slots: int,
        longest: int,
        limit: int,
        *,
        deltas: Deltas | None = None,
        own: int | None = None,
        riders: Mapping[int, Rider] | None = None,
        kernels: bool = True,
        compile: bool = False,
        tape: bool = False,
        attention: str = "crossfade",
    ) -> None:
        first, self.most = models[0], longest + limit
        self.own, self.riders = len(models) if own is None else own, dict(riders or {})
        self.lanes = [  # the places of the models that read each
            [*terms[m : m + 1][: m < self.own], *(k for k, r in self.riders.items() if r.lane == m)]
            for m in range(len(models))
        ]
        refuse_unsupported(first, self.most)
        if deltas is not None and ranks_of([first]) is not None:
            raise Unsupported(f"{first.name} has adapters over layers in shards")
        self.terms, self.slots, self.name = tuple(terms), slots, first.name
        self.models, self.deltas = tuple(models), deltas
        self.backbone = Backbone(
            models,
            terms[: self.own],
            deltas,
            kernels=kernels,
            compile=compile,
            tape=tape and limit >= SHORTEST,
            attention=attention,
        )
        self.device, self.head = self.backbone.device, self.backbone.head
        self.head.keeps = bool(self.riders)

        rows = slots * len(models)
        self.cache = KVCache(rows, longest + min(limit, AHEAD))
        self.moved = False  # whether the cache's buffers moved since the last step
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.prompt_lengths = torch.zeros_like(self.lengths)  # tokens of each row's prompt
        self.members = torch.arange(len(models), device=self.device).repeat_interleave(slots)
        self.bounds = [0] * rows
        self.used = [False] * rows  # whether a step may make the row longer
        # What each row has of the adapters that terms mix, as `Deltas.shares` gives it.
        of_terms = range(len(models))
        each = [[1.0] if deltas is None else deltas.shares(m, None) for m in of_terms]
        self.shares = torch.tensor(each, device=self.device).repeat_interleave(slots, 0)
        self.unread = Queue()
        self.pending = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.forwards_run = 0
        self.tokens_read = 0

    def _run(
        self,
        at: Tensor | slice,
        ids: Tensor,
        positions: Tensor,
        forward_pass: ForwardPass,
        how: Any = None,
    ) -> Tensor:
        """Run a forward over the rows ``at [B]``, as `Backbone.run`, each with its adapters."""
        if self.deltas is not None:
            self.deltas.seat(self.members[at], self.shares[at])
        return self.backbone.run(ids, positions, forward_pass, how)

    @property
    def fresh(self) -> Tensor:
        """``[rows]`` bool: of which rows the next token to feed is the prompt's last one."""
        return self.lengths < self.prompt_lengths

    @property
    def _highest_position(self) -> int:
        """The last position that a row's own token may have, prompt and response together."""
        context = self.models[0].context
        return min(self.most, self.most if context is None else context) - 1

    @property
    def last_position(self) -> int | None:
        """The last position of the model's context, where rows that have ended are fed again and
        again; None if no row comes so far."""
        context = self.models[0].context
        return None if context is None or self.most < context else context - 1

    def extend(self, most: int) -> None:
        """Let rows become so long.

        Raises:
            Unsupported: the engine cannot run the model on rows of that length.
        """
        if most > self.most:
            refuse_unsupported(self.models[0], most)
            self.most = most
            self.moved = True  # A captured step is void, as it may depend on the length.

    def reserve(self, tokens: int = 1) -> bool:
        """The host's part of a step: make room for so many more tokens of each row in use.

        Returns:
            Whether the cache's buffers moved since the last step.
        """
        if tokens > 1:
            self.count()
        self.bounds = [
            min(n + used * tokens, self.most)
            for n, used in zip(self.bounds, self.used, strict=True)
        ]
        # A row that is not in use is fed too: its tokens are written after its last one. And of
        # several tokens, some may be written past the end of a row, which keeps none of those.
        past = self.most + tokens - 1
        self._make_room(min(max(self.bounds) + tokens, past))
        moved, self.moved = self.moved, False
        return moved

    def _make_room(self, capacity: int) -> None:
        self.moved |= self.cache.reserve(capacity, self.most)

    def step(self, tokens: Tensor, live: Tensor, slots: Tensor | None = None) -> Tensor:
        """The device's part of a step, which feeds one more token ``[slots]``.

        Only the rows of `live` slots keep the token. Nothing here depends on what the host knows,
        so that the step can be captured.

        Args:
            slots: ``[n]``: those that are fed, among them all that are live; None: all.

        Returns:
            Logits ``[own * n, V]`` of the lanes that go through the head of the model.
        """
        logits = self.feed(tokens[:, None], slots=slots)[:, 0]
        self.keep(live)
        return logits

    def feed(self, tokens: Tensor, at: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """Feed the next tokens ``[slots, n]``, of which rows keep what `keep` says.

        Args:
            at: ``[slots]``: after which of them a row's logits are wanted; None: after each.
            slots: those that are fed, if not all.

        Returns:
            Logits ``[own * slots, n or 1, V]`` of the lanes that go through the head of the model.
        """
        lanes, n = len(self.terms), tokens.shape[1]
        first = torch.where(self.fresh, self.pending, tokens[:, 0].repeat(lanes))[:, None]
        ids = first if n == 1 else torch.cat([first, tokens[:, 1:].repeat(lanes, 1)], dim=1)
        positions = self.lengths[:, None]
        if n > 1:
            positions = positions + torch.arange(n, device=self.device)
        if n > 1 or self.last_position is not None:
            positions = positions.clamp(max=self._highest_position)
        rows: Tensor | None = None
        lengths, count = self.lengths, self.slots
        if slots is not None:
            count = len(slots)
            rows = (torch.arange(lanes, device=self.device)[:, None] * self.slots + slots).flatten()
            ids, positions, lengths = ids[rows], positions[rows], lengths[rows]
        wanted = Wanted(every=True, rows=self.own * count, slots=slots)
        if at is not None:
            wanted = Wanted(at=at.repeat(lanes)[:, None], rows=self.own * count)
        how = self.backbone.step(ids, some_rows=rows is not None, every=at is None)
        forward_pass = ForwardPass(self.cache, lengths, rows)
        with self.head.reading(wanted):
            fed = slice(None) if rows is None else rows
            logits = self._run(fed, ids, positions, forward_pass, how)
        return logits

    def states(self, lane: int) -> Tensor:
        """``[slots, n, H]``: the hidden states of a lane after each token that was last fed."""
        states = self.head.states
        assert states is not None  # `feed` keeps them where there are riders.
        return states[lane * self.slots : (lane + 1) * self.slots]

    def ridden(self, place: int) -> Tensor:
        """``[slots, n, V]``: what a rider's head makes of its lane's states."""
        rider = self.riders[place]
        return product(rider.layer, self.states(rider.lane), self.backbone.backend)

    def layer(self, place: int) -> Any:
        """The head of a model that makes its numbers of the hidden states of its lane."""
        return self.riders[place].layer if place in self.riders else self.head.layer

    def keep(self, counts: Tensor) -> None:
        """Let the rows keep so many ``[slots]`` of the tokens that they were last fed."""
        self.lengths += counts.to(self.device).repeat(len(self.terms))

    def take_back(self, counts: Tensor) -> None:
        """Forget the last tokens of rows, so many ``[slots]`` of those that they kept."""
        self.lengths -= counts.to(self.device).repeat(len(self.terms)).long()

    def count(self) -> None:
        """Let the host know how long rows are, after some have kept fewer tokens than there was
        room made for."""
        self.bounds = [
            length if used else bound
            for length, bound, used in zip(
                self.lengths.tolist(), self.bounds, self.used, strict=True
            )
        ]

    def join(
        self, rows: Sequence[int], prompts: Sequence[Ids], mixes: Sequence[Shares] | None = None
    ) -> None:
        """Rows begin with prompts, of which `read` reads all but the last tokens.

        What a row's cache holds of its prompt already is not read again, unless it is of another
        mix of adapters.

        Args:
            mixes: of each row, as in `Runner.join`.
        """
        starts, unread = [], []
        mixes = [None] * len(rows) if mixes is None else mixes
        if self.deltas is not None and self.deltas.mixed:
            each = zip(rows, mixes, strict=True)
            shares = [self.deltas.shares(row // self.slots, mix) for row, mix in each]
            here = torch.tensor(rows, device=self.device)
            self.shares[here] = torch.tensor(shares, device=self.device)
        for row, prompt, mix in zip(rows, prompts, mixes, strict=True):
            start = self.held(row, prompt, mix)
            self.cache.mixes[row] = mix
            self.cache.rewind(row, start)
            starts.append(start)
            self.bounds[row] = len(prompt) - 1
            unread.append(Unread(row, start, prompt))
        self.unread.put(unread)
        at = torch.tensor(rows, device=self.device)
        self.prompt_lengths[at] = torch.tensor([len(p) for p in prompts], device=self.device)
        self.lengths[at] = torch.tensor(starts, device=self.device)

    def held(self, row: int, prompt: Ids, mix: Shares) -> int:
        """How many of a prompt's tokens the row's cache holds, of those that `read` would read."""
        return common(self.cache.held[row], prompt[:-1]) if self.cache.mixes[row] == mix else 0

    def read(self, *, each: bool = False) -> None:
        """Read the next piece of the prompts of rows that have joined, as much as a forward takes.

        Args:
            each: whether a piece of every prompt is read, in as many forwards as that takes.
        """
        turns = len(self.unread) if each else 1
        while turns > 0 and self.unread:
            turns -= self._read_pieces()

    def _read_pieces(self) -> int:
        """Read a piece of the first prompts that are unread, as many as share a forward.

        Returns:
            How many prompts these are.
        """
        most = max_tokens(self.device)
        now = self.unread.take(most)
        pieces = [x.piece(most) for x in now]
        with self.head.reading(Wanted(logits=False)):
            self._append([x.row for x in now], [x.start for x in now], pieces)
        for x, ids in zip(now, pieces, strict=True):
            self.cache.holds(x.row, x.start, ids)
            x.start += len(ids)
        self.unread.put_back(now)
        return len(now)

    def begin(self, rows: Sequence[int], prompts: Sequence[Ids]) -> None:
        """Let the next step feed these rows, which have read their prompts but for the last tokens,
        those last tokens."""
        at = torch.tensor(rows, device=self.device)
        self.pending[at] = torch.tensor([p[-1] for p in prompts], device=self.device)
        for row in rows:
            self.used[row] = True

    def leave(self, rows: Sequence[int]) -> None:
        """Keep the caches of these rows, which have ended, from growing."""
        for row in rows:
            self.used[row] = False
        self.unread.drop(rows)

    def _append(self, rows: Sequence[int], starts: Sequence[int], ids: Sequence[Ids]) -> Tensor:
        """Feed `ids` to `rows`, and give what the head was asked for.

        Args:
            starts: how many tokens each row has before these, at most.
        """
        counts = torch.tensor([len(x) for x in ids], device=self.device)
        width = max(map(len, ids))  # Shorter rows end in padding, which is never attended to.
        padded = torch.tensor([[*x, *[0] * (width - len(x))] for x in ids], device=self.device)
        at = torch.tensor(rows, device=self.device)
        lengths = self.lengths[at]
        steps = torch.arange(width, device=self.device)
        positions = lengths[:, None] + torch.minimum(steps, counts[:, None] - 1)
        self._make_room(max(starts) + width)
        forward_pass = ForwardPass(self.cache, lengths, at)
        logits = self._run(at, padded, positions, forward_pass)
        self.lengths[at] = lengths + counts
        self.forwards_run += 1
        self.tokens_read += sum(map(len, ids))
        return logits

    def read_at(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        ids: Sequence[Ids],
        counts: Sequence[int],
        *,
        states: bool = False,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Feed the tokens `ids` at the positions from `starts` on, in place of what stood there.

        As many rows share a forward as memory is meant for.

        Args:
            counts: after how many of its last tokens each row's logits are wanted.
            states: whether the hidden states ``[n, tokens, H]`` are wanted in the place of logits.
                Nothing may come after the head.

        Yields:
            Which of `rows` were read, as indices, and their logits ``[n, tokens, V]``. Those of
            rows that want fewer begin with padding; where no row wants any they mean nothing.
        """
        for now in batches(
            Cost([len(x) for x in ids], max_tokens(self.device)),
            Cost(counts, MAX_LOGITS // self.backbone.config.vocab_size),
        ):
            for i in now:
                self.bounds[rows[i]] = starts[i] + len(ids[i])
                self.cache.rewind(rows[i], starts[i])
            at = torch.tensor([rows[i] for i in now], device=self.device)
            self.lengths[at] = torch.tensor([starts[i] for i in now], device=self.device)
            most = max(counts[i] for i in now)
            ends = torch.tensor([len(ids[i]) for i in now], device=self.device)
            last = ends[:, None] - torch.arange(most, 0, -1, device=self.device)
            at_last = Wanted(at=last.clamp(min=0), states=states)
            wanted = at_last if most else Wanted(logits=False)
            with self.head.reading(wanted):
                logits = self._append(
                    [rows[i] for i in now], [starts[i] for i in now], [ids[i] for i in now]
                )
            for i in now:
                self.cache.holds(rows[i], starts[i], ids[i])
            yield now, logits

    def catch_up(
        self, rows: Sequence[int], ids: Sequence[Sequence[int]], columns: Tensor | None
    ) -> Tensor | None:
        """Logits ``[all rows, V]`` after `rows` have read their `ids`; 0 for the other rows.

        With `columns`, the logits of the other columns are 0 too. None if `rows` is empty.
        """
        if not rows:
            return None
        last = torch.tensor([[len(x) - 1] for x in ids], device=self.device)
        with self.head.reading(Wanted(at=last, columns=columns)):
            starts = [self.bounds[r] - len(x) for r, x in zip(rows, ids, strict=True)]
            logits = self._append(rows, starts, ids)[:, 0]
        if len(rows) == len(self.lengths):
            return logits
        found = logits.new_zeros(len(self.lengths), logits.shape[1])
        found[torch.tensor(rows, device=self.device)] = logits
        return found

    def adopt(self, cache: KVCache, rows: Sequence[int]) -> None:
        """Begin with a cache of the same terms: row i with the cache's row ``rows[i]``.

        The cache is written into if its rows are taken as they are; else it is copied.
        """
        same = list(rows) == list(range(cache.rows))
        self.cache = cache if same else cache.take(rows)
        # A row that reads nothing keeps all that it holds: steps write after that.
        self.bounds = [len(tokens) for tokens in self.cache.held]
        self.lengths.copy_(torch.tensor(self.bounds, device=self.device))

    def fork(self, parents: Sequence[int], starts: Tensor | int = 0) -> None:
        """Row i becomes what row ``parents[i]`` is; -1 leaves it as it is.

        The two rows are equal already in their tokens before position `starts`.
        """
        sources = [i if p < 0 else p for i, p in enumerate(parents)]
        source = torch.tensor(sources, device=self.device)
        # A row that has yet to read tokens holds fewer than it has in common with its parent.
        starts = self.lengths.clamp(max=starts)
        self.cache.fork(source, sources, starts, self.lengths[source])
        for state in (self.lengths, self.prompt_lengths, self.pending, self.shares):
            state.copy_(state[source])
        self.bounds = [self.bounds[s] for s in sources]
        self.used = [self.used[s] for s in sources]
