"""How far apart a model holds the two sides of each behaviour before it is trained on them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number, explained, warn
from ..decoding.generation import check_running
from ..progress import progress_bar
from .moments import EXACT, Moments, interval
from .rows import TAG, Reader, Texts
from .states import LastStates

CHUNK = 256  # rows whose texts are held at a time, so that those of about one length share forwards
REPEATS = 0.1  # a larger share of texts that are there already is warned of


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a model's head reads of a behaviour's texts: `statistics` makes it.

    States are the head's inputs at the last token. Covariances divide by the number of states.

    Attributes:
        behaviour: its name.
        pairs: whether the texts are pairs of responses, positive being the chosen ones.
        n_positive, n_negative: how many texts there are of each side.
        mean_positive, mean_negative: ``[H]`` float64: the means of their states.
        trace: the larger of the traces of their covariances.
        concentration: the larger of the covariances' largest eigenvalues.
        concentration_error: how far off it may be; 0.0 up to a width of 4,096.
        interval: of the distinguishability of all texts that there might be of this kind, at 95 %.
            Where texts are few and states wide, `distinguishability` is above it by chance. A text
            that is there many times is one draw of them.
        spreads: the variances of the positive and of the negative states along `step`; no less
            than these where `concentration_error` is not 0.
    """

    behaviour: str
    pairs: bool
    n_positive: int
    n_negative: int
    mean_positive: Tensor = field(repr=False)
    mean_negative: Tensor = field(repr=False)
    trace: float
    concentration: float
    concentration_error: float
    interval: tuple[float, float]
    spreads: tuple[float, float]

    @property
    def n(self) -> int:
        """How many texts there are."""
        return self.n_positive + self.n_negative

    @property
    def difference(self) -> Tensor:
        """``[H]``: the mean of the positive states less that of the negative ones."""
        return self.mean_positive - self.mean_negative

    @property
    def distinguishability(self) -> float:
        """How far the means of both sides are apart (arXiv:2403.18742)."""
        return float(self.difference.norm())

    @property
    def step(self) -> Tensor:
        """``[H]``: the direction in which training first moves the head's answers apart.

        It is each side's mean times its share of the texts, positive less negative: half of
        `difference` where both have as many.
        """
        return _step(self.n_positive, self.mean_positive, self.n_negative, self.mean_negative)

    def gradient_norm(self, beta: float = 0.1) -> float:
        """The norm of the gradient of DPO's loss on the head's weights at step 0, exactly.

        It is ``beta / sqrt(2) * |step|``: with as many statements of each label,
        ``sqrt(2) / 4 * beta * distinguishability`` (arXiv:2403.18742, Theorem 4.1). That holds for
        statements as prompts, whose responses are two tokens, such as yes and no, chosen by the
        label, with no token after it; for a head without bias that is not tied to the embeddings;
        and for the mean loss over all statements.

        Raises:
            ValueError: the behaviour is of pairs.
        """
        self._refuse_pairs("gradient_norm")
        return check_number("beta", beta) / math.sqrt(2) * float(self.step.norm())

    @property
    def accuracy_bound(self) -> float:
        """What accuracy the head's first step reaches at least on these very statements.

        A step moves the margin of yes over no of a statement by a positive multiple of its state's
        product with `step`. Cantelli's inequality bounds how many states of a side have a product
        of the right sign from below by ``a² / (a² + s)``, where a is their mean along `step`, if
        that is on the right side, and s their variance there. So the bound is near 1 where sides
        are far apart for their spread (as in arXiv:2403.18742, Theorems 4.2 and 4.3; this one
        assumes nothing of the states). It is of a behaviour trained alone, under the conditions of
        `gradient_norm`.

        Raises:
            ValueError: the behaviour is of pairs.
        """
        self._refuse_pairs("accuracy_bound")
        step = self.step
        length = float(step.norm())
        if not length:
            return 0.0
        reaches = (
            float(self.mean_positive @ step) / length,
            -float(self.mean_negative @ step) / length,
        )
        shares = (self.n_positive / self.n, self.n_negative / self.n)
        return sum(
            share * a**2 / (a**2 + s) if a > 0 else 0.0
            for share, a, s in zip(shares, reaches, self.spreads, strict=True)
        )

    def _refuse_pairs(self, name: str) -> None:
        if self.pairs:
            raise ValueError(
                f"{self.behaviour!r} is of pairs of responses; {name} holds for statements with a "
                "label alone"
            )


