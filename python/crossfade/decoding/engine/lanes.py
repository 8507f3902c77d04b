"""Which models are rows of one forward, and which of them read the very same rows.

A forward runs one backbone for any number of *lanes*. A lane is a row for each slot, which holds a
text under some adapters. Models over one backbone, such as a policy and the value heads that
`crossfade.models.value_model` makes of it, differ in their heads alone: those that read the same
text with the same adapters share a lane, and each costs the product of its own head with the hidden
states that the lane has anyhow. One with another text, or an adapter of its own, has a lane of its
own in the same forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ...blends.mixes import Mix
from ...models.adapters import active_adapters, adapter_layers
from ...models.after_head import AfterHead, after_head
from ..simple.replica import Replica
from ..simple.structure import remembered, why_as_it_is
from ..simple.term_model import TermModel
from .deltas import Adapted, Deltas
from .head import layer_of
from .modules import Unsupported


class Rider(NamedTuple):
    """A model whose head is a further head of a lane: ``layer(hidden states of the lane)``."""

    model: TermModel
    lane: int
    layer: nn.Module


@dataclass
class Shared:
    """Models whose rows share a forward.

    Attributes:
        places: of each lane, the place of the first model that reads it.
        own: how many of the lanes, from the first on, go through the head of the model that runs.
        riders: the other models, by their places.
    """

    places: list[int]
    own: int
    riders: dict[int, Rider] = field(default_factory=dict)

    def at(self, places: Sequence[int]) -> Shared:
        """The same, where the models have other places: the one at i has ``places[i]``."""
        riders = {places[k]: rider for k, rider in self.riders.items()}
        return Shared([places[k] for k in self.places], self.own, riders)


class Lanes:
    """Lets models share forwards, as far as their backbones, heads and adapters tell.

    Args:
        models: the terms', the values', the references'.
        heads: further models, with places after those of `models`. They ride on lanes where they
            can, and have no forward of their own.
        backend: of `ops.linear`.
        by_states: whether the hidden states of a forward with riders must tell all that its models
            give: `is_product` of each.

    Attributes:
        notes: what cannot share a forward, and why.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        heads: Sequence[TermModel] = (),
        backend: str | None = None,
        *,
        by_states: bool = False,
    ) -> None:
        self.models, self.count = [*models, *heads], len(models)
        self.backend, self.by_states = backend, by_states
        self.notes: list[str] = []

    def apart(self) -> Iterator[tuple[Shared, Deltas | None]]:
        """A forward for each model, and how it applies adapters."""
        for k in range(self.count):
            yield Shared([k], 1), self._deltas([k])[0]

    def together(self) -> Iterator[tuple[Shared, Deltas | None]]:
        """The fewest forwards that the models can share, and how each applies adapters."""
        same: dict[Hashable, list[int]] = {}
        for k, model in enumerate(self.models):
            same.setdefault(model.backbone, []).append(k)
        for places in same.values():
            if places[0] < self.count:
                yield from self._over_one_backbone(places)

    def _over_one_backbone(self, places: Sequence[int]) -> Iterator[tuple[Shared, Deltas | None]]:
        """The forwards of models that have one backbone; the first one's modules are what runs."""
        first = self.models[places[0]]
        own = [k for k in places if k < self.count and self.models[k].bare is first.bare]
        shared = Shared(list(own), len(own))
        others = [k for k in places if k not in own]
        if others and (is_product(first) if self.by_states else _reads_states(first)):
            for k in others:
                self._ride(shared, k)
        deltas, why = self._deltas(shared.places)
        if why is not None and shared.riders:  # Adapters of several models, not all plain LoRA.
            shared = Shared(own, len(own))
            deltas, why = self._deltas(own)
        if why is None:
            yield shared, deltas
        else:
            yield from self._in_turns(own, why)
        left = [k for k in others if k not in shared.riders]
        if left and left[0] < self.count:
            yield from self._over_one_backbone(left)

    def _ride(self, shared: Shared, k: int) -> None:
        """Let a model ride on a lane, if its head can be run by itself."""
        model, lanes = self.models[k], shared.places
        if not is_product(model):
            return
        each = (m for m, p in enumerate(lanes) if same_rows(self.models[p], model))
        lane = next(each, len(lanes))
        if lane == len(lanes):
            if k >= self.count and not any(same_text(self.models[p], model) for p in lanes):
                return  # Only models of the call have prompts of their own.
            lanes.append(k)
        shared.riders[k] = Rider(model, lane, model.bare.get_output_embeddings())

    def _in_turns(self, terms: Sequence[int], why: str) -> Iterator[tuple[Shared, Deltas | None]]:
        """A forward for each adapter of terms over one model, switched on in its modules."""
        self.notes.append(f"adapters of {self.models[terms[0]].name} take turns: {why}")
        for adapter in sorted({self.models[k].adapter for k in terms}, key=str):
            same = [k for k in terms if self.models[k].adapter == adapter]
            yield Shared(same, len(same)), self._deltas(same)[0]

    def _deltas(self, terms: Sequence[int]) -> tuple[Deltas | None, str | None]:
        """The adapters of terms over one backbone, each for its own rows.

        Returns:
            None where the terms have no adapters, or one that can be switched on; and why they
            cannot be rows of one forward, None if they can.

        Raises:
            Unsupported: a term is a mix of adapters, and rows cannot have their own.
        """
        models = [self.models[k] for k in terms]
        if not any(hasattr(m.model, "peft_config") for m in models):
            return None, None
        try:
            return Deltas([Adapted(m.bare, m.adapter) for m in models], self.backend), None
        except Unsupported as reason:
            one_model = len({m.bare for m in models}) == 1
            if one_model and any(isinstance(m.adapter, Mix) for m in models):
                raise
            several = not one_model or len({m.adapter for m in models}) > 1
            return None, str(reason) if several else None


