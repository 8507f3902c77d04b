"""The loop that a search's settings ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...search import ParticleFilter, Tournament
from ..engine.options import Engine
from ..mixer import Mixer
from ..rows import Slots
from ..runner import Runner
from .job import SearchJob
from .loop import SearchLoop
from .particles import ParticleLoop
from .tournament import TournamentLoop
from .valuer import Valuer


def search_loop(
    search: SearchJob,
    limit: int,
    engine: Engine,
    runner: Runner,
    mixer: Mixer,
    slots: Slots,
    places: Iterable[int],
    **others: Any,
) -> SearchLoop:
    """A loop that searches as `search` and all other jobs of its call do.

    Args:
        limit, engine: as of `Valuer`.
        others: as of `SearchLoop`.
    """
    kind: type[SearchLoop] = SearchLoop
    if isinstance(search.settings, Tournament):
        kind = TournamentLoop
    elif isinstance(search.settings, ParticleFilter):
        kind = ParticleLoop
    valuer = Valuer(search, slots, limit, engine, runner.heads)
    return kind(valuer, runner, mixer, slots, places, **others)
