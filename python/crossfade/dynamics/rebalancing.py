"""Which part of the training data each behaviour gets, so that all are learnt about as fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checks import check_number, explained, warn
from ..decoding.settings import check_int
from ..extras import require
from .behaviours import Statistics
from .rows import TAG, behaviour_of

LEAST = 1e-6  # of the largest distinguishability: any lesser one counts as this


def shares(stats: Mapping[str, Statistics], *, power: float = 2.0) -> dict[str, float]:
    """The part of the data that each behaviour must have to be learnt as fast as the others.

    A mean loss over all rows gives a behaviour its share of the gradient, and at step 0 its own
    part of that grows with its distinguishability (`Statistics.gradient_norm`). Its loss falls by
    the square of that. So shares are as ``distinguishability ** -power``.

    Args:
        stats: as `statistics` gives them.
        power: 2.0 evens how fast losses fall, 1.0 how fast the head's weights change.

    Returns:
        The share of each behaviour; they sum to 1.

    Raises:
        ValueError: `stats` is empty, no behaviour is distinguishable, or `power` is below 0.
    """
    if check_number("power", power) < 0:
        raise ValueError(f"power is {power}; it must be 0 or more")
    most = max((s.distinguishability for s in stats.values()), default=0.0)
    if not most:
        raise ValueError("stats has no behaviour whose sides are distinguishable; it must have one")
    weights = {b: max(s.distinguishability / most, LEAST) ** -power for b, s in stats.items()}
    total = sum(weights.values())
    return {b: w / total for b, w in weights.items()}


@explained()
def rebalanced(
    rows: Any,
    stats: Mapping[str, Statistics],
    *,
    tag: str = TAG,
    power: float = 2.0,
    most: int = 10,
    seed: int = 0,
) -> Any:
    """As many rows as there are, of which each behaviour has its part by `shares`.

    Rows of a behaviour that is learnt fast are left out by chance, and those of one that is learnt
    slowly are there several times. Rows without a tag, and those of behaviours that `stats` does
    not have, stay as they are, with a warning.

    Args:
        rows: a `datasets.Dataset`, or a sequence of mappings, such as the rows that `statistics`
            was given; or the pairs to train on, with the same tags.
        stats: as `statistics` gives them.
        tag: the key of the name of a row's behaviour.
        power: as in `shares`.
        most: how often a row is there at most.
        seed: of the choice and of the order; the same seed gives the same rows.

    Returns:
        A `datasets.Dataset`, which trainers take as `train_dataset`.

    Raises:
        TypeError, ValueError: names the argument or the row, what it was and what it must be.
    """
    check_int("most", most, 1)
    check_int("seed", seed, 0)
    datasets = require("datasets", "train")
    if not isinstance(rows, datasets.Dataset):
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            raise TypeError(
                f"rows is a {type(rows).__name__}; it must be a datasets.Dataset or a list of rows"
            )
        rows = datasets.Dataset.from_list([*rows])
    tags = rows[tag] if tag in rows.column_names else [None] * len(rows)
    return rows.select(chosen(tags, stats, tag=tag, power=power, most=most, seed=seed))


def chosen(
    tags: Sequence[Any],
    stats: Mapping[str, Statistics],
    *,
    tag: str = TAG,
    power: float = 2.0,
    most: int = 10,
    seed: int = 0,
) -> list[int]:
    """The places of the rows that `rebalanced` gives, in its order, by the tags of all rows."""
    places: dict[str | None, list[int]] = {}
    for i, behaviour in enumerate(tags):
        named = behaviour_of({tag: behaviour}, tag, f"row {i} of rows")
        places.setdefault(named, []).append(i)
    known = {b: its for b, its in places.items() if b is not None and b in stats}
    _warn_of_others({b: its for b, its in places.items() if b not in stats}, tag)
    generator = torch.Generator().manual_seed(seed)
    found = [i for b, its in places.items() if b not in stats for i in its]
    if known:
        parts = shares({b: stats[b] for b in known}, power=power)
        rows = {b: len(its) for b, its in known.items()}
        for behaviour, count in counts(rows, parts, most).items():
            its = known[behaviour]
            whole, rest = divmod(count, len(its))
            order = torch.randperm(len(its), generator=generator).tolist()
            found += its * whole + [its[k] for k in order[:rest]]
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[k] for k in order]


def counts(rows: Mapping[str, int], parts: Mapping[str, float], most: int) -> dict[str, int]:
    """How many rows each behaviour gets: as many in all as there are, each `most` times at most.

    What a behaviour cannot take goes to the others, by their shares.

    Args:
        rows: how many rows each behaviour has.
        parts: as `shares` gives them.
    """
    limits = {b: most * rows[b] for b in parts}
    left = sum(rows.values())
    found: dict[str, float] = {}
    open_ = dict(parts)
    while open_:
        scale = left / sum(open_.values())
        full = [b for b, part in open_.items() if part * scale >= limits[b]]
        if not full:
            found |= {b: part * scale for b, part in open_.items()}
            break
        for b in full:
            found[b] = limits[b]
            left -= limits[b]
            del open_[b]
    return _rounded(found)


def _rounded(counts: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers of the same sum, rounded up where most is missing."""
    found = {b: int(x) for b, x in counts.items()}
    missing = round(sum(counts.values())) - sum(found.values())
    for b in sorted(counts, key=lambda b: found[b] - counts[b])[:missing]:
        found[b] += 1
    return found


def _warn_of_others(places: Mapping[str | None, Sequence[int]], tag: str) -> None:
    for behaviour, its in places.items():
        said = f"there is no {tag!r}" if behaviour is None else f"stats has no {behaviour!r}"
        warn(f"{said} for {len(its)} rows, the first is row {its[0]}; they stay as they are")
