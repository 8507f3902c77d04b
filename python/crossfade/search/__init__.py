"""Searches by a value or a judge, and recipes: what `generate` takes besides a blend."""

from __future__ import annotations

from .base import EntropyAbove as EntropyAbove
from .base import Search as Search
from .base import entropy_above as entropy_above
from .base import sentence_end as sentence_end
from .chunks import BestOfN as BestOfN
from .chunks import ChunkBeamSearch as ChunkBeamSearch
from .particles import ParticleFilter as ParticleFilter
from .recipe import Recipe as Recipe
from .recipe import check_search as check_search
from .tournament import Tournament as Tournament
from .tournament import check_prefer as check_prefer
