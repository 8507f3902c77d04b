"""Particle filtering: rows are resampled by their values, and come back as a weighted sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .. import elsewhere
from ..blends.printing import settings_text
from ..blends.values import LogRatio, ValueSum
from ..checks import check_number, explained
from . import base
from .base import EntropyAbove, Search


@explained(elsewhere.PARTICLES)
@dataclass(frozen=True)
class ParticleFilter(Search):
    """Particle filtering (sequential Monte Carlo): rows are resampled by values, not cut to a best.

    It samples from ``π(y|x) exp(V(x, y) / temperature) / Z``, where π is the distribution that rows
    are drawn from and V the value:

    1. n rows a prompt are sampled for a chunk. A row's chunk is shorter if the row ends.
    2. The weight of each is multiplied by ``exp((V_t - V_s) / temperature)``, the rise of its value
       in the chunk. ``V = 0`` before the first.
    3. With the weights divided by their sum, the effective sample size is ``1 / sum_i w_i^2``.
       Where it is below ``resample_below * n``, rows are resampled: row i goes on in floor or
       ceil of ``n w_i`` slots, so that their mean is ``n w_i`` (systematic resampling, by one
       number that depends on the seed of the prompt alone), and all weights are ``1 / n`` again.
       The next chunk begins with step 1.

    The filter is over when all rows have ended. Rows are returned with the highest value first:
    the best one or, with ``num_return_sequences=n``, all of them, which with `Output.weights` are
    the weighted sample. ``torch.multinomial(out.weights, 1)`` then chooses a row of each prompt by
    the distribution above. `Output.effective_sizes` tells how many of the rows counted.

    A row that has ended keeps its value and takes part: its copies write no more. A copy draws from
    a stream of its own. A row that failed, or whose value is NaN or -inf, has the weight 0; where
    all have, all have the same. ``resample_below=0`` never resamples: importance sampling.

    Args:
        n: how many rows are sampled for each prompt, at least 2.
        chunk_length: the most tokens that a chunk has; None: the only chunk ends where rows do.
        value: as in `ChunkBeamSearch`.
        temperature: what values are divided by, above 0. The lower, the nearer the filter is to
            `ChunkBeamSearch`, and the more rows are copies of few.
        resample_below: the part of n, within [0, 1].
        chunk_end, budget: as in `ChunkBeamSearch`.
        tilt: ``LogRatio(target, sampler)``, where the blend that proposes is `sampler` alone. Its
            rise counts besides that of the value, not divided by the temperature. So with draws
            at temperature 1, without truncation, the sample is one of ``p_target(y|x) exp(V(x, y) /
            temperature) / Z``. Rows are in the order of ``V + temperature * tilt``.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: particle-based inference (Puri et al., arXiv:2502.01618), whose weights are the step
    rewards themselves: their sum is the value here; twisted sequential Monte Carlo (Zhao et al.,
    arXiv:2404.17546), whose twists are ``exp(V / temperature)``.
    """

    n: int
    chunk_length: int | None = 5
    value: Any = None
    temperature: float = 1.0
    resample_below: float = field(default=0.5, kw_only=True)
    chunk_end: Callable[[str], bool] | EntropyAbove | None = field(default=None, kw_only=True)
    tilt: Any = field(default=None, kw_only=True)
    budget: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen
        base.check_count("n", self.n)
        if self.n < self.fewest:
            raise ValueError(
                f"n is {self.n}; it must be at least 2, as one row alone is a sample without weight"
            )
        base.check_rows("n", self.n)
        base.check_chunk_length(self.chunk_length)
        put(self, "tilt", base.check_tilt(self.tilt))
        put(self, "value", base.check_value(self.value, self.tilt))
        put(self, "temperature", check_number("temperature", self.temperature))
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        put(self, "resample_below", check_number("resample_below", self.resample_below))
        if not 0 <= self.resample_below <= 1:
            raise ValueError(f"resample_below is {self.resample_below}; it must be within [0, 1]")
        base.check_chunk_end(self.chunk_end)
        base.check_budget(self.budget)
        base.check_objective(self)

    def __repr__(self) -> str:
        others = settings_text(self, skip=["n", "chunk_length", "value"])
        sizes = f"{self.n}, {self.chunk_length}, value={self.value}"
        return f"ParticleFilter({', '.join([sizes, *others])})"

    @property
    def width(self) -> int:
        return self.n

    @property
    def fewest(self) -> int:
        return 2

    @property
    def objective(self) -> ValueSum | None:
        """The value with the tilt added which, times the temperature, is divided by it again."""
        if not isinstance(self.tilt, LogRatio):
            return self.value
        tilt = self.temperature * self.tilt
        return tilt if self.value is None else self.value + tilt

    def of_rows(self, rows: int) -> ParticleFilter:
        return replace(self, n=min(rows, self.n))
