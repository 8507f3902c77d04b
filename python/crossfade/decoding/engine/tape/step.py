"""A step that is recorded once, proved against the model's own forward, and then replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..deltas import Deltas
from ..head import Head
from ..modules import ForwardPass
from .program import Program, Recording
from .recording import NotTaped, Recorder, storage

WARM = 2  # steps that modules run before one is recorded: short calls need no tape


class TapedStep:
    """The forward of a group's step, called as `group.forward` is.

    The first steps are run by the model's modules; then one is recorded, and the next is run both
    ways. From then on native code replays it.

    Attributes:
        why: why there is no tape; None while there may be one.
        program: what is replayed.
    """

    def __init__(self, forward: Any, model: Any, deltas: Deltas | None) -> None:
        self.forward, self.deltas = forward, deltas
        self._fixed = {storage(x) for x in (*model.parameters(), *model.buffers())}
        self.why: str | None = None
        self.program: Program | None = None
        self._proved = False
        self._steps = 0
        self._bound: tuple[Any, int] | None = None  # the cache that the tape knows, and its size

    def __call__(
        self, body: Any, head: Head, ids: Tensor, positions: Tensor, forward_pass: ForwardPass
    ) -> Tensor:
        self._steps += 1
        if self.why is not None or self._steps <= WARM:
            return self.forward(body, head, ids, positions, forward_pass)
        inputs = [ids, positions, forward_pass.lengths]
        if self.deltas is not None:
            inputs += self.deltas.scales.values()
        if head.weights is not None:
            inputs.append(head.weights)
        if self.program is None:
            return self._record(body, head, inputs, forward_pass)
        if self._bound != (forward_pass.cache, forward_pass.cache.capacity):
            self.program.bind(forward_pass.cache)
            self._bound = forward_pass.cache, forward_pass.cache.capacity
        if not self._proved:
            return self._prove(body, head, inputs, forward_pass)
        self.program.run(inputs)
        logits, head.states, head.hidden = self.program.results
        return logits

    def _record(
        self, body: Any, head: Head, inputs: list[Tensor], forward_pass: ForwardPass
    ) -> Tensor:
        with Recorder() as recorder:
            logits = self.forward(body, head, *inputs[:2], forward_pass)
        results = logits, head.states, head.hidden
        try:
            self.program = Program(
                Recording(
                    recorder.calls, inputs, results, forward_pass.cache, self._fixed, len(inputs[0])
                )
            )
        except NotTaped as reason:
            self.why = str(reason)
        return logits

    def _prove(
        self, body: Any, head: Head, inputs: list[Tensor], forward_pass: ForwardPass
    ) -> Tensor:
        """Run a step both ways. What attention writes into caches, it writes twice."""
        assert self.program is not None
        self.program.run(inputs)
        by_tape = self.program.results[0].clone()
        logits = self.forward(body, head, *inputs[:2], forward_pass)
        off = _off(by_tape, logits)
        if off <= 1e-3 + 16 * torch.finfo(logits.dtype).eps:
            self._proved = True
        else:
            self.program, self.why = None, f"its logits on a tape are off by {off:.2g} of their spread"
        return logits


def _off(found: Tensor, own: Tensor) -> float:
    """How far logits ``[rows, V]`` are off a model's own, as a part of their spread."""
    found, own = found.double(), own.double()
    alike = (found == own) | (found.isnan() & own.isnan())
    found, own = (x.masked_fill(alike, 0.0) for x in (found, own))
    spread = (own - own.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-30)
    off = ((found - own).norm(dim=-1) / spread).nan_to_num(torch.inf)
    return float(off.max()) if off.numel() else 0.0
