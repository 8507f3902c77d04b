"""What formulas of names mean: the blend or the value that they make of loaded models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

from torch import nn

from .. import formula
from ..blends.algebra import Algebra
from ..blends.blend import Blend, ValueHead
from ..blends.values import LogRatio, ValueSum, formula_value


@contextmanager
def errors_of(option: str) -> Iterator[None]:
    """Let errors of a formula name the option that has it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{option}: {str(error).removeprefix('formula: ')}") from None


def names_of(option: str, text: str) -> set[str]:
    """The names in a formula; whatever keeps it from being read is an error."""
    try:
        return formula.names_in(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        with errors_of(option):
            formula.evaluate(text, {})
        raise


class Unloaded(nn.Module):
    """Takes the place of a model in a formula that is checked before the model is loaded."""

    config = SimpleNamespace()

    def forward(self) -> NoReturn:
        raise NotImplementedError


def blend_of(text: str, terms: Mapping[str, Any], faders: Mapping[str, Any]) -> Blend:
    """The blend that a formula means."""
    used = formula.names_in(text)
    return formula.parse(text, **terms, **{n: w for n, w in faders.items() if n in used})


def value_of(text: str, terms: Mapping[str, Any], faders: Mapping[str, Any]) -> ValueSum:
    """The value that a formula means. In the algebra of blends a head stands for each reward."""
    own = {name: x for name, x in terms.items() if not isinstance(x, Algebra)}
    heads = {name: ValueHead(Unloaded(), name=name) for name in own}
    found = formula_value(blend_of(text, {**terms, **heads}, faders))
    meant = {head: own[name] for name, head in heads.items()}
    return ValueSum(tuple(meant.get(v, v) for v in found.values), found.weights)


def tilt_of(text: str, terms: Mapping[str, Any], faders: Mapping[str, Any]) -> LogRatio:
    """The tilt that a formula means: one model less another."""
    blend = blend_of(text, {n: x for n, x in terms.items() if isinstance(x, Algebra)}, faders)
    others = blend.values or blend.parts or blend.support or blend.power
    if sorted(map(float, blend.weights)) == [-1.0, 1.0] and not others:
        ref, target = blend.terms if blend.weights[0] == -1 else reversed(blend.terms)
        return LogRatio(target, ref)
    raise ValueError(f"it is {text!r}; it must be one model less another, as in target - sampler")


def members_of(blend: Blend | None) -> dict[str, Any]:
    """The terms and the values of a blend by their names."""
    if blend is None:
        return {}
    names = (*blend.names, *blend.value_names)
    return dict(zip(names, (*blend.terms, *blend.values), strict=True))
