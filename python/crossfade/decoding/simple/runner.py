"""The simple path: each model goes through the steps of its own `generate`, with its own state.

It is the truth that the engine's tokens are compared with, and runs the models that the engine
cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...blends.mixes import Mix
from ..forms import Ids
from ..inputs import Prompts, left_pad
from ..runner import PromptIds, Shares
from ..stats import ModelStats
from .own_loop import OwnRows, why_alone
from .term_model import TermModel


class CachedTerm:
    """A `TermModel` and its state: it reads prompts, then one more token of each row at a time.

    Rows share a batch where padding leaves each of them as it is alone. Otherwise each row has a
    batch of its own.
    """

    def __init__(self, model: TermModel) -> None:
        self.model = model
        self.batches: list[OwnRows] = []
        self.together = True
        self.forwards = 0
        self.tokens = 0

    def prefill(
        self, prompts: Prompts, limit: int, copies: int = 1, mixes: Tensor | None = None
    ) -> Tensor:
        """Logits after the prompts. Each prompt is read once, and then becomes `copies` rows.

        Args:
            limit: how many new tokens a row may have.
            mixes: of each prompt, as in `TermModel.seat`.
        """
        self.tokens = int(prompts.mask.sum())
        longest = prompts.ids.shape[1] + limit
        self.together = len(prompts.ids) * copies == 1 or why_alone(self.model, longest) is None
        rows = [prompts] if self.together else [left_pad([ids]) for ids in prompts.unpadded()]
        rows = [p.to(self.model.device) for p in rows]
        its = [None] * len(rows) if mixes is None else mixes.split(len(mixes) // len(rows))
        self.batches = [
            OwnRows(self.model, p.ids, p.mask, limit, mix) for p, mix in zip(rows, its, strict=True)
        ]
        logits = self._step([None] * len(rows))
        if copies > 1:
            self.fork(torch.arange(len(logits), device="cpu").repeat_interleave(copies))
            logits = logits.repeat_interleave(copies, 0)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self._step(tokens.to(self.model.device).chunk(len(self.batches)))

    def _step(self, tokens: Sequence[Tensor | None]) -> Tensor:
        self.forwards += len(self.batches)
        each = zip(self.batches, tokens, strict=True)
        return torch.cat([batch.step(new) for batch, new in each])

    def fork(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is."""
        if self.together:
            self.batches[0].select(rows.to(self.model.device))
            return
        taken: set[int] = set()
        batches = []
        for row in rows.tolist():
            batch = self.batches[row]
            batches.append(batch.copy() if row in taken else batch)
            taken.add(row)
        self.batches = batches

    @property
    def cache_bytes(self) -> int:
        return sum(batch.nbytes for batch in self.batches)


