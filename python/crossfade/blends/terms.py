"""The names of terms, and what the models under them cost."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..models.hf import underlying
from .printing import short


def check_name(name: Any) -> None:
    """Raise an error unless `name` can be a term's name: an identifier, or None for a default."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; it must be a str or None")
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise ValueError(f"name is {name!r}; it must be an identifier, as formulas need it")


def default_name(model: Any, adapter: str | None, otherwise: str) -> str:
    """A term's name if none is given: its adapter's, or the last part of the model's path.

    What an identifier cannot have becomes an underscore. `otherwise` is the name where nothing is
    left.
    """
    path = str(getattr(model.config, "name_or_path", "") or "")
    source = adapter if adapter not in (None, "active") else path.rstrip("/").rsplit("/", 1)[-1]
    name = re.sub(r"\W+", "_", str(source)).strip("_")
    if name[:1].isdigit():
        name = f"_{name}"
    return name if name.isidentifier() and not keyword.iskeyword(name) else otherwise


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names, all different: one that an earlier name is equal to gets a number at its end."""
    found: list[str] = []
    for i, name in enumerate(names):
        same = (name, *(f"{name}_{n}" for n in range(2, i + 2)))
        found.append(next(n for n in same if n not in found))
    return tuple(found)


class ModelCost(NamedTuple):
    """What one underlying model adds to a blend's cost.

    Attributes:
        names: the names of the terms and values that the model computes.
        kind: the name of the model's class.
        forwards: how many rows the model computes for each token of a request: one a term.
        parameters: how many parameters the model holds, those of adapters included. Parameters
            that two models share are counted for the first of them alone.
        bytes: the size of these parameters.
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
    """The cost of each distinct model; ``names[i]`` is what ``models[i]`` computes."""
    groups: dict[int, list[int]] = {}
    for i, model in enumerate(models):
        groups.setdefault(id(underlying(model)), []).append(i)
    seen: set[int] = set()
    found = []
    for indices in groups.values():
        model = underlying(models[indices[0]])
        # A value head is another model over the same weights: parameters are told apart by where
        # their data lies.
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
        f"{cost.forwards} forward{plural} a token, {short(cost.parameters)} parameters "
        f"({short(cost.bytes)}B)"
    )
