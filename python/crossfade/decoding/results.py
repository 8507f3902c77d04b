"""What rows have written, put together as an `Output`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..search import Tournament
from .driver import Driver
from .job import Job
from .output import Output
from .rows import Written, column
from .search.job import SearchJob
from .stats import Stats, summed


def output_of(
    job: Job,
    written: Sequence[Written],
    driver: Driver,
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
        ),
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
        slots = [w.row.sample if w.played is None else w.played.order[w.row.sample] for w in rows]
        found["slots"] = each(torch.tensor(slots, dtype=torch.int64, device=values.device))
        found["bracket"] = [
            [] if w.played is None else w.played.rounds for w in rows if w.row.sample == 0
        ]
    return found
