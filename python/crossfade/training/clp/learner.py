"""The policy as Transformers' trainer calls it: log-probs of responses, each at its own mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...decoding.simple.adapters import MixedRows
from ...decoding.simple.replica import Replica
from ...models.adapters import adapter_layers
from ...models.hf import text_config, underlying
from ...ops import linear_logp
from ..fused_head import IGNORED, check_logits
from ..logits import Logits
from .packing import states, takes_packed


class Learner(nn.Module):
    """The modules of a PEFT model, over its own weights, in which each row has its own mix.

    A layer computes ``W x + sum_k mix[row, k] B_k A_k x``, in PEFT's own forward. They are copies
    of the model's modules, so that decoding finds the model as it is.

    Attributes:
        shares: whether several responses to a prompt may share a row, see `takes_packed`.

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
        self.shares = takes_packed(base)

    def forward(
        self,
        input_ids: Tensor,
        visible: Tensor,
        before: Tensor,
        labels: Tensor,
        mixes: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The log-prob of each response of packed rows: ``[B, n]`` float32, or the model's float64.

        Layers keep the mixes until the next call, as gradient checkpointing runs them again in the
        backward pass. So nothing may be called in between.

        Args:
            input_ids, visible, before, labels, position_ids: as `packed` gives them.
            mixes: ``[B, adapters]``: how much of each adapter a row has.
        """
        self.rows.seat(mixes)
        hidden = states(self.model, input_ids, visible, before, position_ids)
        mask = labels != IGNORED
        with torch.autocast(hidden.device.type, enabled=False):
            read, weight, bias = self._head(hidden)
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
        return found.new_zeros(mask.shape).masked_scatter(mask, found).sum(dim=2)

    def train(self, mode: bool = True) -> Learner:
        """As in torch, but that of all dropout only the adapters' own is ever on.

        The base's would give the policy and its reference other log-probs than those that responses
        are sampled by. Layers that are checkpointed must be in training mode for that.
        """
        super().train(mode)
        for module in self.model.modules():
            module.training = mode and bool(getattr(module, "gradient_checkpointing", False))
        for layer in adapter_layers(self.model):
            layer.lora_dropout.train(mode)
        return self

    def _head(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the head reads ``[B, n, T, H]``, its weight ``[V, H]`` and its bias.

        With adapters of the head, ``W x + sum_k mix_k B_k A_k x`` is one product: that of
        ``[W, B_1, B_2, ...]`` and ``[x, mix_1 A_1 x, mix_2 A_2 x, ...]``.
        """
        bare: Any = underlying(self.model)
        head = bare.get_output_embeddings()
        if not hasattr(head, "_active_adapter"):
            return hidden, head.weight, head.bias
        base = head.base_layer
        read, weights = [hidden], [base.weight]
        for name in head.active_adapters:
            a, b = head.lora_A[name], head.lora_B[name]
            low = a(head.lora_dropout[name](hidden.to(a.weight.dtype))).flatten(1, 2)
            low = (low * head.scaling[name]).view(*hidden.shape[:3], -1)
            read.append(low.to(hidden.dtype))
            weights.append(b.weight.to(base.weight.dtype))
        return torch.cat(read, dim=3), torch.cat(weights, dim=1), base.bias

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The same, by the name that newer versions of Transformers give it."""
        self.model.activation_checkpointing_enable(**options)
