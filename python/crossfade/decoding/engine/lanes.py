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
from ...models.hf import text_config
from ..simple.replica import Replica
from ..simple.structure import remembered, why_as_it_is
from ..simple.term_model import TermModel
from .head import layer_of

# What a config may say of a model's head, which has no part in its backbone.
OF_HEADS = {
    *("tie_word_embeddings", "final_logit_softcapping", "logits_scaling", "num_labels"),
    *("id2label", "label2id", "architectures", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "transformers_version"),
}


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


def forwards(models: Sequence[TermModel], heads: Sequence[TermModel] = ()) -> Iterator[Forward]:
    """The fewest forwards that models can share, as far as their backbones and heads tell.

    Args:
        heads: further models, with places after those of `models`. They ride on lanes where they
            can, and have no forward of their own.
    """
    both, count = [*models, *heads], len(models)
    together: dict[Hashable, list[int]] = {}
    for k, model in enumerate(both):
        together.setdefault(backbone(model.bare), []).append(k)
    for places in together.values():
        if places[0] >= count:
            continue
        first = both[places[0]]
        own = [k for k in places if k < count and both[k].bare is first.bare]
        others = [k for k in places if k not in own]
        found = Forward(own, len(own))
        if others and head_of(first) is not None and after_head_of(first).reads == 1:
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
    layer = head_of(model)
    if layer is None or not _is_head_alone(model):
        return
    lane = next((m for m, p in enumerate(lanes) if same_rows(models[p], model)), len(lanes))
    if lane == len(lanes):
        if k >= count and not any(same_text(models[p], model) for p in lanes):
            return
        lanes.append(k)
    found.riders[k] = Rider(model, lane, layer)


def backbone(bare: Any) -> Hashable:
    """What is equal for two models if their backbones are one: the same weights in the same memory.

    Their modules, configs and adapters may be objects of their own.
    """
    body = getattr(bare, "base_model", bare)
    if body is bare or not hasattr(bare, "config"):
        return id(bare)
    modules = tuple(_modules(body, ""))
    if any(pointer == 0 for _, _, _, weights in modules for _, pointer, *_ in weights):
        return id(bare)  # its numbers are on no device yet, or on none that is known
    config = {k: v for k, v in text_config(bare).to_dict().items() if k not in OF_HEADS}
    return type(bare), modules, repr(sorted(config.items(), key=lambda item: item[0]))


def _modules(module: Any, name: str) -> Iterator[tuple[Any, ...]]:
    """A module and those below it: their names, kinds and weights, beneath what PEFT put there."""
    if hasattr(module, "_active_adapter") and hasattr(module, "base_layer"):
        module = module.base_layer
    weights = tuple(
        (key, p.data_ptr(), p.shape, p.stride(), p.dtype, p.device)
        for key, p in module._parameters.items()
        if p is not None
    )
    yield name, type(module), id(module.__dict__.get("forward")), weights
    for key, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{name}.{key}")


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
    cores = [getattr(t, "backend_tokenizer", None) for t in (a, b)]
    return alike and None not in cores and cores[0].to_str() == cores[1].to_str()


def _adapts(model: TermModel) -> bool:
    """Whether a model's layers have adapters that are applied to the rows of its forwards."""
    if model.adapter is None or not adapter_layers(model.bare):
        return False
    return model.adapter != "active" or bool(active_adapters(model.bare))


def head_of(model: TermModel) -> nn.Module | None:
    """The head of a model, if it can be run by itself; None: the model must run it."""
    if not hasattr(model.bare, "get_output_embeddings") or why_as_it_is(model.bare):
        return None
    return layer_of(model.bare.get_output_embeddings())


def _is_head_alone(model: TermModel) -> bool:
    """Whether a model's numbers are what its head makes of its hidden states, and nothing else."""
    after = after_head_of(model)
    return after.reads == 1 and after.is_nothing


def after_head_of(model: TermModel) -> AfterHead:
    """What comes after a model's head, tried once for as long as the model stays as it is."""
    return remembered(
        model.bare,
        model.structure,
        "after the head",
        lambda: (after_head(Replica(model.bare).model), True),
    )
