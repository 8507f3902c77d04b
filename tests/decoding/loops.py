"""Open loops over tiny models, and what each row would have written in a loop of its own."""

from __future__ import annotations

from typing import Any

import torch
from crossfade.decoding.engine.options import Engine
from crossfade.decoding.engine.runner import EngineRunner
from crossfade.decoding.generation import Generation
from crossfade.decoding.job import WEIGHTS, Job, Row
from crossfade.decoding.loop import Loop
from crossfade.decoding.mixer import Mixer
from crossfade.decoding.output import Filtered
from crossfade.decoding.rows import Slots, Written, kept
from crossfade.decoding.search.loops import search_loop


class Open:
    """A loop that jobs join, cancel and change, and all that came of it.

    Args:
        generation: checks requests and makes jobs of them.
        longest, limit: what the runner and the slots are told at first: they learn of longer ones.
    """

    def __init__(
        self,
        generation: Generation,
        first: Job,
        places: int,
        engine: Engine | None = None,
        longest: int = 4,
        limit: int = 4,
        tells: bool = True,
    ) -> None:
        engine, call = engine or Engine(), generation.call
        self.generation, blend = generation, call.blend
        search = first.search
        entropy = None if search is None else search.settings.most_entropy
        kinds = kept(len(blend.terms) * first.term_logprobs, 0, entropies=entropy is not None)
        parts = 0 if search is None else 1 + search.weights.shape[1]
        chunk = None if search is None else search.settings.chunk_length
        self.slots = Slots(places, first.table, kinds, parts, limit, call.device, chunk, entropy)
        self.runner = EngineRunner(call.models, [longest] * len(call.models), places, limit, engine)
        table = self.slots.table
        why = "the log-probs of each term are asked for" if first.term_logprobs else None
        self.runner.fit(blend, table["weights"], call.vocabulary, why)
        mixer = Mixer(
            blend,
            [table[name] for name in WEIGHTS],
            call.vocabulary,
            self.runner.models_of_logits,
        )
        how: dict[str, Any] = {"tells": tells}
        common = (self.runner, mixer, self.slots, range(places))
        if search is None:
            self.loop = Loop(*common, **how)
        else:
            self.loop = search_loop(search, limit, engine, *common, **how)
        self.told: dict[Row, list[int]] = {}
        self.left: dict[Row, Written] = {}

    @torch.no_grad()
    def advance(self) -> bool:
        """Whether anything happened; it is kept in `told` and `left`."""
        happened = self.loop.advance()
        if happened is None:
            return False
        for news in happened.news:
            row, tokens = news.row, news.columns["tokens"].tolist()
            assert tokens, "only new tokens are told"
            assert row not in self.left, "a row that has left writes no more"
            self.told.setdefault(row, []).extend(tokens)
        for written in happened.left:
            assert written.row not in self.left, "a row leaves once"
            self.left[written.row] = written
        return True

    def drain(self, most: int = 10_000) -> None:
        for _ in range(most):
            if not self.advance():
                return
        raise AssertionError("the loop does not end")

    def slot(self, row: Row) -> int | None:
        return next((s for s, r in self.loop.seated.items() if r is row), None)

    def count(self, row: Row) -> int:
        """Tokens that a seated row has written."""
        slot = self.slot(row)
        assert slot is not None
        return 0 if slot in self.loop.reading else int(self.slots.new[slot])

    def check_places(self) -> None:
        """Every slot is free, has a row, or is reading for rows that share its prompt."""
        loop, places = self.loop, len(self.slots.each)
        taken = loop.seated.keys() | loop.reading.keys()
        assert len(set(loop.places.free)) == len(loop.places.free)
        assert not taken & set(loop.places.free)
        assert len(loop.places.free) + len(taken) == places
        assert loop.watch.rows.keys() == loop.seated.keys()
        told = {} if loop.teller is None else loop.teller.told
        assert set(told) <= set(loop.seated.values())
        live = self.slots.live.tolist()
        assert not any(live[s] for s in range(places) if s not in loop.seated or s in loop.reading)
        assert all(not loop.seated.get(s) or s in taken for s in range(places))
        for group in self.runner.groups:
            used = {r % places for r, u in enumerate(group.used) if u}
            assert used <= loop.seated.keys() - loop.reading.keys(), "a place that nobody has grows"


def same(ours: Written, theirs: Written, what: str = "") -> None:
    """Two rows wrote the same."""
    assert ours.ids == theirs.ids, what
    assert (ours.finished, ours.failed, ours.ended) == (
        theirs.finished,
        theirs.failed,
        theirs.ended,
    ), what
    for name, column in ours.columns.items():
        if name != "tokens":
            torch.testing.assert_close(column, theirs.columns[name], msg=f"{name} {what}")
    torch.testing.assert_close(ours.values, theirs.values, equal_nan=True)
    if isinstance(ours.outcome, Filtered):  # Its numbers follow from values, within rounding.
        close = {"atol": 1e-4, "rtol": 1e-4, "msg": what}
        torch.testing.assert_close([*ours.outcome], [*theirs.outcome], **close)
    else:
        assert str(ours.outcome) == str(theirs.outcome), what


def begins(ours: Written, whole: Written, what: str = "") -> None:
    """A row that was cut wrote the beginning of what it writes alone."""
    n = len(ours)
    assert ours.ids == whole.ids[:n], what
    assert not ours.ended, what
    for name, column in ours.columns.items():
        if name != "tokens":
            torch.testing.assert_close(column, whole.columns[name][:n], msg=f"{name} {what}")
