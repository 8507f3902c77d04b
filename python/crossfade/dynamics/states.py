"""The states that a model's output head reads at the last token of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blends.blend import Model
from ..blends.mixes import Mix
from ..decoding.engine.prefill import Prefill
from ..decoding.forms import Ids
from ..decoding.simple.replica import Replica
from ..decoding.simple.term_model import TermModel
from ..models.after_head import after_head


def term_model(model: Any) -> TermModel:
    """A model that reads texts as they stand, with dropout off; the model itself stays as it is.

    Args:
        model: a causal LM, or a `Model` with an adapter. It may be in the middle of its training.

    Raises:
        ValueError: the `Model` has a prompt of its own, or a mix of adapters a request.
    """
    term = model if isinstance(model, Model) else Model(model)
    for name in ("system", "prompt"):
        if getattr(term, name) is not None:
            raise ValueError(
                f"model has {name}={getattr(term, name)!r:.80}; it must have none, as texts are "
                "read as they stand"
            )
    if isinstance(term.adapter, Mix) and term.adapter.requests is not None:
        raise ValueError("model has a mix of adapters for each request; it must have one mix")
    adapter: Any = term.adapter  # A mapping became a mix when the term was made.
    inner = term.model
    if inner.training:
        inner = Replica(inner).model.eval()
    return TermModel(inner, term.name or "model", adapter)


class LastStates:
    """Reads whole texts, and gives the head's input at the last token of each.

    That is ``hidden_states[-1]`` of Transformers, which the backbone's last norm has seen already.
    Dropout is off; the model itself stays as it is.

    Args:
        model: a causal LM, or a `Model` with an adapter.

    Raises:
        ValueError: the `Model` has a prompt of its own, or a mix of adapters a request.
        NotImplementedError: the head reads something else than the states of the backbone.
    """

    def __init__(self, model: Any) -> None:
        self.model = term_model(model)
        self.tokenizer = model.tokenizer if isinstance(model, Model) else None
        self.prefill = Prefill(self.model)
        twin = Replica(self.model.bare).model
        reads = None if twin.get_output_embeddings() is None else after_head(twin).reads
        if reads is None:
            raise NotImplementedError(
                f"model is a {type(self.model.bare).__name__}, whose head reads something else "
                "than the last states of its backbone; not supported yet"
            )
        self.scale = reads

    def __call__(
        self,
        texts: Sequence[Ids],
        max_batch: int | None = None,
        seen: Callable[[int], object] | None = None,
    ) -> Tensor:
        """``[texts, H]`` float64 on the CPU.

        Args:
            max_batch: how many texts share a forward at most; None: as many as memory is meant for.
            seen: is called with the place of each text once it is read.
        """
        found: dict[int, Tensor] = {}
        for i, states in self.prefill.hidden(texts, [len(t) - 1 for t in texts], rows=max_batch):
            found[i] = states[0].to("cpu", torch.float64) * self.scale
            if seen is not None:
                seen(i)
        return torch.stack([found[i] for i in range(len(texts))])
