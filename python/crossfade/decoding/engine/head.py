"""A model's output head, which computes those logits alone that somebody reads.

The hidden states that it is given are at hand for further heads over the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...models.quantized import QuantizedLinear
from ...models.value_heads import LowRankHead, WideLinear
from ..ranks import local, shard_of
from .modules import Forward, dtype_of, is_plain, weight_of


@dataclass(frozen=True)
class Wanted:
    """What is read of a forward's logits: by default those of each row's last position.

    Attributes:
        logits: False where none are read, as when a prompt is read but for its last token.
        at: ``[B, n]``: the positions of each row that are read. None: the last one of all rows.
        every: whether all positions are read.
        columns: the columns of the head that are read, where others may be left out; None: all.
        states: whether the hidden states are read in the place of logits. Nothing may come after
            the head.
        rows: how many of the rows, from the first on, go through the head; None: all.
        slots: ``[n]``: the slots that the rows of each term are in; None: all, in order.
    """

    logits: bool = True
    at: Tensor | None = None
    every: bool = False
    columns: Tensor | None = None
    states: bool = False
    rows: int | None = None
    slots: Tensor | None = None

    @property
    def last(self) -> bool:
        """Whether the last position of all rows is read, and no other."""
        return self.at is None and not self.every


class Head:
    """The head of a model. One that is no layer of a known kind is run by the model itself.

    Attributes:
        layer: the head, if it is a plain linear layer or a value head; None: the model runs it.
        module: the same, if it is a plain linear layer.
        weights: ``[slots, terms]`` of the blend, where this model's terms share the head: their
            hidden states are blended before it. None: the states of each term go through it.
        some_columns: whether columns that nobody reads are left out.
        wanted: what is read of the logits of the forward under way.
        row_weights: those of `weights` that the rows of this forward have.
        hidden: where terms share the head, the states ``[terms * slots, 1, H]`` of the last step.
        shard: the columns that this rank has of a head in shards; None: it has all of them.
        whole: whether all columns are gathered from the ranks.
        keeps: whether `states` are kept, for further heads.
        states: the hidden states ``[B, n, H]`` at the positions wanted of the last forward.

    Args:
        terms: the places of this model's terms among those of the blend.
        backend: of `ops.linear`.
    """

    def __init__(
        self, module: Any, terms: Sequence[int], backend: str | None, device: torch.device
    ) -> None:
        self.shard = shard_of(module)
        self.whole = True
        self.layer: Any = layer_of(module) if self.shard is None else module
        self.module: Any = module if is_plain(module) or self.shard is not None else None
        self.backend = backend
        self.keeps = False
        self.states: Tensor | None = None
        self.weights: Tensor | None = None
        self.some_columns = False
        self.terms = tuple(terms)
        self.wanted = Wanted()
        self.row_weights: Tensor | None = None
        self.hidden: Tensor | None = None

    @property
    def replacements(self) -> dict[Any, Forward]:
        """What runs in the place of modules' own forwards: `project` in that of the head."""
        return {} if self.layer is None else {self.layer: self.project}

    @contextmanager
    def reading(self, wanted: Wanted) -> Iterator[None]:
        """Forwards within this context give the logits that are wanted."""
        self.wanted, w = wanted, self.weights
        self.row_weights = w if w is None or wanted.slots is None else w[wanted.slots]
        try:
            yield
        finally:
            self.wanted = Wanted()

    @property
    def keep(self) -> int:
        """Hugging Face's `logits_to_keep`, where 0 means all positions."""
        return 1 if self.wanted.last else 0

    def logits(self, output: Any) -> Tensor:
        """The logits ``[B, V]`` of a model's output, or ``[B, n, V]`` of the positions wanted."""
        if self.wanted.last:
            return output.logits[:, -1]
        return self._at(output.logits) if self.layer is None else output.logits

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, n, V]`` of hidden states ``[B, tokens, H]``, of the positions wanted."""
        head, wanted = self.module, self.wanted
        hidden = self._at(hidden)
        if not wanted.logits:  # What comes after the head gets zeros of the right shape.
            return hidden.new_zeros(*hidden.shape[:-1], self.layer.out_features)
        if wanted.states:
            return hidden
        if self.keeps:
            self.states = hidden
        hidden = hidden[: wanted.rows]
        if head is None:
            return product(self.layer, hidden, self.backend)
        if self.row_weights is not None:  # sum_k w_k (W h_k) = W (sum_k w_k h_k)
            self.hidden = None if torch.compiler.is_compiling() else hidden
            each = self.row_weights.to(hidden.device).unbind(1)
            hidden = mix(hidden, torch.stack([each[k] for k in self.terms], dim=1))
        whole = wanted.columns is None or not self.some_columns
        if whole or type(head) is QuantizedLinear:  # whose rows are packed together
            bias = None if head.bias is None else local(head.bias)
            return self._gathered(ops.linear(hidden, weight_of(head), bias, backend=self.backend))
        few = head.weight[wanted.columns]
        bias = None if head.bias is None else head.bias[wanted.columns]
        logits = hidden.new_zeros(*hidden.shape[:-1], len(head.weight))
        logits[..., wanted.columns] = ops.linear(hidden, few, bias, backend=self.backend)
        return logits

    def _gathered(self, logits: Tensor) -> Tensor:
        """The logits of all columns, if these are wanted and others are on other ranks."""
        return logits if self.shard is None or not self.whole else self.shard.gathered(logits)

    def _at(self, x: Tensor) -> Tensor:
        """What ``[B, tokens, d]`` has at the positions wanted."""
        if self.wanted.last:
            return x[:, -1:]
        return x if self.wanted.at is None else take(x, self.wanted.at)

    def of_each(self) -> Tensor | None:
        """``[terms * slots, n, V]`` of the last step, of each term that shares the head; None if
        its states were not kept, as in compiled steps."""
        if self.hidden is None:
            return None
        return self._gathered(
            ops.linear(self.hidden, weight_of(self.module), None, backend=self.backend)
        )


def layer_of(module: Any) -> Any:
    """A head, if it is a layer whose numbers depend on hidden states alone; else None."""
    is_value_head = type(module) in (LowRankHead, WideLinear) and "forward" not in vars(module)
    return module if is_value_head or is_plain(module) else None


def product(layer: Any, hidden: Tensor, backend: str | None) -> Tensor:
    """What a head that `layer_of` gives makes of hidden states ``[..., H]``."""
    if isinstance(layer, LowRankHead):
        return layer(hidden)
    numbers = ops.linear(hidden.to(dtype_of(layer)), weight_of(layer), layer.bias, backend=backend)
    return numbers.float() if isinstance(layer, WideLinear) else numbers


class ScoreHead(Head):
    """The layer that a sequence classifier, or a model with one number a token, has as its head."""

    def __init__(self, score: Any, device: torch.device) -> None:
        super().__init__(None, [], None, device)
        self.score = score

    def logits(self, output: Any) -> Tensor:
        """``[B, labels]`` at the last position, or ``[B, n, labels]`` of the positions wanted."""
        hidden = self._at(output.last_hidden_state)
        found = self.score(hidden) if self.wanted.logits else hidden
        return found[:, 0] if self.wanted.last else found


def split(model: Any, terms: Sequence[int], backend: str | None) -> tuple[Any, Head]:
    """The part of a model that the engine runs, and the head over it."""
    device = next(model.parameters()).device
    own, score = model.get_output_embeddings(), score_layer(model)
    if own is None and score is not None:
        return model.base_model, ScoreHead(score, device)
    return model, Head(own, terms, backend, device)


def score_layer(model: Any) -> Any:
    """The layer that a causal sequence or token classifier has over its backbone, if it is one."""
    for name in ("score", "classifier"):
        layer = getattr(model, name, None)
        if layer is not None and model.base_model is not model:
            return layer
    return None


def take(x: Tensor, at: Tensor) -> Tensor:
    """``[B, n, d]``: what each row of ``[B, tokens, d]`` has at its positions ``at [B, n]``."""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def mix(hidden: Tensor, weights: Tensor) -> Tensor:
    """``sum_k w_k h_k`` of hidden states ``[terms * slots, n, H]``; weights ``[slots, terms]``."""
    slots, terms = weights.shape
    w = weights.T.reshape(terms, slots, 1, 1)
    h = hidden.view(terms, slots, *hidden.shape[1:]).float()
    # A term of weight 0 adds nothing, not even where its states are infinite or NaN.
    return torch.where(w == 0, 0.0, w * h).sum(dim=0).to(hidden.dtype)
