"""Which rows are held out of a training on flipped labels, to measure on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .questions import Pair, read_rows
from .rows import Reader


def split(
    rows: Iterable[Any], reader: Reader, yes: str, no: str, held_out: float
) -> tuple[list[Pair], list[Pair]]:
    """The pairs of rows to train on and to measure on, in the order of the rows, flipped.

    Of the texts of each behaviour, and each label of statements, a part is held out: at least one,
    and never all.

    Raises:
        TypeError, ValueError: as `statement_pairs`; or there are too few texts.
    """
    pairs = [
        pair._replace(chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
        for pair in read_rows(rows, reader, yes, no)
    ]
    reader.left_out.warn()
    strata: dict[tuple[str, int | None], list[tuple[int, ...]]] = {}
    known: set[tuple[int, ...]] = set()
    for pair in pairs:
        prompt = tuple(pair.prompt_ids)
        if prompt not in known:
            label = None if reader.pairs else pair.chosen_ids[0]
            strata.setdefault((pair.behaviour, label), []).append(prompt)
            known.add(prompt)
    if not pairs:
        raise ValueError("rows has no row to train on; it must have some of each behaviour")
    generator = torch.Generator().manual_seed(0)
    held: set[tuple[int, ...]] = set()
    for (behaviour, label), prompts in strata.items():
        if len(prompts) < 2:
            what = "prompt" if label is None else "text of one of its labels"
            raise ValueError(
                f"rows has a single {what} of behaviour {behaviour!r}; there must be two or more, "
                "of which one is held out"
            )
        count = min(max(1, round(held_out * len(prompts))), len(prompts) - 1)
        order = torch.randperm(len(prompts), generator=generator).tolist()
        held |= {prompts[i] for i in order[:count]}
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        parts[tuple(pair.prompt_ids) in held].append(pair)
    return parts
