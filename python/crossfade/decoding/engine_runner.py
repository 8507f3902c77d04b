"""The engine: every model of a blend in step, over caches whose rows come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..ops import Support
from . import contract
from .deltas import Deltas
from .engine import Engine
from .group import Group
from .guides import LazyGuides
from .inputs import Prompts
from .modules import Unsupported
from .output import ModelStats
from .term_model import TermModel

AHEAD = 256  # new tokens that caches have room for at first


class EngineRunner:
    """All models of a blend, each with `slots` places for rows, which any request can take.

    A prompt is read but for its last token; that is the first one which `step` feeds. So requests
    that join and requests under way are rows of the same step.

    Args:
        models: of the terms, then of the values.
        prompts: what each of them reads, for all requests.
        copies: rows of each request.
        slots: rows decoded at a time.
        limit: new tokens that a row may have.

    Attributes:
        columns: the terms and values that each tensor of logits stands for.
        lazy: runs guides where they have a say; None: all models run at every step.
        notes: what was left out, and why.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        prompts: Sequence[Prompts],
        copies: int,
        slots: int,
        limit: int,
        engine: Engine,
    ) -> None:
        for model, prompt in zip(models, prompts, strict=True):
            model.check(prompt)
        self.models, self.device = tuple(models), models[0].device
        self.copies, self.slots = copies, slots
        self.prompts = [p.unpadded() for p in prompts]
        self.notes: list[str] = []
        self.groups: list[Group] = []
        self.backend = None if engine.kernels else "reference"
        for terms, deltas in self._forwards(engine.share_weights):
            longest = max(len(p) for k in terms for p in self.prompts[k])
            group = Group(
                [models[k] for k in terms],
                terms,
                slots,
                capacity=longest + min(limit, AHEAD),
                most=longest + limit,
                deltas=deltas,
                kernels=engine.kernels,
                compile=engine.compile,
            )
            contract.check(group.models, group.most, deltas, engine.kernels)
            self.groups.append(group)
        self.columns: list[tuple[int, ...]] = [(k,) for k in range(len(models))]
        self.lazy: LazyGuides | None = None

    def share_heads(self, weights: Tensor, why: str | None = None) -> None:
        """Blend hidden states of terms over one model; weights ``[slots, terms]``.

        `why` no head can be shared, whichever it is; None: they can.
        """
        for group in self.groups:
            blended = [k for k in group.terms if k < weights.shape[1]]
            if len(blended) < 2:
                continue
            not_here = why or _why_not_linear(group)
            if blended != list(group.terms):
                not_here = why or "others that are not blended are rows of the same forward"
            if not_here is None:
                group.head.weights = weights
            else:
                self.notes.append(f"a head for each term of {group.name}: {not_here}")
        merged = [g.terms for g in self.groups if g.head.weights is not None]
        alone = [(k,) for g in self.groups if g.head.weights is None for k in g.terms]
        self.columns = sorted([*alone, *merged])

    def rest_guides(
        self, support: Support, vocabulary: int, restrict: bool, skip: bool, why: str | None = None
    ) -> None:
        """Let guides of a support rest, or compute few columns of their heads, where they may.

        `why` they must run in full at every step, whichever they are; None: they need not.
        """
        guides = [g for g in self.groups if support.term not in g.terms]
        if not guides and why is None:
            why = "they are rows of one forward with the support's term"
        if why is not None:
            if len(self.models) > 1:
                self.notes.append(f"guides run in full at every step: {why}")
            return
        self.lazy = LazyGuides(self.groups, support, vocabulary, restrict=restrict, skip=skip)
        for group in guides if restrict else ():
            not_here = _why_not_some_columns(group)
            group.head.some_columns = not_here is None
            if not_here is not None:
                self.notes.append(f"all columns of the head of {group.name}: {not_here}")

    def _forwards(self, share: bool) -> Iterator[tuple[list[int], Deltas | None]]:
        """Which terms are rows of one forward, and how it applies their adapters."""
        together: dict[object, list[int]] = {}
        for k, m in enumerate(self.models):
            together.setdefault(id(m.bare) if share else k, []).append(k)
        for terms in together.values():
            found, why = self._deltas(terms)
            if why is None:
                yield terms, found
                continue
            self.notes.append(f"adapters of {self.models[terms[0]].name} take turns: {why}")
            for adapter in sorted({self.models[k].adapter for k in terms}, key=str):
                same = [k for k in terms if self.models[k].adapter == adapter]
                yield same, self._deltas(same)[0]

    def _deltas(self, terms: Sequence[int]) -> tuple[Deltas | None, str | None]:
        """The adapters of terms over one model, as rows; or why terms must take turns."""
        models = [self.models[k] for k in terms]
        if not any(hasattr(m.model, "peft_config") for m in models):
            return None, None
        try:
            return Deltas(models[0].bare, [m.adapter for m in models], self.backend), None
        except Unsupported as reason:
            several = len({m.adapter for m in models}) > 1
            return None, str(reason) if several else None

    def join(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Rows of the call take slots: their prompts are read, one request's once."""
        first: dict[int, int] = {}
        parents = [-1] * self.slots
        for slot, row in zip(slots, rows, strict=True):
            parents[slot] = first.setdefault(row // self.copies, slot)
        for group in self.groups:
            prompts = {
                m * self.slots + slot: self.prompts[k][request]
                for m, k in enumerate(group.terms)
                for request, slot in first.items()
            }
            group.read(list(prompts), list(prompts.values()))
            if len(first) < len(slots):
                group.fork(self._rows(group, parents))
        if self.lazy is not None:
            self.lazy.join(slots)

    def fork(self, parents: Sequence[int], shared: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is.

        Their caches are equal already in the prompt and the first ``shared[i]`` new tokens.
        """
        for group in self.groups:
            same = torch.tensor(shared, device=group.device).repeat(len(group.terms))
            group.fork(self._rows(group, parents), group.prompts + same)
        if self.lazy is not None:
            self.lazy.fork(parents)

    def _rows(self, group: Group, parents: Sequence[int]) -> list[int]:
        """Slots' parents as those of a group's rows."""
        return [
            p if p < 0 else m * self.slots + p for m in range(len(group.terms)) for p in parents
        ]

    def step(self, tokens: Tensor, live: Tensor) -> list[Tensor]:
        """Logits ``[slots, V]`` for each of `columns`, after one more token ``[slots]``."""
        if self.lazy is not None:
            found = self.lazy.step(tokens, live)
        else:
            found = self._step_all(tokens, live)
        each: dict[tuple[int, ...], Tensor] = {}
        for group, logits in found.items():
            logits = logits.to(self.device)
            if group.head.weights is not None:
                each[group.terms] = logits
            else:
                parts = logits.chunk(len(group.terms))
                each.update(((k,), z) for k, z in zip(group.terms, parts, strict=True))
        return [each[c] for c in self.columns]

    def _step_all(self, tokens: Tensor, live: Tensor) -> dict[Group, Tensor]:
        """Every group's step; in a CUDA graph, each after the first on a stream of its own."""
        first, *others = self.groups
        forked: dict[Group, torch.cuda.Stream] = {}
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            here = torch.cuda.current_stream(self.device)
            forked = {g: torch.cuda.Stream(g.device) for g in others if g.device == self.device}
        found = {}
        for group in others:  # begun first: the largest model is often the first
            with forked_to(forked.get(group)):
                found[group] = group.step(tokens.to(group.device), live.to(group.device))
        found[first] = first.step(tokens.to(first.device), live.to(first.device))
        for stream in forked.values():
            here.wait_stream(stream)
        return found

    def reserve(self) -> bool:
        """The host's part of a step; True if buffers moved, so that a captured step is void."""
        for group in self._stepped:
            group.forwards_run += 1
        moved = [group.reserve() for group in self.groups]
        return any(moved)

    @property
    def _stepped(self) -> list[Group]:
        """Groups that read a token of every row at every step."""
        return self.groups if self.lazy is None else [self.lazy.first]

    def stats(self, drawn: int, rows: int) -> list[ModelStats]:
        """What each model did for `rows` that drew so many tokens in all."""
        return [
            ModelStats(
                tuple(self.models[k].name for k in g.terms),
                g.forwards_run,
                g.tokens_read + (drawn * len(g.terms) if g in self._stepped else 0),
            )
            for g in self.groups
        ]

    @property
    def cache_bytes(self) -> int:
        return sum(g.cache.nbytes for g in self.groups)

    @property
    def peak_bytes(self) -> int:
        return sum(g.cache.peak_bytes for g in self.groups)


@contextmanager
def forked_to(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on a stream that begins where the current one is; the current one for None."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


NOT_PLAIN = "it is not a plain linear layer"


def _why_not_linear(group: Group) -> str | None:
    """Why a model's logits are not one linear map of its hidden states; None if they are."""
    if group.head.module is None:
        return NOT_PLAIN
    if group.head.module.bias is not None:
        return "it has a bias"
    if contract.after(group.models[0]).is_linear:
        return None
    return "what the model makes of its outputs is not linear"


def _why_not_some_columns(group: Group) -> str | None:
    """Why some columns of a model's logits cannot be had without the others; None if they can."""
    if group.head.module is None:
        return NOT_PLAIN
    if contract.after(group.models[0]).keeps_columns_apart:
        return None
    return "what the model makes of its outputs mixes them"
