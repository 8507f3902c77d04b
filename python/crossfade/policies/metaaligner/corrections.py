"""What `correct` gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...decoding.output import Output
from ...decoding.stats import Stats, together
from ...metrics import edit_distance


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Corrections(Output):
    """Corrected answers: an `Output` of the last round.

    Its `text` has the answers that stand at the end. They are what was written in the last round,
    but for rows that have failed, that `accept` refused or that Ctrl-C has cut, whose older answer
    stands; `responses` has all that was written.

    Attributes:
        answers: the answers that were corrected, one a query: those given or the policy's.
        rounds: of each round that was begun, the answers that stood after it. One a query, and in
            the last round `num_return_sequences` a query. None where Ctrl-C came while a policy
            wrote: the rest of the `Output` is the policy's then.
        unchanged: ``[rows]`` bool: whether `text` is the answer, white space around it aside.
        edit_distance: ``[rows]`` float32: how much of the answer was edited, from 0 to 1:
            `crossfade.metrics.edit_distance` of the answer and `text`, in words.
        scores: ``[rows, 2]`` float64: what `accept` says of the answer and of `text`, NaN where a
            row has failed or was not scored before Ctrl-C; None without `accept`.
    """

    answers: list[str]
    rounds: list[list[str]]
    unchanged: Tensor
    edit_distance: Tensor
    scores: Tensor | None = None


def corrections_of(
    out: Output,
    text: list[str],
    answers: list[str],
    rounds: list[list[str]],
    failed: Sequence[bool],
    stats: Sequence[Stats],
    scores: Tensor | None = None,
    *,
    interrupted: bool = False,
) -> Corrections:
    """The corrections of some queries.

    Args:
        out: of the last round.
        text: the answers that stand at the end, one a row.
        failed: of each row.
        stats: of all calls; the last is that of `out`.
    """
    copies = len(text) // len(answers)
    old = [answer for answer in answers for _ in range(copies)]
    pairs = list(zip(old, text, strict=True))
    device = out.lengths.device

    def column(each: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(each, dtype=dtype, device=device)

    of_last: dict[str, Any] = {f.name: getattr(out, f.name) for f in fields(Output)}
    of_last |= {
        "text": text,
        "failed": column(failed, torch.bool),
        "stats": together(stats, interrupted=interrupted),
    }
    return Corrections(
        **of_last,
        answers=answers,
        rounds=rounds,
        unchanged=column([a.strip() == b.strip() for a, b in pairs], torch.bool),
        edit_distance=column([edit_distance(a, b) for a, b in pairs], torch.float32),
        scores=scores,
    )
