"""The models that a plan names, once they are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import models
from ..blends.blend import Blend, Model, ValueHead
from ..blends.values import LogRatio, RewardModel, ValueSum
from ..blends.weights import Weight
from ..models import instruct, saved_value_heads
from ..models.hf import check_dtype
from ..specs import Spec
from .formulas import blend_of


@dataclass(frozen=True)
class Loaded:
    """What a `Plan` names: the formula of the blend, its terms, its faders and the value.

    Attributes:
        saved: the blend of a file, whose weights are not rounded as those of a formula may be.
        judge: the blend that judges, of terms without the system prompts of options.
        accept: the value that a correction must raise.
        tilt: of a search.
        draft: the blend that guesses tokens.
        others: the rewards, by name.
        plain: the terms without the system prompts of options.
    """

    formula: str
    terms: Mapping[str, Model | ValueHead]
    faders: Mapping[str, float]
    value: ValueSum | None = None
    saved: Blend | None = None
    judge: Blend | None = None
    accept: ValueSum | None = None
    tilt: LogRatio | None = None
    draft: Blend | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    plain: Mapping[str, Model | ValueHead] = field(default_factory=dict)

    def blend(self, own: Mapping[str, Weight] | None = None) -> Blend:
        """The blend, with some faders at other positions: numbers, or tensors ``[requests]``."""
        if self.saved is not None:  # It has no faders.
            return self.saved
        return blend_of(self.formula, self.terms, {**self.faders, **(own or {})})

    def answers_chats(self, blend: Blend) -> bool:
        """Whether texts are best sent to this blend, of these terms, as chats.

        They are if its first model was tuned to answer chats (see `models.instruct`), and all that
        read the prompts have a chat template.
        """
        first = blend.terms[0]
        readers: list[Any] = [t for t in self.terms.values() if isinstance(t, Model)]
        values = [] if self.value is None else self.value.values
        readers += [v for v in values if isinstance(v, RewardModel)]
        return instruct.is_instruct(first.model, first.tokenizer) and all(
            instruct.has_template(t.tokenizer) for t in readers
        )


def dtype_of(name: str) -> Any:
    check_dtype(name)
    return name if name == "auto" else getattr(torch, name)


def load_terms(path: str, specs: Sequence[Spec], device: str, dtype: str) -> dict[str, Any]:
    """All terms over one model: the model as it is, with adapters, and value heads over it."""
    loaded: Any
    loaded, tokenizer = models.load(models.folder_of(path), device, dtype_of(dtype))
    terms: dict[str, Any] = {}
    heads = [spec for spec in specs if spec.is_value_head]
    for spec in heads:  # before adapters, because PEFT changes the model that it wraps
        head = saved_value_heads.load_value_head(str(spec.guide), loaded)
        terms[spec.name] = ValueHead(head, tokenizer=tokenizer)
    others = [spec for spec in specs if spec not in heads]
    adapters = {spec.name: spec.guide for spec in others if spec.guide is not None}
    if adapters:
        loaded = models.with_adapters(loaded, adapters)
    for spec in others:
        adapter = (spec.name if spec.guide else None) if adapters else "active"
        terms[spec.name] = Model(loaded, tokenizer=tokenizer, adapter=adapter)
    return terms
