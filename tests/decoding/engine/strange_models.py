"""Models whose attention does what the engine does not know, and how they are checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import torch
from tiny_models import EOS, make
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

PROMPTS = [[5, 9, 13, 21, 7, 40, 33, 12, 28], [17, 23, 42, 8, 50], [31]]
NEW = 10


def alone(model: Any, **options: Any) -> list[list[int]]:
    """What `model.generate` writes for each prompt."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options)
        row = out[0, len(prompt) :].tolist()
        found.append(row[: row.index(EOS) + 1] if EOS in row else row)
    return found


def check(model: Any, why: str | None) -> None:
    """Check that tokens are Hugging Face's. The engine runs the model, or notes `why` not."""
    theirs = alone(model)
    out = cf.generate(model, PROMPTS, max_new_tokens=NEW)
    assert out.responses == theirs
    if why is None:
        whole = ": its modules run every step: ", ": torch runs parts of each step: "
        assert all(any(w in note for w in whole) for note in out.stats.notes)
    else:
        (note,) = out.stats.notes
        assert note.startswith("the simple path: ")
        assert why in note


class Strange(modeling_llama.LlamaAttention):
    """Llama's attention, which subclasses change by `attend`."""

    def attend(
        self, call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, mask: Any, **given: Any
    ) -> Tensor:
        raise NotImplementedError

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **given: Any,
    ) -> tuple[Tensor, None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            layer(hidden_states).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )

        def call(*tensors: Any, **more: Any) -> Tensor:
            every = {"dropout": 0.0, "scaling": self.scaling, **given, **more}
            return interface(self, *tensors, **every)[0]

        out = self.attend(call, q, k, v, attention_mask)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def distances(q: Tensor, k: Tensor) -> Tensor:
    """``[q, k]``: how many tokens each query stands after each key."""
    at = torch.arange(k.shape[2])
    return at[-q.shape[2] :, None] - at


def seen(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """``[rows, 1, q, k]``: which keys Llama lets each query see."""
    causal = (distances(q, k) >= 0).expand(len(q), 1, -1, -1)
    return causal if mask is None else causal & mask


class Biased(Strange):
    """ALiBi, as a part of the mask."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        bias = (-0.7 * distances(q, k)).masked_fill(~seen(q, k, mask), -torch.inf)
        return call(q, k, v, bias)


class Sparse(Strange):
    """Looks at every second token only."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, seen(q, k, mask) & (distances(q, k) % 2 == 0))


class Named(Strange):
    """Hands on an argument that the engine knows nothing of."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, mask, slopes=torch.ones(2))


class Twice(Strange):
    """The difference of two attentions, as in DiffLlama."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, mask) - 0.5 * call(q, k, -v.flip(1), mask)


class Memory(Strange):
    """Has keys and values of its own before those of the tokens."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        allowed = nn.functional.pad(seen(q, k, mask), (1, 0), value=True)
        k, v = (torch.cat([torch.ones_like(x[:, :, :1]), x], dim=2) for x in (k, v))
        return call(q, k, v, allowed)


class Counting(Strange):
    """Scales queries by the number of keys: the engine hands over the new ones alone."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q * (k.shape[2] + 1.0), k, v, mask)


class Shifted(Strange):
    """Adds to each token the one before it, if that is in the same forward."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        before = torch.cat([torch.zeros_like(q[:, :, :1]), q[:, :, :-1]], dim=2)
        return call(q + before, k, v, mask)


class Acausal(Strange):
    """Says that it looks at all of a text."""

    def attend(self, call: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return call(q, k, v, seen(q, k, mask), is_causal=False)


STRANGE = {
    Biased: "masks of their own",
    Sparse: "masks of their own",
    Named: "uses slopes",
    Twice: "more than once",
    Memory: "over tensors of the shapes",
    Counting: "not its own",
    Shifted: "not its own",
    Acausal: "masks of their own",
}


def strange(kind: type[Strange], model: PreTrainedModel | None = None) -> PreTrainedModel:
    model = model or make("llama")
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind
    return model
