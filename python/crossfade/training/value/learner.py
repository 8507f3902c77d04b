"""The models that `ValueTrainer` runs: the value model, its adapter, and the base of CD-Q."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ...decoding.engine.prefill import hidden_states
from ...extras import require
from ...models.hf import is_peft, place, text_config, underlying
from ...models.value_heads import shared_copy, token_values, value_head


class Learner(nn.Module):
    """A value model as Transformers' trainer calls it: it gives the values of a batch's tokens.

    Where the head alone is trained, the backbone stays in eval mode.
    """

    accepts_loss_kwargs = True  # losses are divided by the tokens of all accumulated batches

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        bare: Any = underlying(model)
        self.before = int(bare.value_kind == "q")  # a Q-head reads the state before its token
        self.frozen = not trained_in_backbone(model)

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def hidden(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, starts: Tensor, length: int
    ) -> Tensor:
        """``[B, length, H]``: the states that the values of each row's completion are read from."""
        return hidden_states(model, input_ids, attention_mask, starts - self.before, length)

    def forward(
        self,
        labels: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        starts: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Values ``[B, T]`` float32, and the hidden states ``[B, T, H]`` that they come from."""
        if hidden is None:
            assert input_ids is not None
            assert attention_mask is not None
            assert starts is not None
            hidden = self.hidden(self.model, input_ids, attention_mask, starts, labels.shape[1])
        with torch.autocast(hidden.device.type, enabled=False):
            head = value_head(self.model)
            return token_values(head, hidden, labels.clamp(min=0)), hidden

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """The same, by the name that newer versions of Transformers give it."""
        self.model.activation_checkpointing_enable(**options)


class Base:
    """The model whose next-token distribution CD-Q takes expectations over.

    Attributes:
        shared: whether it computes the value model's own hidden states, so that one forward serves
            both.
    """

    def __init__(self, base: Any, model: Any, args: Any) -> None:
        if not isinstance(base, transformers.PreTrainedModel) or hasattr(base, "peft_config"):
            raise TypeError(
                f"base is a {type(base).__name__}; it must be a causal LM without PEFT adapters"
            )
        self.head = base.get_output_embeddings()
        sizes = (value_head(model).out_features, value_head(model).in_features)
        if tuple(self.head.weight.shape) != sizes:
            raise ValueError(
                f"base has a head of shape {list(self.head.weight.shape)}; it must be "
                f"{list(sizes)}, as model's"
            )
        if place(base.device) != place(args.device):
            raise ValueError(
                f"base is on {base.device} and training runs on {args.device}; move base there, "
                "and make the value model of it then"
            )
        self.model: Any = shared_copy(base).eval()
        self.head = self.model.get_output_embeddings()
        self.softcap = getattr(text_config(base), "final_logit_softcapping", None)
        self._check_logits()
        bare: Any = underlying(model)
        given = dict(bare.base_model.named_parameters())
        self.shared = not is_peft(model) and all(
            name in given and p.data_ptr() == given[name].data_ptr()
            for name, p in self.model.base_model.named_parameters()
        )
        if args.cache_hidden and not self.shared:
            raise ValueError(
                "cache_hidden is True, but model is not over base's weights; it must be of "
                "value_model(base) or load_value_head(folder, base)"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        z = self.head(hidden.to(self.head.weight.dtype))
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    @torch.no_grad()
    def _check_logits(self) -> None:
        """Refuse a base whose logits for a few tokens are not those that `logits` computes.

        There are several tokens, as the embedding of one for padding is 0.
        """
        ids = torch.arange(min(4, len(self.head.weight)), device=self.model.device)[None]
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        own = self.model(**read, return_dict=True).logits.float()
        ours = self.logits(self.model.base_model(**read, return_dict=True)[0]).float()
        if not torch.allclose(own, ours, rtol=0.02, atol=0.02 * float(own.abs().max())):
            raise NotImplementedError(
                f"base is a {type(self.model).__name__}, whose logits are more than its head's; "
                "not supported by 'cd_q' of a Q-head yet"
            )


def adapted(model: Any, head: nn.Module, peft_config: Any) -> Any:
    """The model with a new adapter on its backbone; the adapter and the head are to be trained."""
    if is_peft(model):
        raise ValueError("peft_config is given, but model has an adapter already; it must be None")
    peft = require("peft", "adapters")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            f"peft_config is a {type(peft_config).__name__}; it must be a peft.PeftConfig"
        )
    if peft_config.is_prompt_learning:
        raise ValueError("peft_config is of prompt learning; it must be of adapters in layers")
    wrapped = peft.get_peft_model(model, peft_config)
    if value_head(wrapped) is not head:
        raise ValueError("peft_config puts an adapter on the head; it must leave the head out")
    head.requires_grad_(True)
    return wrapped


def trained_in_backbone(model: Any) -> list[str]:
    """Names of the parameters that are trained, without those of the head."""
    head = {id(p) for p in value_head(model).parameters()}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in head]


def check_trained(model: Any) -> None:
    """Refuse to train anything but the head and adapters: the base owns the backbone's weights."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("no parameter of model requires a gradient; those of its head must")
    of_adapters: set[int] = set()
    if is_peft(model):
        peft = require("peft", "adapters")
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        of_adapters = {t.data_ptr() for t in state.values()}
    own = dict(model.named_parameters())
    for name in trained_in_backbone(model):
        if own[name].data_ptr() not in of_adapters:
            raise ValueError(
                f"{name} of model requires a gradient, but it is the backbone's, which other "
                "models share; it must not: train an adapter with peft_config"
            )
