"""Searches by the names of their options, as the command line and Ray's actors make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..search import BestOfN, ChunkBeamSearch, ParticleFilter, Tournament, entropy_above

if TYPE_CHECKING:
    from ..loading import Loaded


def search_of(
    loaded: Loaded,
    judge: Any = None,
    *,
    best_of: int | None = None,
    search: Sequence[int] | None = None,
    particles: Sequence[int] | None = None,
    tournament: int | None = None,
    budget: int | None = None,
    chunk_entropy: float | None = None,
    selection_temperature: float | None = None,
    particle_temperature: float | None = None,
) -> Any | None:
    """The search that is asked for by one of the first four settings; None without one.

    Args:
        loaded: has the value, and the tilt, of the search.
        judge: who decides the matches of a tournament, in the place of the value.
        best_of, tournament: how many texts are written.
        search: the width, the samples of each text and the length of a chunk.
        particles: how many there are, and the length of a chunk.
        budget, selection_temperature: as of the searches.
        chunk_entropy: nats, above which a chunk ends.
        particle_temperature: that of a `ParticleFilter`.
    """
    decides = loaded.value if judge is None else judge
    if tournament is not None:
        return Tournament(decides, tournament, budget=budget)
    more: dict[str, Any] = {"budget": budget, "tilt": loaded.tilt}
    ends = None if chunk_entropy is None else entropy_above(chunk_entropy)
    if particles is not None:
        n, length = particles
        temperature = particle_temperature or 1.0
        return ParticleFilter(n, length, decides, temperature, chunk_end=ends, **more)
    more["selection_temperature"] = selection_temperature or 0.0
    if best_of is not None:
        return BestOfN(best_of, decides, **more)
    if search is not None:
        width, samples, chunk_length = search
        return ChunkBeamSearch(width, samples, chunk_length, decides, ends, **more)
    return None