class _Sides:
    """The moments of a behaviour's states; of pairs, also those of their differences.

    Attributes:
        times: by the hash of its ids, how many times a text of each side is there, or a pair.
    """

    def __init__(self, width: int, pairs: bool) -> None:
        self.positive, self.negative, self.differences = (Moments(width) for _ in range(3))
        self.pairs = pairs
        self.times: list[Counter[int]] = [Counter() for _ in range(1 if pairs else 2)]

    def add(self, positive: Tensor, negative: Tensor) -> None:
        self.positive.add(positive)
        self.negative.add(negative)
        if self.pairs:
            self.differences.add(positive - negative)

    def count(self, text: Texts) -> None:
        """Count the texts of a row whose states are added."""
        ids = [tuple(x) for x in (text.positive, text.negative) if x is not None]
        if self.pairs:
            self.times[0][hash(tuple(ids))] += 1
        else:
            self.times[int(text.positive is None)][hash(ids[0])] += 1

    @property
    def read(self) -> int:
        """How many texts, or pairs, were read."""
        return sum(times.total() for times in self.times)

    @property
    def different(self) -> int:
        """How many of these differ."""
        return sum(map(len, self.times))

    def statistics(self, behaviour: str) -> Statistics:
        a, b = sides = self.positive, self.negative
        low, high = (max(ends) for ends in zip(*(m.concentration for m in sides), strict=True))
        step = _step(a.n, a.mean, b.n, b.mean)
        # both responses of a pair follow the same prompt, so that they are no independent samples
        samples = [self.differences] if self.pairs else [*sides]
        return Statistics(
            behaviour=behaviour,
            pairs=self.pairs,
            n_positive=a.n,
            n_negative=b.n,
            mean_positive=a.mean,
            mean_negative=b.mean,
            trace=max(m.trace for m in sides),
            concentration=(low + high) / 2,
            concentration_error=(high - low) / 2,
            interval=interval(a.mean - b.mean, samples, [x.values() for x in self.times]),
            spreads=(a.variance_along(step), b.variance_along(step)),
        )


def _step(n: int, mean: Tensor, other_n: int, other_mean: Tensor) -> Tensor:
    return (n * mean - other_n * other_mean) / (n + other_n)


@torch.no_grad()
@explained()
def statistics(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Any],
    *,
    tag: str = TAG,
    max_batch: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
) -> dict[str, Statistics]:
    """The statistics of each behaviour's texts, from one reading of each (arXiv:2403.18742).

    Rows are statements, ``{"behaviour": "kindness", "text": ..., "label": True}``, read as they
    stand with the special tokens that the tokenizer puts around them. Or they are pairs of
    responses as trainers take them, with a tag beside: ``{"behaviour": ..., "prompt": ...,
    "chosen": ..., "rejected": ...}``, or with `prompt_ids`, `chosen_ids` and `rejected_ids`. Where
    `prompt` is not there or is the text of the first message of whole conversations, the prompt is
    what both responses begin with, as TRL's `maybe_extract_prompt` finds it; trainers of such rows
    want that text dropped. Pairs are encoded as `training` encodes them, and read at the last token
    of each response, EOS where it has one.

    A text is forgotten once it is read. Of each side of a behaviour, at most 2 H states of H
    numbers are kept, or 4,096 above a width of 4,096. There the largest eigenvalue of more texts
    than that is found up to a 4,096th of the trace or less, `concentration_error`; a warning says
    where that is more than 1 %.

    Beside these moments a number a distinct text is kept, which says how many times it is there.
    Means and covariances are of all texts, but the interval counts equal ones as one draw; a
    warning says where more than a tenth of a behaviour's texts are repeats.

    Args:
        model: a causal LM, or a `Model` with an adapter.
        tokenizer: its tokenizer; None: that of the `Model`.
        rows: any iterable of mappings, such as a list, a `datasets.Dataset` or a generator.
        tag: the key of the name of a row's behaviour.
        max_batch: how many texts share a forward at most; None: as many as memory is meant for.
        progress: whether to show a bar on stderr; by default where there are several rows. Or a
            function, which is called with how many rows were read since its last call.

    Returns:
        The statistics by behaviour, in the order of the first rows of each. Rows without a tag,
        without a token, with more tokens than the model's context or with a state that is not
        finite are left out, as are behaviours that have texts of one side only, with warnings that
        name them.

    Raises:
        TypeError, ValueError: name the row, the key, what it was and what it must be; or no
            behaviour is left.
        NotImplementedError: the head reads something else than the states of the backbone.
    """
    check_running(max_batch, progress)
    states = LastStates(model)
    tokenizer = states.tokenizer if tokenizer is None else tokenizer
    reader = Reader(tokenizer, tag, states.model.vocabulary, states.model.context)
    sides: dict[str, _Sides] = {}
    texts = reader(rows)
    with _bar(rows, progress) as say:
        count = _Count(say)
        while chunk := list(islice(texts, CHUNK)):
            _add(sides, chunk, states, reader, max_batch, count)
            count.add(reader.taken - count.done)  # those that were left out
    reader.left_out.warn()
    found = {}
    for behaviour, side in sides.items():
        if side.positive.n and side.negative.n:
            found[behaviour] = one = side.statistics(behaviour)
            if one.concentration_error > 0.01 * one.concentration:
                warn(
                    f"concentration of {behaviour!r} is {one.concentration:.4g} within "
                    f"{one.concentration_error:.2g}: its states are wider than {EXACT:,}"
                )
        else:
            label = bool(side.positive.n)
            warn(f"behaviour {behaviour!r} has texts of label {label} only; it is left out")
    if not found:
        raise ValueError("rows has no behaviour with texts of both labels; it must have one")
    _warn_of_repeats({behaviour: sides[behaviour] for behaviour in found})
    return found


