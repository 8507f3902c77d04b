"""The names of terms, and what the models under them cost."""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ..checks import check_called
from ..models.hf import underlying
from .mixes import Mix
from .printing import short

T = TypeVar("T")
CHECKPOINT = re.compile(r"(checkpoint|step|epoch|global_step)[-_]?\d+")
# A hash of at least eight hexadecimal digits, with a version after it or not. It has letters and
# numbers: what has letters alone is a word, and what has numbers alone is a date.
HASH = re.compile(r"[-_.](?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{8,64}([-_.]v\d+)?$")


def as_term(name: str, x: Any, kind: type[T]) -> T:
    """`x` as a term of a kind, `Model` or `ValueHead`: a bare model becomes one.

    Args:
        name: what errors call `x`.

    Raises:
        TypeError: `x` is of another kind.
    """
    if isinstance(x, nn.Module):
        return kind(x)  # type: ignore[call-arg]
    if not isinstance(x, kind):
        raise TypeError(
            f"{name} has a {type(x).__name__}; it must be a {kind.__name__} or a Hugging Face model"
        )
    return x


def check_name(name: Any) -> None:
    """Raise an error unless `name` can be a term's name: an identifier, or None for a default."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}; it must be a str or None")
    if name is not None and (not name.isidentifier() or keyword.iskeyword(name)):
        raise ValueError(f"name is {name!r}; it must be an identifier, as formulas need it")


def check_system(system: Any) -> Any:
    """A term's system prompt: a text, a tuple of one a request, or None.

    Raises:
        TypeError, ValueError: it is something else, or is empty.
    """
    if system is None or isinstance(system, str):
        return system
    if not isinstance(system, (list, tuple)):
        raise TypeError(
            f"system is a {type(system).__name__}; it must be a text, a list of one a request, or "
            "None"
        )
    for i, own in enumerate(system):
        if not isinstance(own, str):
            raise TypeError(f"system[{i}] is {own!r:.80}; it must be a text")
    if not system:
        raise ValueError("system is an empty list; it must have one text a request")
    return tuple(system)


def check_prompt(prompt: Any) -> None:
    """Require a prompt, a list of one a request, a function of the request, or None.

    Raises:
        TypeError, ValueError: it is something else, or is empty.
    """
    if not (prompt is None or isinstance(prompt, (str, list, tuple)) or callable(prompt)):
        raise TypeError(
            f"prompt is a {type(prompt).__name__}; it must be a prompt, a list of one a request, a "
            "function of the request, or None"
        )
    if isinstance(prompt, (list, tuple)) and not prompt:
        raise ValueError("prompt is an empty list; it must have one prompt a request")


def check_template(template: Any) -> None:
    """Require a function of a prompt and a response, or None.

    Raises:
        TypeError: it is something else, or takes other arguments.
    """
    if template is not None and not callable(template):
        kind = type(template).__name__
        raise TypeError(f"template is a {kind}; it must be a function or None")
    if template is not None:
        check_called("template is called as template(prompt, response)", template, 2)


def default_name(model: Any, adapter: str | Mix | None, otherwise: str) -> str:
    """A term's name if none is given: its adapters', or what its model was loaded from.

    What an identifier cannot have becomes an underscore. `otherwise` is the name where nothing is
    left.
    """
    path = str(getattr(model.config, "name_or_path", "") or "")
    if isinstance(adapter, Mix):
        adapter = "_".join(adapter.names)
    source = adapter if adapter not in (None, "active") else source_name(path)
    name = re.sub(r"\W+", "_", str(source)).strip("_")
    if name[:1].isdigit():
        name = f"_{name}"
    return name if name.isidentifier() and not keyword.iskeyword(name) else otherwise


def source_name(path: str) -> str:
    """What a model is called that was loaded from a path or from an id on the hub.

    It is the last part: the model's name of a folder in the hub's cache, whose own last part is a
    hash; of a trainer's ``checkpoint-500`` with the run's folder before it; and without a hash at
    its end.
    """
    parts = [part for part in re.split(r"[/\\]+", path) if part]
    for part in parts:
        if part.startswith("models--"):
            return part.split("--", 2)[-1]
    if not parts:
        return ""
    if parts[-1] in (".", "..") or (len(parts) == 1 and CHECKPOINT.fullmatch(parts[0])):
        parts = list(Path(path).resolve().parts)
    name = HASH.sub("", parts[-1])
    return "_".join([*parts[-2:-1], name]) if CHECKPOINT.fullmatch(name) else name


def default_names(members: Sequence[Any], otherwise: Sequence[str]) -> list[str]:
    """The names of terms and values: their own, or `default_name` with an adapter of theirs.

    Where two that have none are of one source in different dtypes, these are part of the names.
    """
    names = [
        default_name(m.model, getattr(m, "adapter", None), other) if m.name is None else m.name
        for m, other in zip(members, otherwise, strict=True)
    ]
    dtypes: dict[str, set[str]] = {}
    own = [str(getattr(m.model, "dtype", "")).removeprefix("torch.") for m in members]
    for name, dtype in zip(names, own, strict=True):
        dtypes.setdefault(name, set()).add(dtype)
    return [
        f"{name}_{dtype}" if m.name is None and len(dtypes[name]) > 1 else name
        for m, name, dtype in zip(members, names, own, strict=True)
    ]


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