def same_rows(one: TermModel, other: TermModel) -> bool:
    """Whether two models over one backbone read the same text with the same adapters."""
    same = one.bare is other.bare and one.adapter == other.adapter
    return same_text(one, other) and (same or not (_adapts(one) or _adapts(other)))


def same_text(one: TermModel, other: TermModel) -> bool:
    """Whether what two models read of any request is the same: the request as it is, by tokenizers
    that are alike."""
    if not (one.reads_request and other.reads_request):
        return False
    a, b = one.tokenizer, other.tokenizer
    if a is b or a is None or b is None:
        return a is b
    alike = all(
        getattr(a, name, None) == getattr(b, name, None)
        for name in ("chat_template", "special_tokens_map", "added_tokens_decoder")
    )
    cores: list[Any] = [getattr(t, "backend_tokenizer", None) for t in (a, b)]
    return alike and None not in cores and cores[0].to_str() == cores[1].to_str()


def _adapts(model: TermModel) -> bool:
    """Whether a model's layers have adapters that are applied to the rows of its forwards."""
    if model.adapter is None or not adapter_layers(model.bare):
        return False
    return model.adapter != "active" or bool(active_adapters(model.bare))


def is_product(model: TermModel) -> bool:
    """Whether a model's numbers are what its head makes of its hidden states, and nothing else."""
    return _reads_states(model) and after_head_of(model).is_nothing


def _reads_states(model: TermModel) -> bool:
    """Whether a model has a head that can be run by itself, on the states of its backbone."""
    if not hasattr(model.bare, "get_output_embeddings") or why_as_it_is(model.bare):
        return False
    layer = layer_of(model.bare.get_output_embeddings())
    return layer is not None and after_head_of(model).reads == 1


def after_head_of(model: TermModel) -> AfterHead:
    """What comes after a model's head, tried once for as long as the model stays as it is."""
    return remembered(
        model.bare,
        model.structure,
        "after the head",
        lambda: (after_head(Replica(model.bare).model), True),
    )