def _warn_of_repeats(sides: Mapping[str, _Sides]) -> None:
    """Name the behaviour with the largest share of repeats, where that is more than a tenth."""
    shares = {behaviour: 1 - side.different / side.read for behaviour, side in sides.items()}
    most = max(shares, key=shares.__getitem__)
    if shares[most] > REPEATS:
        side, others = sides[most], sum(share > REPEATS for share in shares.values()) - 1
        warn(
            f"of {side.read} {'pairs' if side.pairs else 'texts'} of {most!r} {side.different} are "
            "different; the interval counts each once"
            + (f" ({others} more behaviours have such repeats)" if others > 1 else "")
            + (" (1 more behaviour has such repeats)" if others == 1 else "")
        )


class _Count:
    """Counts the rows that are done, and says so."""

    def __init__(self, say: Callable[[int], object]) -> None:
        self.say, self.done = say, 0

    def add(self, rows: int) -> None:
        self.done += rows
        if rows:
            self.say(rows)


@contextmanager
def _bar(
    rows: Iterable[Any], progress: bool | Callable[[int], object] | None
) -> Iterator[Callable[[int], object]]:
    """What to call with how many rows were read: what was given, or that of a bar."""
    if callable(progress):
        yield progress
        return
    total = len(rows) if isinstance(rows, Sized) else None
    with progress_bar(0 if progress is False else total, "row") as bar:
        yield bar.update


def _add(
    sides: dict[str, _Sides],
    chunk: Sequence[Texts],
    states: LastStates,
    reader: Reader,
    max_batch: int | None,
    count: _Count,
) -> None:
    """Read texts, and add their states to the moments of their behaviours."""
    each = [(i, side) for i, row in enumerate(chunk) for side in (2, 3) if row[side] is not None]
    texts: list[Any] = [chunk[i][side] for i, side in each]
    unread = Counter(i for i, _ in each)

    def seen(place: int) -> None:
        row = each[place][0]
        unread[row] -= 1
        count.add(int(not unread[row]))

    found = dict(zip(each, states(texts, max_batch, seen), strict=True))
    width = len(next(iter(found.values())))
    of: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for i, row in enumerate(chunk):
        own = [found.get((i, side)) for side in (2, 3)]
        if not all(x is None or bool(x.isfinite().all()) for x in own):
            reader.left_out.add(row.number, "with a state that is not finite")
            continue
        if row.behaviour not in sides:
            sides[row.behaviour] = _Sides(width, bool(reader.pairs))
        sides[row.behaviour].count(row)
        for x, kept in zip(own, of.setdefault(row.behaviour, ([], [])), strict=True):
            if x is not None:
                kept.append(x)
    for behaviour, both in of.items():
        positive, negative = (torch.stack(x) if x else torch.empty(0, width).double() for x in both)
        sides[behaviour].add(positive, negative)
