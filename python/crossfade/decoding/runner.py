"""The models of a blend, run in step: the seam between what is decoded and how models are run.

The loop knows a runner by `prefill`, `step`, `stats` and `cache_bytes` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

from ..blend import Blend
from ..terms import text_config, underlying
from .adapters import states, switched
from .inputs import Prompts
from .output import ModelStats

CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class TermModel:
    """One model of a blend, ready to be called: its adapter, device and arguments."""

    def __init__(self, model: Any, name: str, adapter: str | None = "active") -> None:
        self.model, self.name = model, name
        self.bare = underlying(model)
        self.adapter = adapter
        self.layers = states(model, adapter, name)
        parameters = inspect.signature(self.bare.forward).parameters
        self.accepts = set(parameters)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not isinstance(
            self.bare, PreTrainedModel
        ):  # a module of the user's own that hands its arguments on
            self.accepts |= {"attention_mask", "position_ids"}
        self.device: torch.device = next(self.bare.parameters()).device
        self.vocabulary: int | None = getattr(text_config(self.bare), "vocab_size", None)

    def new_cache(self) -> DynamicCache:
        config = text_config(self.bare)
        others = set(getattr(config, "layer_types", None) or ()) - CACHED_LAYERS
        if others:
            raise NotImplementedError(
                f"{self.name} has layers of type {sorted(others)}; those supported are "
                f"{sorted(CACHED_LAYERS)}"
            )
        # a value head's config may be its own: then all its layers are plain
        return DynamicCache(config=config if hasattr(config, "get_text_config") else None)

    def check(self, prompts: Prompts) -> None:
        """Ids that the model has no embedding for, which a GPU would answer with an abort."""
        if self.vocabulary is None:
            return
        outside = (prompts.ids < 0) | (prompts.ids >= self.vocabulary)
        outside &= prompts.mask.bool()
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"the prompt of row {row} has id {int(prompts.ids[row, column])} for {self.name}; "
                f"ids must be within [0, {self.vocabulary})"
            )

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        cache: DynamicCache | None,
        keep: int = 1,
    ) -> Tensor:
        """Logits ``[rows, keep, V]`` of the last `keep` positions."""
        if mask is not None and "attention_mask" not in self.accepts:
            raise NotImplementedError(
                f"{self.name} ({type(self.bare).__name__}) takes no attention_mask; without one, "
                "prompts must have one length"
            )
        arguments: dict[str, Any] = {"attention_mask": mask, "position_ids": positions}
        arguments |= {"logits_to_keep": keep}
        arguments = {k: v for k, v in arguments.items() if k in self.accepts}
        with switched(self.layers):
            output = self.model(
                input_ids=ids,
                past_key_values=cache,
                use_cache=cache is not None,
                return_dict=True,
                **arguments,
            )
        return output.logits[:, -keep:]


def positions_of(mask: Tensor) -> Tensor:
    """Positions of tokens, counted without padding, as Hugging Face counts them."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


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

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        self.forwards += 1
        return self.model.forward(ids, self.mask, positions, self.cache)[:, -1]

    @property
    def cache_bytes(self) -> int:
        layers = self.cache.layers
        tensors = [getattr(x, name, None) for x in layers for name in ("keys", "values")]
        return sum(t.nbytes for t in tensors if t is not None)


class Runner:
    """All models of a blend, each with a cache, its own prompt and its own padding.

    Terms over one model with one adapter are rows of one batch, so that its weights are read once
    for all of them. Models run as they are: one in training mode keeps its dropout, as in Hugging
    Face.
    """

    def __init__(self, blend: Blend) -> None:
        self.models = term_models(blend)
        self.device = self.models[0].device
        self.groups: list[tuple[CachedTerm, list[int]]] = []
        members: dict[tuple[int, str | None], list[int]] = {}
        for k, m in enumerate(self.models):
            members.setdefault((id(m.model), m.adapter), []).append(k)
        for ks in members.values():
            self.groups.append((CachedTerm(self.models[ks[0]]), ks))

    def prefill(self, prompts: Sequence[Prompts], copies: int = 1) -> list[Tensor]:
        """Logits ``[rows, V_k]`` after the prompts, one a term and then one a value.

        A prompt is read once and then is `copies` rows.
        """
        for model, prompt in zip(self.models, prompts, strict=True):
            model.check(prompt)
        return self._spread(
            [t.prefill(stack([prompts[k] for k in ks]), copies) for t, ks in self.groups]
        )

    def step(self, tokens: Tensor) -> list[Tensor]:
        """Logits after one more token ``[rows]``, the same for all terms."""
        return self._spread([t.step(tokens.repeat(len(ks))) for t, ks in self.groups])

    def _spread(self, logits: list[Tensor]) -> list[Tensor]:
        """From one a group to one a term, on the first term's device."""
        each: dict[int, Tensor] = {}
        for z, (_, ks) in zip(logits, self.groups, strict=True):
            each.update(zip(ks, z.to(self.device).chunk(len(ks)), strict=True))
        return [each[k] for k in range(len(self.models))]

    def stats(self, read: int) -> tuple[ModelStats, ...]:
        """What each model did; `read`: tokens that every term read after its prompts."""
        return tuple(
            ModelStats(
                tuple(self.models[k].name for k in ks), t.forwards, t.tokens + read * len(ks)
            )
            for t, ks in self.groups
        )

    @property
    def cache_bytes(self) -> int:
        return sum(t.cache_bytes for t, _ in self.groups)


def stack(prompts: Sequence[Prompts]) -> Prompts:
    """Prompts of several terms as rows of one batch, padded on the left to one length."""
    if len(prompts) == 1:
        return prompts[0]
    width = max(p.ids.shape[1] for p in prompts)
    device = prompts[0].ids.device

    def rows(tensors: list[Tensor]) -> Tensor:
        return torch.cat([pad(t.to(device), (width - t.shape[1], 0)) for t in tensors])

    return Prompts(rows([p.ids for p in prompts]), rows([p.mask for p in prompts]))


def term_models(blend: Blend) -> list[TermModel]:
    """The models of a blend's terms, then of its values."""
    return [
        *(TermModel(t.model, n, t.adapter) for t, n in zip(blend.terms, blend.names, strict=True)),
        *(TermModel(v.model, n) for v, n in zip(blend.values, blend.value_names, strict=True)),
    ]
