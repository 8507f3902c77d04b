"""Which models are rows of one forward, and which of them read the very same rows.

A forward runs one backbone for any number of *lanes*. A lane is a row for each slot, which holds a
text under some adapters. Models over one backbone, such as a policy and the value heads that
`crossfade.models.value_model` makes of it, differ in their heads alone: those that read the same
text with the same adapters share a lane, and each costs the product of its own head with the hidden
states that the lane has anyhow. One with another text, or an adapter of its own, has a lane of its
own in the same forward.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from ...models.adapters import active_adapters, adapter_layers
from ...models.after_head import AfterHead, after_head
from ..simple.replica import Replica
from ..simple.structure import remembered, why_as_it_is
from ..simple.term_model import TermModel
from .head import layer_of


class Rider(NamedTuple):
    """A model whose head is a further head of a lane: ``layer(hidden states of the lane)``."""

    model: TermModel
    lane: int
    layer: nn.Module


@dataclass
class Forward:
    """Models whose rows share a forward.

    Attributes:
        places: of each lane, the place of the first model that reads it.
        own: how many of the lanes, from the first on, go through the head of the model that runs.
        riders: the other models, by their places.
    """

    places: list[int]
    own: int
    riders: dict[int, Rider] = field(default_factory=dict)

    @property
    def members(self) -> list[int]:
        """The places of all models."""
        return sorted({*self.places, *self.riders})


def forwards(
    models: Sequence[TermModel], heads: Sequence[TermModel] = (), *, by_states: bool = False
) -> Iterator[Forward]:
    """The fewest forwards that models can share, as far as their backbones and heads tell.

    Args:
        heads: further models, with places after those of `models`. They ride on lanes where they
            can, and have no forward of their own.
        by_states: whether the hidden states of a forward with riders must tell all that its models
            give: `is_product` of each.
    """
    both, count = [*models, *heads], len(models)
    together: dict[Hashable, list[int]] = {}
    for k, model in enumerate(both):
        together.setdefault(model.backbone, []).append(k)
    for places in together.values():
        if places[0] >= count:
            continue
        first = both[places[0]]
        own = [k for k in places if k < count and both[k].bare is first.bare]
        others = [k for k in places if k not in own]
        found = Forward(own, len(own))
        if others and (is_product(first) if by_states else _reads_states(first)):
            for k in others:
                _ride(found, both, k, count)
        yield found
        yield from by_model(models, [k for k in others if k < count and k not in found.riders])


def by_model(models: Sequence[TermModel], places: Iterable[int]) -> Iterator[Forward]:
    """A forward for each model object among those at some places."""
    together: dict[int, list[int]] = {}
    for k in places:
        together.setdefault(id(models[k].bare), []).append(k)
    for own in together.values():
        yield Forward(own, len(own))


def _ride(found: Forward, models: Sequence[TermModel], k: int, count: int) -> None:
    """Let a model ride on a lane, if its head can be run by itself.

    Args:
        k: the model's place; from `count` on, one whose text another must read as well.
    """
    model, lanes = models[k], found.places
    if not is_product(model):
        return
    lane = next((m for m, p in enumerate(lanes) if same_rows(models[p], model)), len(lanes))
    if lane == len(lanes):
        if k >= count and not any(same_text(models[p], model) for p in lanes):
            return
        lanes.append(k)
    found.riders[k] = Rider(model, lane, model.bare.get_output_embeddings())


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
