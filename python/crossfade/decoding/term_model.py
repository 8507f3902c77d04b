"""A model of a blend as decoding calls it: its adapter, its device, and the arguments it takes."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..adapters import adapter_layers
from ..blend import Model
from ..terms import text_config, underlying
from .adapters import states
from .inputs import Prompts
from .members import Members
from .replica import Replica

CACHED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}


class TermModel:
    """One model of a blend, ready to be called: its adapter, device and arguments."""

    def __init__(self, model: Any, name: str, adapter: str | None = "active") -> None:
        self.model, self.name = model, name
        self.bare: Any = underlying(model)
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

    @cached_property
    def runs(self) -> Any:
        """What is called: the model, with adapters a replica of it that has this term's on."""
        if not adapter_layers(self.model):
            return self.model
        replica = Replica(self.model)
        for state in self.layers:
            state.apply(replica)
        return replica.model

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
        output = self.runs(
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


def term_models(members: Members) -> list[TermModel]:
    """The models of a call's members."""
    return [
        TermModel(m.model, name, m.adapter if isinstance(m, Model) else "active")
        for m, name in zip(members.all, members.names, strict=True)
    ]
