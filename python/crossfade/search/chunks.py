"""Chunk-level beam search and best of n."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from .. import elsewhere
from ..blends.printing import settings_text
from ..checks import check_number, explained
from ..ops import check
from . import base
from .base import EntropyAbove, Search


@explained(elsewhere.SEARCH)
@dataclass(frozen=True)
class ChunkBeamSearch(Search):
    """Chunk-level beam search: sample in chunks, keep the best rows by a value, fork them.

    1. ``width * samples`` rows a prompt are sampled for a chunk. A row's chunk is shorter if the
       row ends.
    2. The value scores what each row has written so far.
    3. The best `width` rows of each prompt stay, and each is continued `samples` times from step 1.
       The search is over when all rows that stay have ended. It returns the best of them, or with
       ``num_return_sequences=n`` the n best.

    A row that has ended is one candidate. It competes with its fixed score until better rows
    replace it. Of equal rows the one in the lower slot stays, and a value of NaN is the worst.
    Every row draws from the stream of its slot. `samples` = 1 with `width` = n is best of n,
    `width` = 1 is blockwise best-of-n, and ``chunk_length=1`` is a beam search that the value
    guides.

    Args:
        width: how many rows of a prompt stay after a chunk.
        samples: how many times each of them is continued.
        chunk_length: the most tokens that a chunk has; None samples up to the end.
        value: what chooses: a `LogRatio`, `ValueHead`, `RewardModel` or `Reward`, a function that
            is made a `Reward`, or a sum of them.
        chunk_end: what else ends a chunk. A function of the text of a row's chunk so far, such as
            `sentence_end`, is called after each token and ends the chunk where it returns true;
            `entropy_above(nats)` ends it before an uncertain token. The rows of a prompt wait for
            each other.
        duplicate_finished: whether a row that has ended fills `samples` slots with copies of
            itself, as the paper's code has it. The copies can crowd out rows under way.
        tilt: ``LogRatio(target, sampler)``, where the blend that proposes is `sampler` alone and
            `target` is meant: rows are chosen by ``V(x, y) + log p_target(y|x) - log
            p_sampler(y|x)``, over the whole response so far, as the value is. So rows of several
            histories compare, and among those of one history the chunk alone counts. It is a part
            of `Output.values`, and the last of `Output.value_parts`. With it, `value` may be None.
        selection_temperature: above 0, the rows that stay are drawn, without replacement, by
            ``exp(V / selection_temperature)``, and come back in the order in which they were: soft
            best of n, where the best of n is its limit at 0. The draws depend on the seed of the
            prompt alone.
        budget: the most tokens that are drawn of a prompt, in all of its rows together. Where
            `rows` rows of `max_new_tokens` are more, the search has fewer: the width and the
            samples, neither larger than asked for, with the largest product that keeps it; of
            equal ones, those with more samples. It needs `max_new_tokens`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: chunk-level beam search (Zhou et al., arXiv:2405.19262); blockwise best-of-n is
    controlled decoding's (Mudgal et al., arXiv:2310.17022); draws of the best of n are Verdun et
    al.'s, arXiv:2505.03156; the tilt, and draws by what it gives,
    are guided speculative inference's (Geuter et al., arXiv:2506.04118).
    """

    width: int = 4
    samples: int = 4
    chunk_length: int | None = 5
    value: Any = None
    chunk_end: Callable[[str], bool] | EntropyAbove | None = None
    duplicate_finished: bool = False
    tilt: Any = field(default=None, kw_only=True)
    selection_temperature: float = field(default=0.0, kw_only=True)
    budget: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen
        base.check_count("width", self.width)
        base.check_count("samples", self.samples)
        base.check_chunk_length(self.chunk_length)
        base.check_rows("width * samples", self.rows)
        put(self, "tilt", base.check_tilt(self.tilt))
        put(self, "value", base.check_value(self.value, self.tilt))
        base.check_chunk_end(self.chunk_end)
        check.flag("duplicate_finished", self.duplicate_finished)
        temperature = check_number("selection_temperature", self.selection_temperature)
        put(self, "selection_temperature", temperature)
        if temperature < 0:
            raise ValueError(f"selection_temperature is {temperature:g}; it must be at least 0")
        base.check_budget(self.budget)
        base.check_objective(self)

    def of_rows(self, rows: int) -> ChunkBeamSearch:
        sizes = [(min(rows // n, self.width) * n, n) for n in range(1, min(rows, self.samples) + 1)]
        rows, samples = max(sizes)
        return replace(self, width=rows // samples, samples=samples)

    def __repr__(self) -> str:
        others = settings_text(self, skip=["width", "samples", "chunk_length", "value"])
        if self.samples == 1 and self.chunk_length is None:
            return f"BestOfN({', '.join([str(self.width), f'value={self.value}', *others])})"
        sizes = [f"{n}={getattr(self, n)}" for n in ("width", "samples", "chunk_length")]
        return f"ChunkBeamSearch({', '.join([*sizes, f'value={self.value}', *others])})"


@explained(elsewhere.SEARCH)
def BestOfN(
    n: int,
    value: Any = None,
    *,
    tilt: Any = None,
    selection_temperature: float = 0.0,
    budget: int | None = None,
) -> ChunkBeamSearch:
    """Best of n: of n whole samples, the one that the value scores highest.

    It is a `ChunkBeamSearch` of one chunk, and can return up to n rows, the best first.

    Args:
        n: how many rows are sampled for each prompt.
        value, tilt, selection_temperature, budget: as in `ChunkBeamSearch`.
    """
    base.check_count("n", n)
    return ChunkBeamSearch(
        width=n,
        samples=1,
        chunk_length=None,
        value=value,
        tilt=tilt,
        selection_temperature=selection_temperature,
        budget=budget,
    )
