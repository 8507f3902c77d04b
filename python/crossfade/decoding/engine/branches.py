"""Texts that begin alike, read without repetition.

Harnesses ask for several responses to one prompt, and give many prompts the same examples to begin
with; judges compare many answers to one context. The engine's caches keep what a row has read, and
copy it to other rows: so each beginning that several prompts share is read once (`tree.py`), and a
prompt once for all its responses, which take turns in the place after it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby, zip_longest

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...models.hf import text_config
from ..simple.term_model import TermModel
from ..stats import ModelStats, summed
from .asked import Asked, Branch, Text
from .batching import Cost, batches
from .head import product
from .options import Engine
from .prefill import over_caches
from .prefix import fingerprints_of
from .runner import EngineRunner
from .tree import Lengths, Node, shared, tree

# The tokens of each model that must be saved for a beginning to be read by a forward of its own: so
# many are read in the time that the weights are.
WORTH = {"cpu": 16, "cuda": 256}
ROWS = 256  # how many prompts are in the caches at a time, at most
# The bytes that the caches of all models may take: so many, or half of what their weights take.
MAX_BYTES = 1 << 30
ROOM = 1.25  # how much longer texts may become until kept caches of full size have too many rows
FEWEST = 32  # how many rows kept caches have at least, if there is memory for them


class Branches:
    """Models that read prompts and responses over caches, whose rows keep what they have read.

    Args:
        kept: whether other prompts will be read later, which may begin like these.

    Attributes:
        notes: of the last reading: what was not as it is meant to be, and why.
    """

    def __init__(self, *, kept: bool = False) -> None:
        self.kept = kept
        self.runner: EngineRunner | None = None
        self.notes: list[str] = []
        self._fingerprints: list[Hashable] = []
        self._done: tuple[ModelStats, ...] = ()  # by runners that are gone
        self._used: list[int] = []  # of each slot, when it was last taken
        self._clock = 0
        self._busy = False

    @torch.no_grad()
    def read(
        self,
        models: Sequence[TermModel],
        asked: Asked,
        most_logits: int,
        max_batch: int | None = None,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        """Read all texts.

        Args:
            max_batch: how many prompts share a forward, at most; None: as many as memory is meant
                for.
            most_logits: how many numbers of logits are given at a time, of all models together,
                unless one request has more. As many are held besides, where requests share them.

        Yields:
            Some requests, in any order, and each model's logits ``[requests, tokens, V]`` before
            each token of their responses, padded on the left.

        Raises:
            Unsupported: the engine cannot run a model.
            ValueError: something else is being read.
        """
        if self._busy:
            raise ValueError(
                "what is kept is in use by a call under way, which writes into it; calls that "
                "share it must take turns"
            )
        self._busy = True
        try:
            yield from self._read(models, asked, most_logits, max_batch)
        finally:
            self._busy = False

    def _read(
        self,
        models: Sequence[TermModel],
        asked: Asked,
        most_logits: int,
        max_batch: int | None,
    ) -> Iterator[tuple[list[int], list[Tensor]]]:
        runner = self._prepared(models, asked, max_batch)
        worth = WORTH.get(runner.device.type, WORTH["cuda"])
        size = min(runner.slots, max_batch or runner.slots)
        order = _order(runner, asked.texts)
        for first in range(0, len(order), size):
            part = order[first : first + size]
            texts = [asked.texts[i] for i in part]
            seats, held = self._seat(runner, texts)
            nodes = tree(texts, held, worth)
            self._read_shared(runner, texts, seats, [n for n in nodes if len(n.texts) > 1])
            starts = [n.start for n in nodes if len(n.texts) == 1]
            waiting = [
                asked.branches(i, seat, start)
                for i, seat, start in zip(part, seats, starts, strict=True)
            ]
            for reading in zip_longest(*waiting):  # one branch of each prompt that has more
                found = [x for x in reading if x is not None]
                for some in _batches(runner, found, most_logits):
                    yield from _of_requests(some, _logits(runner, some), most_logits)

    def free(self) -> None:
        """Forget all that is kept."""
        if self.runner is not None:
            self._done = self.models_stats
            self.runner = None

    @property
    def models_stats(self) -> tuple[ModelStats, ...]:
        """What each model has done so far."""
        now = [] if self.runner is None else self.runner.stats(0, 0)
        return summed([*self._done, *now])

    def _prepared(
        self, models: Sequence[TermModel], asked: Asked, max_batch: int | None
    ) -> EngineRunner:
        """A runner of the models, whose rows are long enough."""
        self.notes = []
        tokens = [n + asked.limit for n in asked.longest]
        each = zip(models, tokens, strict=True)
        bytes_of_a_row = sum(_bytes_of_a_token(model) * n for model, n in each)
        most = max(1, min(ROWS, _memory(models) // bytes_of_a_row))
        prompts = len(asked.texts)
        if (
            self.kept
        ):  # Those of earlier calls are kept as well, but a few take no more than needed.
            slots = min(max(1, int(most / ROOM)), max(FEWEST, 2 * prompts))
        else:
            slots = min(most, prompts, max_batch or most)
        if self.runner is not None:
            if not self._runs(models):
                self.notes.append("a model has changed since it was last asked: it reads anew")
                self.free()
            elif self.runner.slots > most or self.runner.slots < min(slots, prompts):
                self.free()  # Its rows would take too much memory, or are too few.
        if self.runner is None:
            self.runner = EngineRunner(
                models, asked.longest, slots, asked.limit, Engine(), by_states=True
            )
            self._fingerprints = fingerprints_of(self.runner) if self.kept else []
            self._used = [-1] * slots
        self.runner.extend(tokens)
        return self.runner

    def _runs(self, models: Sequence[TermModel]) -> bool:
        """Whether the runner is of these models, as they are now."""
        runner = self.runner
        assert runner is not None
        same = [(m.bare, m.adapter) for m in runner.models] == [(m.bare, m.adapter) for m in models]
        return same and fingerprints_of(runner) == self._fingerprints

    def _seat(self, runner: EngineRunner, texts: Sequence[Text]) -> tuple[list[int], list[Lengths]]:
        """Let each text have a slot, whose rows begin with the most that any slot holds of it.

        Slots that were taken long ago are taken first.

        Returns:
            The slots, and how many tokens of each text their rows hold.
        """
        near = _Nearest(runner)
        nearest = [near.slot(text) for text in texts]
        held = [lengths for _, lengths in nearest]
        free = set(range(runner.slots))
        seats = [-1] * len(texts)
        for i in sorted(range(len(texts)), key=lambda i: -sum(held[i])):
            if any(held[i]) and nearest[i][0] in free:
                seats[i] = nearest[i][0]
                free.remove(seats[i])
        spare = iter(sorted(free, key=lambda s: (self._used[s], s)))
        seats = [next(spare) if seat < 0 else seat for seat in seats]
        self._clock += 1
        for seat in seats:
            self._used[seat] = self._clock
        _begin(runner, seats, [slot for slot, _ in nearest], held)
        return seats, held

    def _read_shared(
        self,
        runner: EngineRunner,
        texts: Sequence[Text],
        seats: Sequence[int],
        nodes: Sequence[Node],
    ) -> None:
        """Read the beginnings that texts share, those of one level together.

        The slot of the first text reads each of them; those of the others get copies.
        """
        by_level = sorted(nodes, key=lambda n: n.level)
        for _, level in groupby(by_level, key=lambda n: n.level):
            now = list(level)
            for group in runner.groups:
                each = [(m, k, n) for m, k in enumerate(group.terms) for n in now]
                rows = [m * runner.slots + seats[n.texts[0]] for m, _, n in each]
                starts = [n.start[k] for _, k, n in each]
                ids = [texts[n.texts[0]][k][n.start[k] : n.end[k]] for _, k, n in each]
                for _ in over_caches(group, rows, starts, ids, [0] * len(rows)):
                    pass  # It gives no logits.
            others = [(i, n) for n in now for i in n.texts[1:]]
            _begin(
                runner,
                [seats[i] for i, _ in others],
                [seats[n.texts[0]] for _, n in others],
                [n.end for _, n in others],
            )


class _Nearest:
    """What the slots of a runner hold, in order, to find what begins most like a text."""

    def __init__(self, runner: EngineRunner) -> None:
        each: list[list[list[int]]] = [[] for _ in range(runner.slots)]
        rows = {
            k: group.cache.held[m * runner.slots : (m + 1) * runner.slots]
            for group in runner.groups
            for m, lane in enumerate(group.lanes)
            for k in lane
        }
        for k in range(len(rows)):
            for slot, held in enumerate(rows[k]):
                each[slot].append(held)
        self.slots = sorted((s for s, held in enumerate(each) if any(held)), key=each.__getitem__)
        self.held = [each[s] for s in self.slots]

    def slot(self, text: Text) -> tuple[int, Lengths]:
        """The slot, and how many tokens of the text each model's row has."""
        at = bisect(self.held, text)  # It is one of the two between which the text would stand.
        beside = [i for i in (at - 1, at) if 0 <= i < len(self.slots)]
        found = [(self.slots[i], shared(self.held[i], text)) for i in beside]
        return max(found, key=lambda x: sum(x[1]), default=(0, (0,) * len(text)))


