"""The engine: every model of a blend in step, over caches whose rows come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...blends.blend import Blend
from ...models.value_heads import token_values
from ...ops.check import Weights
from ..forms import Ids
from ..ranks import Shard
from ..runner import PromptIds, Shares
from ..simple.term_model import TermModel
from ..stats import ModelStats
from . import contract
from .drafting import Guessers
from .fitting import Fitting
from .group import Group
from .grouping import Grouping
from .lanes import Lanes, after_head_of, same_text
from .modules import Unsupported
from .options import Engine
from .plan import All, Plan, logits_of


class EngineRunner:
    """All models of a blend, each with `slots` places for rows, which any request can take.

    `read` reads all of a prompt except its last token, which the row's first `step` feeds. So
    requests that join and requests under way are rows of the same step.

    Args:
        models: the terms', the values', then the references'.
        longest: tokens of the longest prompt that each model will read, as far as it is known.
        slots: rows decoded at a time.
        limit: new tokens that a row may have, as far as it is known.
        heads: value models that are asked about the tokens that are drawn, where that takes no
            forward but those of `models`.
        by_states: as of `Lanes`, for whoever reads by `Group.read_at`.
        draft: which of the models guess tokens; there are no `heads` then.

    Attributes:
        groups: of the models that decide which tokens are drawn.
        drafting: the models that guess; None if there are none.
        heads: those of the given ones for which that is so: they ride on lanes of the groups.
        models_of_logits, plan, shard: as of `Fitting`.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        longest: Sequence[int],
        slots: int,
        limit: int,
        engine: Engine,
        heads: Sequence[TermModel] = (),
        *,
        by_states: bool = False,
        draft: Guessers | None = None,
    ) -> None:
        self.models, self.device = tuple(models), models[0].device
        self.slots, self.engine = slots, engine
        self.backend = None if engine.kernels else "reference"
        self._members = (*models, *heads)
        # The model whose prompts each of these reads: itself, or one that reads the same.
        self._texts = list(range(len(models)))
        self._texts += [
            next((k for k, m in enumerate(models) if same_text(m, head)), -1) for head in heads
        ]
        judges = models if draft is None else models[: draft.first]
        lanes = Lanes(judges, heads, self.backend, by_states=by_states)
        rows = [longest[k] for k in self._texts]
        grouping = Grouping(self._members, rows, slots, limit, engine, len(models))
        self.groups = grouping.groups(lanes)
        self.drafting = None if draft is None else grouping.drafting(self.groups, draft)
        self._left_out = grouping.notes
        self._riding = [
            (g, k)
            for k in range(len(models), len(self._members))
            for g in self.groups
            if k in g.riders
        ]
        self.heads = tuple(self._members[k] for _, k in self._riding)
        self.fitting = Fitting(self.groups, len(judges), engine)
        self.joining: list[Joining] = []

    @property
    def _all_groups(self) -> list[Group]:
        """Those that decide, and those that only guess."""
        drafting = self.drafting
        return [*self.groups, *(() if drafting is None or drafting.shared else drafting.groups)]

    @property
    def notes(self) -> list[str]:
        """What was left out so far, and why."""
        of_groups = [f"{g.name}: {note}" for g in self._all_groups for note in g.backbone.notes]
        return [*self._left_out, *self.fitting.notes, *of_groups]

    def fit(
        self,
        blend: Blend,
        weights: Weights,
        vocabulary: int,
        why_each_term: str | None,
        *,
        why_whole: str | None = None,
        drafts: bool = False,
    ) -> None:
        """Leave out what this blend does not need, as far as the options of the engine allow.

        Args:
            weights: of the blend's terms: numbers, or ``[slots, terms]``.
            vocabulary: how many columns of the logits count.
            why_each_term: why all logits of every term are needed; None if they are not.
            why_whole: why whole rows of logits are needed; None if heads may stay in shards.
            drafts: whether steps check guesses, several tokens a row.
        """
        w = torch.as_tensor(weights, dtype=torch.float32, device=self.device)
        w = w if w.dim() == 2 else w.expand(self.slots, -1)
        self.fitting.fit(blend, w, vocabulary, why_each_term, why_whole, drafts=drafts)

    @property
    def plan(self) -> Plan:
        return self.fitting.plan

    @property
    def models_of_logits(self) -> list[tuple[int, ...]]:
        return self.fitting.models_of_logits

    @property
    def shard(self) -> Shard | None:
        return self.fitting.shard

    def join(
        self,
        slots: Sequence[int],
        prompts: Sequence[PromptIds],
        limits: Sequence[int],
        mixes: Sequence[Sequence[Shares]] | None = None,
    ) -> None:
        """As of `Runner`: let rows take slots, whose prompts `read` reads."""
        several: dict[int, Joining] = {}
        own = [[None] * len(self.models)] * len(slots) if mixes is None else mixes
        for slot, ids, mix in zip(slots, prompts, own, strict=True):
            several.setdefault(id(ids), Joining(ids, mix, [])).slots.append(slot)
        new = list(several.values())
        self._check_texts(new)
        each = list(zip(prompts, limits, strict=True))
        self.extend([max(len(p[k]) + n for p, n in each) for k in range(len(self.models))])
        for group in self._all_groups:
            mixed = [j.mixes[k] if k < len(j.mixes) else None for k in group.terms for j in new]
            group.join(*self._first_rows(group, new), mixed)
        self.joining += new

    def _check_texts(self, joining: Sequence[Joining]) -> None:
        """Refuse rows whose models on one lane read different prompts.

        Raises:
            Unsupported: names the models.
        """
        for group in self._all_groups:
            for k, rider in group.riders.items():
                other = group.terms[rider.lane]
                if max(k, other) < len(self.models) and any(
                    list(j.prompt_ids[k]) != list(j.prompt_ids[other]) for j in joining
                ):
                    names = f"{rider.model.name} and {self.models[other].name}"
                    raise Unsupported(f"{names} read a request in different tokens")

    def extend(self, longest: Sequence[int]) -> None:
        """Let rows of each model have so many tokens.

        Raises:
            Unsupported: the engine cannot run a model on rows of that length.
        """
        for group in self._all_groups:
            most = max(longest[self._texts[k]] for k in group.terms)
            if most > group.most:
                group.extend(most)
                contract.check(group, self.engine.kernels)

    def read(self, *, each: bool = False) -> list[int]:
        """As of `Runner`: every model reads on in the prompts of rows that joined."""
        unread = set()
        for group in self._all_groups:
            group.read(each=each)
            unread |= {row % self.slots for row in group.unread.rows}
        ready = [j for j in self.joining if j.slots[0] not in unread]
        if not ready:
            return []
        self.joining = [j for j in self.joining if j.slots[0] in unread]
        # Slots that share a prompt become what the one that read it is.
        parents = [-1] * self.slots
        for j in ready:
            for slot in j.slots:
                parents[slot] = j.slots[0]
        slots = [slot for j in ready for slot in j.slots]
        for group in self._all_groups:
            group.begin(*self._first_rows(group, ready))
            if len(slots) > len(ready):
                group.fork(self._rows(group, parents))
        self.plan.join(slots)
        return slots

    def leave(self, slots: Sequence[int]) -> None:
        """As of `Runner`: let rows give up their slots."""
        self.joining = [j for j in self.joining if j.slots[0] not in slots]
        for group in self._all_groups:
            group.leave([m * self.slots + s for m in range(len(group.terms)) for s in slots])

    def fork(self, parents: Sequence[int], shared: Sequence[int]) -> None:
        """As of `Runner`: slot i becomes what slot ``parents[i]`` is."""
        for group in self._all_groups:
            same = torch.tensor(shared, device=group.device).repeat(len(group.terms))
            group.fork(self._rows(group, parents), group.prompt_lengths + same)
        self.plan.fork(parents)

    def _first_rows(self, group: Group, joining: Sequence[Joining]) -> tuple[list[int], list[Ids]]:
        """A group's rows in the first slot of each of `joining`, and what they read."""
        each = [(m, k, j) for m, k in enumerate(group.terms) for j in joining]
        return [m * self.slots + j.slots[0] for m, _, j in each], [
            j.prompt_ids[self._texts[k]] for _, k, j in each
        ]

    def _rows(self, group: Group, parents: Sequence[int]) -> list[int]:
        """The parents of a group's rows, where slots have these parents."""
        return [
            p if p < 0 else m * self.slots + p for m in range(len(group.terms)) for p in parents
        ]

    @property
    def feeds_some(self) -> bool:
        """As of `Runner`. On a GPU steps are captured, which have one shape."""
        plain = all(g.device.type == "cpu" and not g.riders for g in self.groups)
        return plain and isinstance(self.plan, All) and not self.engine.compile

    def step(self, tokens: Tensor, live: Tensor, slots: Tensor | None = None) -> list[Tensor]:
        """Logits ``[slots, V]`` of each of `models_of_logits`, after one more token ``[slots]``."""
        return self._logits(self.plan.step(tokens, live, slots))

    def held(self, slot: int, prompt_ids: PromptIds, mixes: Sequence[Shares]) -> int:
        """As of `Runner`: how many tokens of a prompt need not be read in a slot."""
        found = 0
        for group in self.groups:
            for m, k in enumerate(group.terms):
                row, mix = m * self.slots + slot, mixes[k] if k < len(mixes) else None
                found += group.held(row, prompt_ids[self._texts[k]], mix)
        return found

    def holds(self, slot: int, prompt_ids: PromptIds, new: Ids) -> None:
        """As of `Runner`: what a row that leaves has written stays in its slot's caches."""
        for group in self.groups:
            for m, k in enumerate(group.terms):
                prompt, row = prompt_ids[self._texts[k]], m * self.slots + slot
                if new:  # The last token was drawn, and not fed.
                    group.cache.holds(row, len(prompt) - 1, [prompt[-1], *new[:-1]])

    def forget(self, slot: int) -> None:
        """As of `Runner`: what a slot's caches hold is of no use to the next row."""
        for group in self._all_groups:
            for m in range(len(group.terms)):
                group.cache.rewind(m * self.slots + slot, 0)

    def verify(self, tokens: Tensor, known: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Logits ``[slots, n, V]`` of each of `models_of_logits` after each of the next tokens.

        Rows keep of ``tokens [slots, n]`` what `keep` says.

        Args:
            known: ``[slots, V]`` after each token, of the term that guessed and has read them.
        """
        found: dict[Group, Tensor] = {}
        for group in self.groups:
            if known is not None and self.drafting is not None and group in self.drafting.groups:
                found[group] = torch.stack([*known], dim=1)
            else:
                found[group] = group.feed(tokens.to(group.device))
        return self._logits(found)

    def _logits(self, found: Mapping[Group, Tensor]) -> list[Tensor]:
        """The logits of each of `models_of_logits`, of those that groups gave."""
        each = logits_of(found, self.device, len(self.models))
        return [each[c] for c in self.models_of_logits]

    def values(self, tokens: Tensor, source: Tensor | None = None) -> Tensor | None:
        """As of `Runner`: what `heads` say, from the hidden states of the last step."""
        if not self._riding:
            return None
        found = []
        for group, k in self._riding:
            rider = group.riders[k]
            states = group.states(rider.lane)[:, -1]
            states = states if source is None else states[source.to(group.device)]
            drawn = tokens.clamp(min=0).to(group.device)
            found.append(token_values(rider.layer, states, drawn).to(self.device))
        return torch.stack(found, dim=1)

    def keep(self, counts: Tensor) -> None:
        """As of `Runner`: let rows keep so many of the tokens that they were last fed."""
        for group in self.groups:
            group.keep(counts)

    def take_back(self, which: Tensor) -> None:
        """As of `Runner`: rows forget the token that the last step fed them."""
        self.plan.take_back(which)

    def apart(self, logits: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """As of `Runner`: the logits of each model alone. A shared head is run again, for each."""
        each: dict[int, Tensor] = {}
        for models, z in zip(self.models_of_logits, logits, strict=True):
            if len(models) == 1:
                each[models[0]] = z
        for group in self.groups:
            if group.head.weights is None:
                continue
            plain = after_head_of(group.models[0]).is_nothing
            alone = group.head.of_each() if plain else None
            if alone is None:
                return None
            own = group.terms[: group.own]
            each.update(zip(own, alone[:, 0].to(self.device).chunk(len(own)), strict=True))
        return [each[k] for k in sorted(each)]

    def reserve(self, tokens: int = 1) -> bool:
        """The host's part of a step; True if buffers moved, so that a captured step is void."""
        for group in self.plan.stepped:
            guesses = self.drafting is not None and group in self.drafting.groups
            group.forwards_run += not (guesses and tokens > 1)  # It has read what it guessed.
        moved = [group.reserve(tokens) for group in self.groups]
        return any(moved)

    def stats(self, drawn: int, rows: int) -> list[ModelStats]:
        """What each model did for `rows` that drew so many tokens in all."""
        return [
            ModelStats(
                tuple(self._members[k].name for k in sorted({*g.terms, *g.riders})),
                g.forwards_run,
                g.tokens_read + (drawn * len(g.terms) if g in self.plan.stepped else 0),
            )
            for g in self._all_groups
        ]

    @property
    def cache_bytes(self) -> int:
        return sum(g.cache.nbytes for g in self._all_groups)

    @property
    def peak_bytes(self) -> int:
        return sum(g.cache.peak_bytes for g in self._all_groups)


@dataclass
class Joining:
    """Slots whose rows read the same prompt: the first one reads it, the others fork from it."""

    prompt_ids: PromptIds
    mixes: Sequence[Shares]
    slots: list[int]
