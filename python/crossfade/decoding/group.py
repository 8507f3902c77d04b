"""One model of a blend as the engine runs it: all its terms' rows in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..terms import text_config
from .deltas import Deltas
from .head import Head, Wanted, split
from .kv_cache import KVCache
from .modules import Call, Forward, Unsupported, linear_forwards
from .replica import Replica
from .term_model import TermModel

# tokens of prompts in one forward, which bounds the memory of their activations
MAX_TOKENS = {"cpu": 1024, "cuda": 8192}
MAX_LOGITS = 1 << 25  # numbers, where those of every token are wanted
LAYERS = {"full_attention", "sliding_attention"}


class Group:
    """Terms over one model: row ``m * slots + s`` is term m of the request in slot s.

    `lengths` counts, on the device, the tokens that each row has in the cache; the cache says on
    the host which they are, of those that the host knows. A `fresh` row has read its prompt but for
    the last token, which is `pending`.

    Args:
        capacity, most: tokens a row that the caches have room for at first, and ever need.
        deltas: the terms' adapters as rows; None: they have one adapter, which is switched on.
        kernels, compile: as in `Engine`.
        attention: Transformers' name of the function that layers attend by.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        terms: Sequence[int],
        slots: int,
        capacity: int,
        most: int,
        *,
        deltas: Deltas | None = None,
        kernels: bool = True,
        compile: bool = False,
        attention: str = "crossfade",
    ) -> None:
        first = models[0]
        check(first, most)
        self.terms, self.slots, self.name = tuple(terms), slots, first.name
        self.models = tuple(models)
        self.base = first.bare
        self.device = first.device
        self.config = text_config(first.bare)
        native = kernels and self.device.type == "cpu"
        backend = None if kernels else "reference"  # of linear layers
        forwards: dict[Any, Forward] = linear_forwards(self.base) if native else {}
        self.deltas = deltas
        if deltas is not None:
            forwards.update(deltas.forwards)
        body, self.head = split(self.base, terms, backend)
        forwards.update(self.head.forwards)
        replica = Replica(self.base)
        replica.install(forwards)
        for state in first.layers if deltas is None else ():
            state.apply(replica)
        text_config(replica.model)._attn_implementation = attention
        self.body = replica[body]

        rows = slots * len(models)
        self.cache, self.most = KVCache(rows, capacity), most
        # rows that have ended go on to be fed: not past the last position that there is
        context = first.context
        self.last = None if context is None or most < context else context - 1
        self.moved = False  # the caches, since the last step: also when prompts were read
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.prompts = torch.zeros_like(self.lengths)  # tokens of each row's prompt
        self.members = torch.arange(len(models), device=self.device).repeat_interleave(slots)
        self.bounds = [0] * rows  # no row is longer, as far as the host knows
        self.pending = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.fresh = torch.zeros(rows, dtype=torch.bool, device=self.device)
        # a step's forward; no method of this object, which would then hold on to itself
        self.forward = torch.compile(forward, dynamic=False) if compile else forward
        self.forwards_run = 0
        self.tokens_read = 0

    def _run(self, how: Any, member: Tensor, ids: Tensor, positions: Tensor, call: Call) -> Tensor:
        """What is wanted of the logits of rows, each of a member; `how`: a `forward`."""
        if self.deltas is not None:
            self.deltas.seat(member)
        logits = how(self.body, self.head, ids, positions, call)
        if set(self.cache.layers) != set(range(self.config.num_hidden_layers)):
            raise Unsupported("its layers do not all use Transformers' attention interface")
        return logits

    def reserve(self) -> bool:
        """Room for one more token a row; True if the caches moved since the last step.

        The host's part of a step.
        """
        self.bounds = [min(n + 1, self.most) for n in self.bounds]
        self._make_room(max(self.bounds))
        moved, self.moved = self.moved, False
        return moved

    def _make_room(self, capacity: int) -> None:
        self.moved |= self.cache.reserve(capacity, self.most)

    def step(self, tokens: Tensor, live: Tensor) -> Tensor:
        """Logits ``[rows, V]`` after one more token ``[slots]``, which `live` slots keep.

        The device's part: nothing here depends on what the host knows, so it can be captured.
        """
        terms = len(self.terms)
        ids = torch.where(self.fresh, self.pending, tokens.repeat(terms))
        positions = self.lengths if self.last is None else self.lengths.clamp(max=self.last)
        call = Call(self.cache, self.lengths)
        logits = self._run(self.forward, self.members, ids[:, None], positions[:, None], call)
        self.fresh.zero_()
        self.lengths += live.repeat(terms)
        return logits

    def read(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """Make each row's cache that of its prompt, reading what it does not hold already."""
        todo = []
        for row, prompt in zip(rows, prompts, strict=True):
            ids = prompt[:-1]
            start = common(self.cache.held[row], ids)
            self.cache.rewind(row, start)
            self.bounds[row] = len(ids)
            todo.append((row, start, ids[start:]))
        at = torch.tensor(rows, device=self.device)
        self.prompts[at] = torch.tensor([len(p) for p in prompts], device=self.device)
        self.pending[at] = torch.tensor([p[-1] for p in prompts], device=self.device)
        self.fresh[at] = True
        self.lengths[at] = torch.tensor([start for _, start, _ in todo], device=self.device)
        todo = sorted((x for x in todo if x[2]), key=lambda x: len(x[2]), reverse=True)
        while todo:
            count = max(1, MAX_TOKENS.get(self.device.type, MAX_TOKENS["cuda"]) // len(todo[0][2]))
            now, todo = todo[:count], todo[count:]
            with self.head.reading(Wanted(logits=False)):
                self._append([r for r, _, _ in now], [ids for _, _, ids in now])
            for row, start, ids in now:
                self.cache.holds(row, start, ids)

    def _append(self, rows: Sequence[int], ids: Sequence[Sequence[int]]) -> Tensor:
        """What is wanted of the logits after rows read tokens, some more than others."""
        counts = torch.tensor([len(x) for x in ids], device=self.device)
        width = max(map(len, ids))  # the others end in padding that is never attended to
        padded = torch.tensor([[*x, *[0] * (width - len(x))] for x in ids], device=self.device)
        at = torch.tensor(rows, device=self.device)
        lengths = self.lengths[at]
        steps = torch.arange(width, device=self.device)
        positions = lengths[:, None] + torch.minimum(steps, counts[:, None] - 1)
        starts = (self.bounds[r] - len(x) for r, x in zip(rows, ids, strict=True))
        self._make_room(max(starts) + width)
        call = Call(self.cache, lengths, at)
        logits = self._run(forward, self.members[at], padded, positions, call)
        self.lengths[at] = lengths + counts
        self.forwards_run += 1
        self.tokens_read += sum(map(len, ids))
        return logits

    def read_on(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        ids: Sequence[Sequence[int]],
        *,
        every: bool,
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Rows read tokens from slot `starts` on, as many rows at a time as memory allows.

        Yields:
            Which of `rows`, as indices, and their logits: ``[n, tokens, V]`` of every token, the
            shorter rows' padded, or ``[n, V]`` of each one's last.
        """
        order = sorted(range(len(rows)), key=lambda i: len(ids[i]), reverse=True)
        most = MAX_TOKENS.get(self.device.type, MAX_TOKENS["cuda"])
        if every:
            most = min(most, MAX_LOGITS // self.config.vocab_size)
        while order:
            count = max(1, most // len(ids[order[0]]))
            now, order = order[:count], order[count:]
            for i in now:
                self.bounds[rows[i]] = starts[i] + len(ids[i])
                self.cache.rewind(rows[i], starts[i])
            at = torch.tensor([rows[i] for i in now], device=self.device)
            self.lengths[at] = torch.tensor([starts[i] for i in now], device=self.device)
            last = torch.tensor([len(ids[i]) - 1 for i in now], device=self.device)
            with self.head.reading(Wanted(every=True) if every else Wanted(last=last)):
                logits = self._append([rows[i] for i in now], [ids[i] for i in now])
            for i in now:
                self.cache.holds(rows[i], starts[i], ids[i])
            yield now, logits

    def catch_up(
        self, rows: Sequence[int], ids: Sequence[Sequence[int]], columns: Tensor | None
    ) -> Tensor | None:
        """Logits ``[all rows, V]`` after `rows` read what they owe; 0 for the other rows.

        With `columns`, the others of the head are 0 too. None if there are no rows.
        """
        if not rows:
            return None
        last = torch.tensor([len(x) - 1 for x in ids], device=self.device)
        with self.head.reading(Wanted(last=last, columns=columns)):
            logits = self._append(rows, ids)
        if len(rows) == len(self.lengths):
            return logits
        found = logits.new_zeros(len(self.lengths), logits.shape[1])
        found[torch.tensor(rows, device=self.device)] = logits
        return found

    def adopt(self, cache: KVCache, rows: Sequence[int]) -> None:
        """Begin with a cache of the same terms: row i with its row ``rows[i]``."""
        same = list(rows) == list(range(cache.rows))  # then its buffers are written into
        self.cache = cache if same else cache.take(rows)
        # a row that is not read on is left as it is: what a step writes goes behind it
        self.bounds = [len(tokens) for tokens in self.cache.held]
        self.lengths.copy_(torch.tensor(self.bounds, device=self.device))

    def fork(self, parents: Sequence[int], starts: Tensor | int = 0) -> None:
        """Row i becomes what row ``parents[i]`` is, which it is already before slot `starts`.

        -1 leaves a row as it is. A row that owes tokens holds fewer than it has in common.
        """
        sources = [i if p < 0 else p for i, p in enumerate(parents)]
        source = torch.tensor(sources, device=self.device)
        starts = self.lengths.clamp(max=starts)
        self.cache.fork(source, sources, starts, self.lengths[source])
        for state in (self.lengths, self.prompts, self.pending, self.fresh):
            state.copy_(state[source])
        self.bounds = [self.bounds[s] for s in sources]


def forward(body: Any, head: Head, ids: Tensor, positions: Tensor, call: Call) -> Tensor:
    """One forward of a model over the engine's caches: what its head is asked for."""
    output = body(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        return_dict=True,
        logits_to_keep=head.keep,
        crossfade=call,
    )
    return head.logits(output)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:  # the usual case, at C's speed
        return n
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def check(model: TermModel, tokens: int) -> None:
    """Refuse what the engine's caches and attention cannot run on rows of up to so many tokens.

    Raises:
        Unsupported: says why.
    """
    bare: Any = model.bare
    config = text_config(bare)
    if not isinstance(bare, PreTrainedModel):
        raise Unsupported(f"{model.name} is not a model of Transformers")
    if not bare._supports_attention_backend:
        raise Unsupported(f"{model.name} does not use Transformers' attention interface")
    others = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if others or getattr(config, "num_kv_shared_layers", None):
        what = f"layers of type {sorted(others)}" if others else "layers that share their keys"
        raise Unsupported(f"{model.name} has {what}")
    devices = {p.device for p in bare.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise Unsupported(f"{model.name} is offloaded or spread over several devices")
    if why := model.follows_longest(tokens):
        raise Unsupported(why)