def _order(runner: EngineRunner, texts: Sequence[Text]) -> range:
    """The places of sorted texts, from that end on of which more is held.

    Where there are few rows, they hold what was read last: the end of what was asked before.
    """
    near, order = _Nearest(runner), range(len(texts))
    first, last = (sum(near.slot(texts[i])[1]) for i in (0, -1))
    return order[::-1] if last > first else order


def _batches(
    runner: EngineRunner, reading: Sequence[Branch], most_logits: int
) -> Iterator[list[Branch]]:
    """Branches whose logits are held at once."""
    columns = sum(m.vocabulary or 1 for m in runner.models)
    counts = [len(branch.ids) + 1 for branch in reading]
    for some in batches(Cost([n * columns for n in counts], most_logits)):
        yield [reading[j] for j in some]


def _logits(runner: EngineRunner, some: Sequence[Branch]) -> list[Tensor]:
    """Each model's logits ``[branches, tokens, V]``, padded on the left."""
    most = max(len(branch.ids) for branch in some) + 1
    found: dict[int, Tensor] = {}
    for group in runner.groups:
        each = [(m, k, branch) for m, k in enumerate(group.terms) for branch in some]
        rows = [m * runner.slots + branch.slot for m, _, branch in each]
        starts = [branch.start[k] for _, k, branch in each]
        ids = [[*branch.prompt[k][branch.start[k] :], *branch.ids] for _, k, branch in each]
        counts = [len(branch.ids) + 1 for _, _, branch in each]
        pieces: list[list[Tensor]] = [[] for _ in each]
        by_states = bool(group.riders)
        for j, z in over_caches(group, rows, starts, ids, counts, states=by_states):
            pieces[j].append(z)
        whole = [torch.cat(z) if len(z) > 1 else z[0] for z in pieces]
        padded = torch.stack([pad(z, (0, 0, most - len(z), 0)) for z in whole])
        of_lanes = padded.unflatten(0, (len(group.terms), -1))
        for lane, z in zip(group.lanes, of_lanes, strict=True):
            for k in lane:
                found[k] = product(group.layer(k), z, group.backbone.backend) if by_states else z
    return [found[k] for k in range(len(runner.models))]