class SimpleRunner:
    """All models of a blend, each with a cache, its own prompt and its own padding.

    Terms over one model with one adapter are rows of one batch. Models run as they are: one in
    training mode keeps its dropout, as in Hugging Face. All rows start at once.

    Attributes:
        groups: each model and adapter, with the places of its terms among all models.
    """

    def __init__(self, models: Sequence[TermModel], slots: int) -> None:
        self.models, self.slots = tuple(models), slots
        self.device = models[0].device
        self.models_of_logits = [(k,) for k in range(len(models))]
        self.notes: list[str] = []
        self.heads: tuple[TermModel, ...] = ()
        members: dict[tuple[int, str | Mix | None], list[int]] = {}
        for k, m in enumerate(models):
            members.setdefault((id(m.model), m.adapter), []).append(k)
        self.groups = [(CachedTerm(models[ks[0]]), ks) for ks in members.values()]
        self.started: list[Tensor] | None = None  # the logits after the prompts, for the first step
        self.ready: list[int] = []  # the slots of the rows that have joined, for `read`

    def join(
        self,
        slots: Sequence[int],
        prompts: Sequence[PromptIds],
        limits: Sequence[int],
        mixes: Sequence[Sequence[Shares]] | None = None,
    ) -> None:
        """Read all prompts at once, each one once. Its rows then take their slots."""
        requests: dict[int, tuple[PromptIds, list[int]]] = {}
        for slot, ids in zip(slots, prompts, strict=True):
            requests.setdefault(id(ids), (ids, []))[1].append(slot)
        copies = max(len(its) for _, its in requests.values())
        of_model = [[ids[k] for ids, _ in requests.values()] for k in range(len(self.models))]
        limit = max(limits)
        first = {id(ids): i for i, ids in reversed([*enumerate(prompts)])}
        at = [first[key] for key in requests]
        started = []
        for term, ks in self.groups:
            shares = [None if mixes is None else mixes[i][k] for k in ks for i in at]
            weights = None if shares[0] is None else torch.tensor(shares, device="cpu")
            read = left_pad([ids for k in ks for ids in of_model[k]], 0)
            started.append(term.prefill(read, limit, copies, weights))
        self.started = self._spread(started)
        place = {
            slot: i * copies + j
            for i, (_, its) in enumerate(requests.values())
            for j, slot in enumerate(its)
        }
        source = [place.get(slot, 0) for slot in range(self.slots)]
        count = len(requests) * copies
        if source != list(range(count)):
            self._select(source, count)
            self.started = [z[source] for z in self.started]
        self.ready = list(slots)

    def read(self, *, each: bool = False) -> list[int]:
        ready, self.ready = self.ready, []
        return ready

    def leave(self, slots: Sequence[int]) -> None:
        pass  # All rows end together.

    feeds_some = False

    def held(self, slot: int, prompt_ids: PromptIds, mixes: Sequence[Shares]) -> int:
        return 0  # Every prompt is read from its beginning.

    def holds(self, slot: int, prompt_ids: PromptIds, new: Ids) -> None:
        pass

    def forget(self, slot: int) -> None:
        pass

    def step(self, tokens: Tensor, live: Tensor, slots: Tensor | None = None) -> list[Tensor]:
        """Logits ``[rows, V]`` of each model: the first time after the prompts, and from then on
        after one more token ``[rows]``."""
        if self.started is not None:
            logits, self.started = self.started, None
            return logits
        return self._spread([t.step(tokens.repeat(len(ks))) for t, ks in self.groups])

    def take_back(self, which: Tensor) -> None:
        """Not here, where all rows are at one step: `Driver` refuses what would need it."""
        raise NotImplementedError("the simple path keeps all rows at one step")

    def fork(self, parents: Sequence[int], shared: Sequence[int]) -> None:
        """Row i becomes what row ``parents[i]`` is; -1 leaves it as it is. All is copied, also what
        the two have in common."""
        self._select([i if p < 0 else p for i, p in enumerate(parents)], len(parents))

    def _select(self, source: Sequence[int], count: int) -> None:
        """Row i of each term becomes what that term's row ``source[i]`` is, of `count` rows."""
        rows = torch.tensor(source, device="cpu")
        for term, ks in self.groups:
            term.fork(torch.cat([rows + m * count for m in range(len(ks))]))

    def reserve(self, tokens: int = 1) -> bool:
        return False  # Hugging Face's caches grow by themselves.

    def _spread(self, logits: list[Tensor]) -> list[Tensor]:
        """The logits of each model, on the first one's device, from those of each group."""
        each: dict[int, Tensor] = {}
        for z, (_, ks) in zip(logits, self.groups, strict=True):
            each.update(zip(ks, z.to(self.device).chunk(len(ks)), strict=True))
        return [each[k] for k in range(len(self.models))]

    def values(self, tokens: Tensor, source: Tensor | None = None) -> Tensor | None:
        return None  # Heads are models of their own here.

    def keep(self, counts: Tensor) -> None:
        raise NotImplementedError("rows here have no token that they were fed and do not keep")

    def apart(self, logits: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """As of `Runner`: the logits of each model alone, which a step gives here."""
        return logits

    def stats(self, drawn: int, rows: int) -> list[ModelStats]:
        """What each model did for `rows` that drew so many tokens in all. A row's last token is not
        read."""
        read = max(drawn - rows, 0)
        return [
            ModelStats(
                tuple(self.models[k].name for k in ks), t.forwards, t.tokens + read * len(ks)
            )
            for t, ks in self.groups
        ]

    @property
    def cache_bytes(self) -> int:
        return sum(t.cache_bytes for t, _ in self.groups)

    peak_bytes = cache_bytes
