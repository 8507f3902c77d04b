"""A blend and the search over it, together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..blends.blend import Blend, as_blend
from ..blends.values import ValueSum
from ..checks import explained
from .base import Search


@explained()
@dataclass(frozen=True)
class Recipe:
    """A blend and the search over it: what `generate` takes in place of a blend.

    Args:
        blend: a `Blend`, a `Model` or a bare Hugging Face causal LM.
        search: a `ChunkBeamSearch`, a `ParticleFilter` or a `Tournament`.
    """

    blend: Blend
    search: Search

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", as_blend(self.blend))
        check_search(self.search)

    @property
    def value(self) -> ValueSum | None:
        """What scores the rows of the search; None if a judge compares them."""
        return self.search.value


def check_search(search: Any) -> None:
    """Raise a TypeError unless `search` is one that `generate` knows."""
    if isinstance(search, Recipe):
        raise TypeError(
            "search is a Recipe, which has a blend too; it takes the blend's place: "
            "generate(recipe, inputs)"
        )
    if not isinstance(search, Search):
        judges = callable(getattr(search, "prefer", None)) and not isinstance(search, type)
        raise TypeError(
            f"search is a {type(search).__name__}; it must be a search, as "
            "ChunkBeamSearch(value=...), BestOfN(n, value), ParticleFilter(n, chunk_length, value) "
            "or Tournament(judge) gives it"
            + "; a judge decides in search=Tournament(judge, n=16)"
            * judges
        )