def _of_requests(
    some: Sequence[Branch], logits: list[Tensor], most_logits: int
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The requests of these branches, and for each its branch's logits, so many at a time."""
    each = [(j, i) for j, branch in enumerate(some) for i in branch.requests]
    if len(each) == len(some):
        yield [i for _, i in each], logits
        return
    size = max(1, most_logits // sum(z[0].numel() for z in logits))
    for start in range(0, len(each), size):
        at, requests = zip(*each[start : start + size], strict=True)
        yield [*requests], [z[[*at]] for z in logits]


def _begin(
    runner: EngineRunner, slots: Sequence[int], parents: Sequence[int], lengths: Sequence[Lengths]
) -> None:
    """Let the rows of `slots` hold so many of the first tokens of their parents'."""
    for group in runner.groups:
        each = [
            (m * runner.slots + slot, m * runner.slots + parent, length[k])
            for m, k in enumerate(group.terms)
            for slot, parent, length in zip(slots, parents, lengths, strict=True)
        ]
        if each:
            group.cache.begin(*zip(*each, strict=True))


def _bytes_of_a_token(model: TermModel) -> int:
    """What a token takes in a model's caches, if its layers are as its config says."""
    config = text_config(model.bare)
    layers, heads, hidden = (
        getattr(config, name, None) or 1
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    size = getattr(config, "head_dim", None) or hidden // heads
    own_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * layers * own_heads * size * next(model.bare.parameters()).dtype.itemsize


def _memory(models: Sequence[TermModel]) -> int:
    """The bytes that caches of these models may take."""
    distinct = {id(m.bare): m.bare for m in models}.values()
    return max(MAX_BYTES, sum(p.nbytes for bare in distinct for p in bare.parameters()) // 2)
