"""A model's output head, for what anybody reads of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .modules import Forward, is_plain


@dataclass(frozen=True)
class Wanted:
    """What is read of a forward's logits: by default those of each row's last position."""

    logits: bool = True  # False: none, of prompts whose last token is yet to be read
    every: bool = False  # of every position
    last: Tensor | None = None  # [B] each row's last position; None: the last one of all
    columns: Tensor | None = None  # of the head, where others may be left out; None: all


class Head:
    """The head of a model, which is the model's own where it is not a plain linear layer.

    Attributes:
        weights: ``[slots, K]`` of the blend, where this model's terms share the head; None: they
            have a head each.
        some_columns: whether columns that are not wanted are left out, not computed.
    """

    def __init__(
        self, module: Any, terms: Sequence[int], backend: str | None, device: torch.device
    ) -> None:
        self.module: Any = module if is_plain(module) else None
        self.backend = backend  # of `ops.linear`
        self.weights: Tensor | None = None
        self.some_columns = False
        self.terms = torch.tensor(terms, device=device)
        self.wanted = Wanted()

    @property
    def forwards(self) -> dict[Any, Forward]:
        return {} if self.module is None else {self.module: self.project}

    @contextmanager
    def reading(self, wanted: Wanted) -> Iterator[None]:
        self.wanted = wanted
        try:
            yield
        finally:
            self.wanted = Wanted()

    @property
    def keep(self) -> int:
        """Hugging Face's `logits_to_keep`: 0 is all positions."""
        return 1 if self.wanted.last is None and not self.wanted.every else 0

    def logits(self, output: Any) -> Tensor:
        """``[B, V]`` of what a model gave; of every position ``[B, n, V]``."""
        last = self.wanted.last
        if self.wanted.every:
            return output.logits
        if self.module is None and last is not None:
            return take(output.logits, last)[:, 0]
        return output.logits[:, -1]

    def project(self, hidden: Tensor) -> Tensor:
        """Logits ``[B, 1, V]`` of hidden states ``[B, n, H]``; of every position ``[B, n, V]``."""
        head, wanted = self.module, self.wanted
        if not wanted.every:
            hidden = hidden[:, -1:] if wanted.last is None else take(hidden, wanted.last)
        if not wanted.logits:  # what comes after the head may count its columns
            return hidden.new_zeros(*hidden.shape[:-1], len(head.weight))
        if self.weights is not None:  # sum_k w_k (W h_k) = W (sum_k w_k h_k)
            hidden = mix(hidden, self.weights.to(hidden.device)[:, self.terms])
        if wanted.columns is None or not self.some_columns:
            return ops.linear(hidden, head.weight, head.bias, backend=self.backend)
        few = head.weight[wanted.columns]
        bias = None if head.bias is None else head.bias[wanted.columns]
        logits = hidden.new_zeros(*hidden.shape[:-1], len(head.weight))
        logits[..., wanted.columns] = ops.linear(hidden, few, bias, backend=self.backend)
        return logits


class ScoreHead(Head):
    """The `score` layer over a backbone: a scalar head, or that of a sequence classifier."""

    def __init__(self, score: Any, device: torch.device) -> None:
        super().__init__(None, [], None, device)
        self.score = score

    def logits(self, output: Any) -> Tensor:
        """``[B, labels]`` at each row's last position."""
        hidden, last = output.last_hidden_state, self.wanted.last
        hidden = hidden[:, -1:] if last is None else take(hidden, last)
        return self.score(hidden)[:, 0] if self.wanted.logits else hidden[:, 0]


def split(model: Any, terms: Sequence[int], backend: str | None) -> tuple[Any, Head]:
    """What is run of a model, and its head."""
    device = next(model.parameters()).device
    own, score = model.get_output_embeddings(), score_layer(model)
    if own is None and score is not None:
        return model.base_model, ScoreHead(score, device)
    return model, Head(own, terms, backend, device)


def score_layer(model: Any) -> Any:
    """What a causal sequence or token classifier puts on its backbone; None: it has none such."""
    for name in ("score", "classifier"):
        layer = getattr(model, name, None)
        if layer is not None and model.base_model is not model:
            return layer
    return None


def take(x: Tensor, at: Tensor) -> Tensor:
    """``[B, 1, d]``: each row of ``[B, n, d]`` at its own position."""
    return x[torch.arange(len(x), device=x.device), at][:, None]


def mix(hidden: Tensor, weights: Tensor) -> Tensor:
    """``sum_k w_k h_k`` of hidden states ``[terms * slots, n, H]``; weights ``[slots, terms]``."""
    slots, terms = weights.shape
    w = weights.T.reshape(terms, slots, 1, 1)
    h = hidden.view(terms, slots, *hidden.shape[1:]).float()
    return torch.where(w == 0, 0.0, w * h).sum(dim=0).to(hidden.dtype)  # a term of weight 0 is out
