"""What rows have written, put together as an `Output`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..search import ParticleFilter, Tournament
from .driver import Driver
from .engine.prefix import PrefixCache
from .job import Job
from .output import Filtered, Output, Played
from .rows import Written, column
from .search.job import SearchJob
from .stats import ModelStats, Stats, summed


@dataclass(frozen=True)
class Ran:
    """What there is to say of how a request was run that shared its loop with others."""

    device: torch.device
    seconds: float
    models_stats: Sequence[ModelStats] = ()
    cache_bytes: int = 0
    peak_bytes: int = 0
    notes: Sequence[str] = ()
    interrupted: bool = False
    drafted: Mapping[str, Any] = field(default_factory=dict)
    cache: PrefixCache | None = None


def output_of(
    job: Job,
    written: Sequence[Written],
    driver: Driver | Ran,
    *,
    term_logprobs: bool = False,
    alone: bool = False,
) -> Output:
    """The `Output` of a job, or of some of its requests.

    Args:
        written: all their rows, in any order.
        term_logprobs: whether these are wanted; a search may have had them written for its value.
        alone: whether the output is to be as if the job had no other requests, whose prompts may be
            longer.
    """
    rows = sorted((w for w in written if w.row.is_returned), key=lambda w: w.row.index)
    device = driver.device
    requests = [w.row.request for w in rows]

    def flags(each: Sequence[bool]) -> Tensor:
        return torch.tensor(each, dtype=torch.bool, device=device)

    tokens: Any = column(rows, "tokens", job.pad)
    divergences = column(rows, "kl")
    others: dict[str, Any] = {}
    if job.search is not None:
        others |= _of_search(job.search, rows)
    if divergences is not None:
        others |= {r.output: divergences[..., i] for i, r in enumerate(job.references)}
    if job.draft is not None:
        of_draft = [w.guessed for w in rows]
        others["tokens_by_draft"] = torch.tensor(of_draft, dtype=torch.int64, device=device)
    lengths = [len(w) for w in rows]
    prompts = job.prompts[0].ids[requests].to(device)
    if alone:
        prompts = prompts[:, int((job.prompts[0].mask[requests] == 0).all(dim=0).sum()) :]
    peak = driver.peak_bytes
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return Output(
        sequences=torch.cat([prompts, tokens], dim=1),
        prompt_length=prompts.shape[1],
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        text=None if job.writing is None else job.writing.texts(requests, [w.ids for w in rows]),
        logprobs=column(rows, "logprobs"),  # type: ignore[arg-type]
        sampled_logprobs=column(rows, "sampled_logprobs"),  # type: ignore[arg-type]
        finished=flags([w.finished for w in rows]),
        failed=flags([w.failed for w in rows]),
        ended=flags([w.ended for w in rows]),
        stats=Stats(
            tokens=sum(lengths),
            seconds=driver.seconds,
            models=summed(driver.models_stats),
            cache_bytes=driver.cache_bytes,
            peak_bytes=peak,
            notes=tuple(driver.notes),
            interrupted=driver.interrupted,
            **driver.drafted,
        ),
        entropies=column(rows, "entropies"),
        pushes=column(rows, "pushes"),
        term_logprobs=column(rows, "term_logprobs") if term_logprobs else None,
        cache=driver.cache,
        **others,
    )


def _of_search(search: SearchJob, rows: Sequence[Written]) -> dict[str, Any]:
    """The fields of an `Output` that a search fills, from its rows that are returned."""

    def each(x: Tensor) -> Tensor:
        """``[rows, ...]`` as ``[requests, n, ...]``, if n > 1 rows of each are returned."""
        return x.unflatten(0, (-1, search.returned)) if search.returned > 1 else x

    values = each(torch.stack([w.values for w in rows]))
    found: dict[str, Any] = {"values": values[..., 0]}
    if search.parts:
        found["value_parts"] = values[..., 1:]
    if isinstance(search.settings, Tournament):
        played = [w.outcome if isinstance(w.outcome, Played) else None for w in rows]
        places = [
            w.row.sample if p is None else p.order[w.row.sample]
            for w, p in zip(rows, played, strict=True)
        ]
        found["slots"] = each(torch.tensor(places, dtype=torch.int64, device=values.device))
        found["bracket"] = [
            [] if p is None else p.rounds
            for w, p in zip(rows, played, strict=True)
            if w.row.sample == 0
        ]
    if isinstance(search.settings, ParticleFilter):
        filtered = [w.outcome if isinstance(w.outcome, Filtered) else None for w in rows]
        weights = [
            float("nan") if f is None else f.weights[w.row.sample]
            for w, f in zip(rows, filtered, strict=True)
        ]
        found["weights"] = each(torch.tensor(weights, dtype=torch.float32, device=values.device))
        found["effective_sizes"] = [
            [] if f is None else list(f.sizes)
            for w, f in zip(rows, filtered, strict=True)
            if w.row.sample == 0
        ]
    return found
