"""The simple path: every model as Hugging Face runs it, with its own modules and cache.

It is the truth that the engine's tokens are compared with, and runs what the engine cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .inputs import Prompts
from .output import ModelStats
from .term_model import TermModel, positions_of


class CachedTerm:
    """A `TermModel` with its cache: reads a prompt, then a token of each row at a time."""

    def __init__(self, model: TermModel) -> None:
        self.model = model
        self.cache = model.new_cache()
        self.forwards = 0
        self.tokens = 0
        self.mask: Tensor | None = None
        self.positions: Tensor

    def prefill(self, prompts: Prompts, copies: int = 1) -> Tensor:
        self.tokens = int(prompts.mask.sum())
        prompts = prompts.to(self.model.device)
        ids = prompts.ids.masked_fill(prompts.mask == 0, 0)  # padding may be another vocabulary's
        positions = positions_of(prompts.mask)
        self.positions = positions[:, -1:]
        # no mask where nothing is padded, as Hugging Face does: attention has faster ways then
        self.mask = None if prompts.mask.all() else prompts.mask
        logits = self._forward(ids, positions)
        if self.cache.get_seq_length() != ids.shape[1]:
            raise NotImplementedError(
                f"{self.model.name} ({type(self.model.bare).__name__}) does not fill a "
                "DynamicCache; models with another kind of state are not supported"
            )
        if copies > 1:  # a prompt is read once, however many samples continue it
            self.cache.batch_repeat_interleave(copies)
            self.positions = self.positions.repeat_interleave(copies, 0)
            self.mask = None if self.mask is None else self.mask.repeat_interleave(copies, 0)
            logits = logits.repeat_interleave(copies, 0)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        self.positions = self.positions + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens.to(self.model.device)[:, None], self.positions)

    def fork(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is."""
        rows = rows.to(self.model.device)
        self.cache.batch_select_indices(rows)
        self.positions = self.positions[rows]
        self.mask = None if self.mask is None else self.mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.forwards += 1
        return self.model.forward(ids, self.mask, positions, self.cache)[:, -1]

    @property
    def cache_bytes(self) -> int:
        layers = self.cache.layers
        tensors = [getattr(x, name, None) for x in layers for name in ("keys", "values")]
        return sum(t.nbytes for t in tensors if t is not None)


class SimpleRunner:
    """All models of a blend, each with a cache, its own prompt and its own padding.

    Terms over one model with one adapter are rows of one batch. Models run as they are: one in
    training mode keeps its dropout, as in Hugging Face. All rows start at once.
    """

    def __init__(
        self, models: Sequence[TermModel], prompts: Sequence[Prompts], copies: int
    ) -> None:
        for model, prompt in zip(models, prompts, strict=True):
            model.check(prompt)
        self.models, self.prompts, self.copies = tuple(models), prompts, copies
        self.device = models[0].device
        self.columns = [(k,) for k in range(len(models))]
        members: dict[tuple[int, str | None], list[int]] = {}
        for k, m in enumerate(models):
            members.setdefault((id(m.model), m.adapter), []).append(k)
        self.groups = [(CachedTerm(models[ks[0]]), ks) for ks in members.values()]
        self.started: list[Tensor] | None = None  # logits after the prompts

    def join(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Reads all prompts: each once, and then it is `copies` rows."""
        requests = sorted({row // self.copies for row in rows})
        prompts = [Prompts(p.ids[requests], p.mask[requests]) for p in self.prompts]
        self.started = self._spread(
            [t.prefill(stack([prompts[k] for k in ks]), self.copies) for t, ks in self.groups]
        )

    def step(self, tokens: Tensor, live: Tensor) -> list[Tensor]:
        """Logits ``[rows, V]``, one a term and then one a value: after the prompts, at first, and
        then after one more token ``[rows]``."""
        if self.started is not None:
            logits, self.started = self.started, None
            return logits
        return self._spread([t.step(tokens.repeat(len(ks))) for t, ks in self.groups])

    def fork(self, parents: Sequence[int], shared: Sequence[int]) -> None:
        """Row i becomes what row ``parents[i]`` is, in all of its cache; -1 leaves it as it is."""
        source = torch.tensor([i if p < 0 else p for i, p in enumerate(parents)], device="cpu")
        for term, ks in self.groups:
            term.fork(torch.cat([source + m * len(source) for m in range(len(ks))]))

    def reserve(self) -> bool:
        return False  # caches grow by themselves

    def _spread(self, logits: list[Tensor]) -> list[Tensor]:
        """From one a group to one a term, on the first term's device."""
        each: dict[int, Tensor] = {}
        for z, (_, ks) in zip(logits, self.groups, strict=True):
            each.update(zip(ks, z.to(self.device).chunk(len(ks)), strict=True))
        return [each[k] for k in range(len(self.models))]

    def stats(self, drawn: int, rows: int) -> list[ModelStats]:
        """What each model did for `rows` that drew so many tokens in all: it read all but the last
        one of each."""
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


def stack(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of several terms as rows of one batch, padded on the left to one length."""
    if len(prompts) == 1:
        return prompts[0]
    width = max(p.ids.shape[1] for p in prompts)
    device = prompts[0].ids.device

    def rows(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad(t.to(device), (width - t.shape[1], 0)) for t in tensors])

    return Prompts(rows([p.ids for p in prompts]), rows([p.mask for p in prompts]))
