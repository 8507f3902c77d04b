"""A step that is recorded once, proved against the model's own forward, and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....blends.mixes import Mix
from ...simple.structure import foreign_module, keep, known
from ...simple.term_model import TermModel
from ..comparing import distance, worst_of
from ..head import Head
from ..kv_cache import KVCache
from ..modules import ForwardPass
from . import shelf
from .program import Program, Recording, program_of
from .recording import NotTaped, Recorder, storage

if TYPE_CHECKING:
    from ..deltas import Deltas

SHORTEST = 8  # tokens of a response for which recording pays
PROVED = "proved"

Forward = Callable[[Any, Head, Tensor, Tensor, ForwardPass], Tensor]


class Tapes:
    """The steps of one group, each with as many tokens a row as it feeds.

    Attributes:
        bare: the model that runs.
        structures: of the models.
        weights: of `bare`. Programs know them by their addresses, so that these must stay theirs.
        fixed: the storages of the weights.
        foreign: the module of `bare`, if there is one, whose forward is of the caller's own.
        programs: those of earlier calls, and later ones.

    Args:
        forward: the group's own.
        models: of the group. The first one runs.
    """

    def __init__(
        self, forward: Forward, models: Sequence[TermModel], deltas: Deltas | None
    ) -> None:
        self.forward, self.deltas = forward, deltas
        bare = self.bare = models[0].bare
        self.structures = [m.structure for m in models]
        self.weights = (*bare.parameters(), *bare.buffers())
        self.fixed = {storage(x) for x in self.weights}
        self.foreign = foreign_module(bare)
        self.steps: dict[tuple[int | bool, ...], TapedStep] = {}
        self.programs = shelf.lend(self, bare, len(models)) if deltas is None else deltas.programs
        adapters = [a.names if isinstance(a := m.adapter, Mix) else a for m in models]
        layout = None if deltas is None else deltas.layout
        self.programs.settle((self.structures, adapters, shelf.places(self.weights), layout))

    def step(self, shape: Sequence[int], *, some_rows: bool = False) -> TapedStep:
        """The step that feeds ids of this shape, to all rows of the cache or to some."""
        key = *shape, some_rows
        found = self.steps.get(key)
        if found is None:
            found = self.steps[key] = TapedStep(self, tuple(shape), some_rows)
        return found

    @property
    def notes(self) -> list[str]:
        """What does not run natively, for people."""
        each = (step.note for step in [*self.steps.values()])  # A step may be new just now.
        return list(dict.fromkeys(note for note in each if note is not None))


class TapedStep:
    """The forward of a group's step, called as the group's own is.

    The first step is recorded, and native code replays it and all others. The second one is run by
    the model's modules too, unless that was done since the model changed. Where the two differ,
    modules run all further steps.

    Attributes:
        why: why modules run the steps; None where they do not, or not for long.
        program: what is replayed.
        runs: how many steps were run both ways.

    Args:
        shape: of the ids of a step, rows and tokens.
        some_rows: whether the rows are not all of the cache.
    """

    def __init__(self, tapes: Tapes, shape: tuple[int, ...], some_rows: bool) -> None:
        # Not the tapes themselves, which refer to this object.
        self.forward, self.deltas = tapes.forward, tapes.deltas
        self.bare, self.structures, self.fixed = tapes.bare, tapes.structures, tapes.fixed
        self.programs, self.shape = tapes.programs, shape
        self.program: Program | None = None
        self.runs = 0
        self.bound: tuple[KVCache, int] | None = None  # the caches that the tape knows
        self.question = "tape", self.deltas is not None, some_rows, *(n > 1 for n in shape)
        found = known(self.bare, self.structures, self.question)
        self.proved = found == PROVED
        self.why: str | None = None if self.proved else found
        if tapes.foreign is not None:
            self.why = f"{tapes.foreign} has a forward that is not its class's"

    def __call__(
        self, body: Any, head: Head, ids: Tensor, positions: Tensor, forward_pass: ForwardPass
    ) -> Tensor:
        def run() -> Tensor:
            forward_pass.seen.clear()
            return self.forward(body, head, ids, positions, forward_pass)

        if self.why is not None:
            return run()
        inputs = [ids, positions, forward_pass.lengths]
        if self.deltas is not None:
            inputs += self.deltas.scales.values()
        inputs += [x for x in (head.row_weights, forward_pass.rows) if x is not None]
        cache = forward_pass.cache
        own: Tensor | None = None
        if not cache.layers:
            run()  # The first forward of all makes the caches.
        if self.program is None:
            shared = head.weights is not None
            key = self.shape, cache.rows, head.keeps, head.wanted.rows, shared
            self.program = self.programs.of.get(key)
        if self.program is None:
            own = self._record(run, head, inputs, cache)
            if self.program is None:
                return own
            self.programs.keep(key, self.program)
        elif not self.proved:
            own = run()
        states = head.states, head.hidden
        if self.bound is None or self.bound[0] is not cache or self.bound[1] != cache.capacity:
            self.program.bind(cache)
            self.bound = cache, cache.capacity
        self.program.run(inputs)
        logits, head.states, head.hidden = self.program.results
        assert logits is not None
        if own is not None and not self._agrees(logits, own):
            run()  # What the tape has written into caches is written anew.
            head.states, head.hidden = states
            return own
        return logits

    @property
    def note(self) -> str | None:
        """What does not run natively, for people; None if all does."""
        if self.why is not None:
            return f"its modules run every step: {self.why}"
        if self.program is None or not self.program.called:
            return None
        return f"torch runs parts of each step: {', '.join(sorted(set(self.program.called)))}"

    def _record(
        self, run: Callable[[], Tensor], head: Head, inputs: list[Tensor], cache: KVCache
    ) -> Tensor:
        """Run a step by modules, and write its program."""
        with Recorder() as recorder:
            logits = run()
        results = logits, head.states, head.hidden
        rows = len(inputs[0])
        recording = Recording(recorder.calls, inputs, results, cache, self.fixed, rows)
        try:
            self.program = program_of(recording)
        except NotTaped as reason:
            self._finds(str(reason))
        return logits

    def _agrees(self, by_tape: Tensor, own: Tensor) -> bool:
        """Whether the tape and the modules gave the same logits. Otherwise the tape is dropped."""
        self.runs += 1
        off = worst_of(*distance(by_tape, own))
        if off > 1e-3 + 16 * torch.finfo(own.dtype).eps:
            self._finds(f"its logits on a tape are off by {off:.2g} of their spread")
            return False
        if self.runs > 1:  # The first one is of the tokens that were recorded.
            self._finds(PROVED)
        return True

    def _finds(self, finding: str) -> None:
        keep(self.bare, self.structures, self.question, finding)
        self.proved = finding == PROVED
        if not self.proved:
            self.program, self.why = None, finding
            self.programs.of.clear()
