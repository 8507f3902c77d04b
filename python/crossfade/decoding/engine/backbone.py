"""A model's modules as the engine runs them, beside the model, which stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.hf import text_config
from ..simple.replica import Replica
from ..simple.term_model import TermModel
from .deltas import Deltas
from .head import Head, split
from .modules import Forward, ForwardPass, Unsupported, linear_forwards
from .tape import Tapes


class Backbone:
    """The layers that the models of a group share, and the head of the first of them.

    Attributes:
        backend: of `ops.linear`.
        head: computes the logits that are wanted; see `Head.reading`.
        tapes: records steps; None: modules run all of them.

    Args:
        models: of each lane, the first model that reads it. The first one of all runs.
        terms: the places of those that go through the head, among all models of the call.
        deltas: the lanes' adapters. None: all lanes have one adapter, which is switched on here.
        kernels, compile: as in `Engine`.
        tape: whether steps are recorded, where they can be.
        attention: Transformers' name of the function that layers attend by.
    """

    def __init__(
        self,
        models: Sequence[TermModel],
        terms: Sequence[int],
        deltas: Deltas | None,
        *,
        kernels: bool,
        compile: bool,
        tape: bool,
        attention: str,
    ) -> None:
        first = models[0]
        self.model, self.device, self.deltas = first.bare, first.device, deltas
        self.config = text_config(first.bare)
        self.backend = None if kernels else "reference"
        native = kernels and self.device.type == "cpu"
        replacements: dict[Any, Forward] = linear_forwards(self.model) if native else {}
        if deltas is not None:
            replacements.update(deltas.replacements)
        body, self.head = split(self.model, terms, self.backend)
        replacements.update(self.head.replacements)
        replica = Replica(self.model)
        replica.install(replacements)
        replica.silence()
        for state in first.adapter_states if deltas is None else ():
            state.apply(replica)
        text_config(replica.model)._attn_implementation = attention
        self.body = replica[body]
        # As a method it would refer to this object in a circle.
        self.compiled: Any = torch.compile(forward, dynamic=False) if compile else None
        self.tapes = Tapes(forward, models, deltas) if tape and native and not compile else None

    @property
    def notes(self) -> list[str]:
        """What was not recorded, and why."""
        return [] if self.tapes is None else self.tapes.notes

    def step(self, ids: Tensor, *, some_rows: bool, every: bool) -> Any:
        """What runs a step that feeds ``ids [rows, n]``: `forward`, compiled, or recorded.

        Args:
            some_rows: whether other rows of the caches are fed nothing.
            every: whether the logits after each of the n tokens are wanted.
        """
        if self.tapes is not None and every:
            return self.tapes.step(ids.shape, some_rows=some_rows)
        return self.compiled if self.compiled is not None and ids.shape[1] == 1 else forward

    def run(
        self, ids: Tensor, positions: Tensor, forward_pass: ForwardPass, how: Any = None
    ) -> Tensor:
        """Run a forward, and give what the head was asked for.

        Args:
            how: what `step` gave; None: `forward`.

        Raises:
            Unsupported: some layers did not attend over the engine's caches.
        """
        logits: Tensor = (how or forward)(self.body, self.head, ids, positions, forward_pass)
        if set(forward_pass.cache.layers) != set(range(self.config.num_hidden_layers)):
            raise Unsupported("its layers do not all use Transformers' attention interface")
        return logits


def forward(
    body: Any, head: Head, ids: Tensor, positions: Tensor, forward_pass: ForwardPass
) -> Tensor:
    """One forward of a model over the engine's caches, and what is wanted of its logits."""
    output = body(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        return_dict=True,
        logits_to_keep=head.keep,
        crossfade=forward_pass,
    )
    return head.logits(output)
