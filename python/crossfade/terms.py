"""What a term needs to know of the model under it: that it can be one, its name and its cost."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn


def is_peft(model: Any) -> bool:
    """Whether this is a `peft.PeftModel` or a mixed one, asked without importing peft."""
    return all(hasattr(model, name) for name in ("peft_config", "disable_adapter"))


def underlying(model: Any) -> nn.Module:
    """The Hugging Face model inside a PEFT model, or the model itself."""
    while is_peft(model):
        own = hasattr(model, "get_base_model")  # a PeftMixedModel has none
        model = model.get_base_model() if own else model.base_model.model
    return model


def text_config(model: Any) -> Any:
    """The config of the text decoder, which a multimodal model has inside its own."""
    config = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def is_multimodal(model: Any) -> bool:
    """Whether the text decoder is one part of a model that reads pictures or sounds as well."""
    config = getattr(underlying(model), "config", None)
    return config is not None and text_config(underlying(model)) is not config


def check_language_model(model: Any, *, head: bool) -> None:
    """Refuse what cannot be decoded. `head`: it must have a language modelling head."""
    kind = type(model).__name__
    if (
        not isinstance(model, nn.Module)
        or getattr(model, "config", None) is None
        or type(model).forward is nn.Module.forward
    ):
        raise TypeError(
            f"model is a {kind}; it must be a loaded Hugging Face model: an nn.Module with a "
            "config and a forward"
        )
    base = underlying(model)
    if getattr(base.config, "is_encoder_decoder", False):
        raise NotImplementedError(f"model is a {kind}, an encoder-decoder; not supported yet")
    can_generate = getattr(base, "can_generate", None)
    if head and can_generate is not None and not can_generate():
        raise TypeError(
            f"model is a {kind}, which has no language modelling head; it must be a causal LM, as "
            "AutoModelForCausalLM loads it"
        )


def check_name(name: Any) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; it must be a str or None")
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise ValueError(f"name is {name!r}; it must be an identifier, as formulas need it")


def default_name(model: Any, adapter: str | None, otherwise: str) -> str:
    """The adapter's name or the last part of the model's path, as an identifier."""
    path = str(getattr(model.config, "name_or_path", "") or "")
    source = adapter if adapter not in (None, "active") else path.rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"\W+", "_", str(source)).strip("_")
    if name[:1].isdigit():
        name = f"_{name}"
    return name if name.isidentifier() and not keyword.iskeyword(name) else otherwise


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, those that stood before with a number behind them."""
    found: list[str] = []
    for i, name in enumerate(names):
        same = (name, *(f"{name}_{n}" for n in range(2, i + 2)))
        found.append(next(n for n in same if n not in found))
    return tuple(found)


class ModelCost(NamedTuple):
    """What one underlying model adds to a blend's cost.

    Attributes:
        names: the terms and values that it computes.
        kind: its class.
        forwards: rows it computes for each token of a request, one a term.
        parameters: all it holds, adapters too; what models share is counted once, at the first.
        bytes: of these parameters.
    """

    names: tuple[str, ...]
    kind: str
    forwards: int
    parameters: int
    bytes: int

    def __str__(self) -> str:
        return f"{', '.join(self.names)} [{self.kind}]: {_work(self)}"


class Costs(tuple[ModelCost, ...]):
    """A `ModelCost` for each distinct model of a blend; prints as a table."""

    @property
    def total(self) -> ModelCost:
        return ModelCost(
            tuple(name for c in self for name in c.names),
            f"{len(self)} model{'' if len(self) == 1 else 's'}",
            sum(c.forwards for c in self),
            sum(c.parameters for c in self),
            sum(c.bytes for c in self),
        )

    def __repr__(self) -> str:
        return "\n  ".join([f"{self.total.kind}: {_work(self.total)}", *map(str, self)])


def costs(names: Sequence[str], models: Sequence[Any]) -> Costs:
    """The cost of each distinct model under `models`; names[i] is what models[i] computes."""
    groups: dict[int, list[int]] = {}
    for i, model in enumerate(models):
        groups.setdefault(id(underlying(model)), []).append(i)
    seen: set[int] = set()
    found = []
    for indices in groups.values():
        model = underlying(models[indices[0]])
        # by storage: a value head is another model over the same weights
        new = [p for p in model.parameters() if (p.data_ptr() or id(p)) not in seen]
        seen.update(p.data_ptr() or id(p) for p in new)
        found.append(
            ModelCost(
                names=tuple(names[i] for i in indices),
                kind=type(model).__name__,
                forwards=len(indices),
                parameters=sum(p.numel() for p in new),
                bytes=sum(p.numel() * p.element_size() for p in new),
            )
        )
    return Costs(found)


def _work(cost: ModelCost) -> str:
    plural = "" if cost.forwards == 1 else "s"
    return (
        f"{cost.forwards} forward{plural} a token, {_short(cost.parameters)} parameters "
        f"({_short(cost.bytes)}B)"
    )


def _short(n: float) -> str:
    for unit in ("", " k", " M", " G"):
        if n < 1000:
            return f"{n:.3g}{unit or ' '}" if unit else f"{n:.0f} "
        n /= 1000
    return f"{n:.3g} T"
