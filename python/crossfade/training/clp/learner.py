"""The policy as Transformers' trainer calls it: log-probs of responses, each at its own mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...decoding.engine.prefill import hidden_states
from ...decoding.simple.adapters import MixedRows
from ...decoding.simple.replica import Replica
from ...models.hf import text_config, underlying
from ...ops import linear_logp
from ..fused_head import IGNORED, check_logits
from ..logits import Logits


class Learner(nn.Module):
    """The modules of a PEFT model, over its own weights, in which each row has its own mix.

    A layer computes ``W x + sum_k mix[row, k] B_k A_k x``, in PEFT's own forward. They are copies
    of the model's modules, so that decoding finds the model as it is.

    Args:
        base: the plain model that `model` was made of.
        model: a PEFT model.
        names: of its adapters.
    """

    accepts_loss_kwargs = True  # losses are divided by the responses of all accumulated batches

    def __init__(self, base: Any, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.logits = Logits.of(text_config(base), 1.0)
        check_logits(base, self.logits)
        replica = Replica(model)
        self.model: Any = replica.model
        self.rows: Any = MixedRows(model, replica, names, "the policy")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        starts: Tensor,
        labels: Tensor,
        mixes: Tensor,
    ) -> Tensor:
        """The log-prob of each row's response: ``[B]`` float32, or float64 if the model is.

        Layers keep the mixes until the next call, as gradient checkpointing runs them again in the
        backward pass. So nothing may be called in between.

        Args:
            input_ids, attention_mask: ``[B, L]``, padded on the right.
            starts: ``[B]``, where each response begins.
            labels: ``[B, T]``, the tokens of the responses, and `IGNORED` after their ends.
            mixes: ``[B, adapters]``: how much of each adapter a row has.
        """
        self.rows.seat(mixes)
        # what is said of a token is read from the state before it
        states = hidden_states(self.model, input_ids, attention_mask, starts - 1, labels.shape[1])
        mask = labels != IGNORED
        with torch.autocast(states.device.type, enabled=False):
            read, weight, bias = self._head(states)
            softcap, temperature = self.logits.settings()
            found = linear_logp(
                read[mask],
                weight,
                labels[mask],
                bias=bias,
                softcap=softcap or None,
                temperature=temperature,
            ).logp
        # masked_scatter keeps the graph even if there is no token: the gradient is then 0
        return found.new_zeros(mask.shape).masked_scatter(mask, found).sum(dim=1)

    def _head(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head reads ``[B, T, H]``, its weight ``[V, H]`` and its bias.

        With adapters of the head, ``W x + sum_k mix_k B_k A_k x`` is one product: that of
        ``[W, B_1, B_2, ...]`` and ``[x, mix_1 A_1 x, mix_2 A_2 x, ...]``.
        """
        bare: Any = underlying(self.model)
        head = bare.get_output_embeddings()
        if not hasattr(head, "_active_adapter"):
            return states, head.weight, head.bias
        base = head.base_layer
        read, weights = [states], [base.weight]
        for name in head.active_adapters:
            a, b = head.lora_A[name], head.lora_B[name]
            low = a(head.lora_dropout[name](states.to(a.weight.dtype))) * head.scaling[name]
            read.append(low.to(states.dtype))
            weights.append(b.weight.to(base.weight.dtype))
        return torch.cat(read, dim=2), torch.cat(weights, dim=1), base.bias

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The same, by the name that newer versions of Transformers give it."""
        self.model.activation_checkpointing_enable(**options)
