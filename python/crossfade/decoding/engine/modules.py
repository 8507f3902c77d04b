"""What the engine puts in the place of a model's modules: the same arithmetic, by other kernels.

It is installed in a `Replica`, so that Hugging Face's model stays as it is. Attention is replaced
through Transformers' own registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import linear
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ... import ops
from ...models.adapters import adapter_layers
from ...models.hf import in_shards, text_config
from ...models.quantized import QuantizedLinear
from ..ranks import local
from ..simple.term_model import TermModel
from .kv_cache import KVCache

Forward = Callable[..., Any]
LAYERS = {"full_attention", "sliding_attention"}  # the kinds of layers that it can run
PLAIN_WEIGHTS = (Tensor, nn.Parameter)  # Other types, as of quantizers, multiply in their own ways.


class Unsupported(Exception):
    """Says why the engine cannot run a model. The simple path can."""


@dataclass(frozen=True)
class ForwardPass:
    """What attention is told of the forward that it is part of.

    Attributes:
        cache: where keys and values are kept.
        lengths: ``[B]`` int64: how many tokens each row has in the cache before this forward.
        rows: ``[B]`` int64: the rows of the cache that the forward is of; None: all, in order.
        seen: the layers that have attended in this forward.
    """

    cache: KVCache
    lengths: Tensor
    rows: Tensor | None = None
    seen: set[int] = field(default_factory=set)


# Arguments that layers hand on to attention, and that do not change its result: those by which the
# engine calls the model, and those that ask for more to be returned.
IDLE = {"position_ids", "cache_position", "use_cache", "return_dict", "logits_to_keep"}
IDLE |= {"output_attentions", "output_hidden_states", "output_router_logits"}


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    crossfade: ForwardPass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention over the engine's caches, to which it appends, as Transformers' layers call it.

    The engine knows causal attention, also within a window or with a soft-cap. What a layer asks
    for beyond that is refused by name.

    Raises:
        Unsupported: says what the layer asks for.
    """
    if crossfade is None:
        raise Unsupported("its layers do not hand keyword arguments on to attention")
    if dropout:
        raise Unsupported("it has dropout and is in training mode")
    if attention_mask is not None:
        raise Unsupported("its layers make masks of their own")
    causal = others.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise Unsupported("its attention is not causal")
    for name, given in others.items():
        if name not in IDLE and given is not None and given is not False:
            raise Unsupported(f"its attention uses {name}")
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise Unsupported("its layers do not say which they are")
    if index in crossfade.seen:
        raise Unsupported("its layers attend more than once in a forward")
    crossfade.seen.add(index)
    types = getattr(module.config, "layer_types", None)
    if types and types[index] == "sliding_attention" and not sliding_window:
        raise Unsupported("its layers do not say how far they look back")
    keys, values = crossfade.cache.layer(index, key, value)
    out = ops.attend_(
        query,
        key,
        value,
        keys,
        values,
        crossfade.lengths,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        rows=crossfade.rows,
    )
    return out, None


ALL_ATTENTION_FUNCTIONS.register("crossfade", attention)


def linear_forwards(model: nn.Module) -> dict[nn.Module, Forward]:
    """`ops.linear` for every plain linear layer. On CPUs it is the faster one if rows are few.

    A layer is left out if its weight itself has an adapter, as PEFT then gives the layer another
    weight in each of its forwards.
    """
    changed = {x.get_base_layer() for x in adapter_layers(model) if hasattr(x, "parameter_name")}
    return {m: _linear(m) for m in model.modules() if is_plain(m) and m not in changed}


def is_plain(module: Any) -> bool:
    """Whether a module is torch's own linear layer, or a quantised one of ours, as it was made."""
    if type(module) is QuantizedLinear:
        return "forward" not in module.__dict__
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    code = getattr(nn.Linear.forward, "__code__", None)
    return (
        code is not None
        and code.co_filename == linear.__file__  # Otherwise somebody has replaced torch's forward.
        and type(module.weight) in PLAIN_WEIGHTS
        and module.weight.layout is torch.strided
    )


def weight_of(module: Any) -> Any:
    """The weight of a plain layer as `ops.linear` takes it."""
    return module.packed if type(module) is QuantizedLinear else local(module.weight)


def dtype_of(layer: Any) -> torch.dtype:
    """The dtype that a layer computes in."""
    return layer.dtype if type(layer) is QuantizedLinear else layer.weight.dtype


def _linear(module: Any) -> Forward:
    if type(module) is QuantizedLinear:
        return module.forward

    def forward(x: Tensor) -> Tensor:
        return ops.linear(x, module.weight, module.bias)

    return forward


def refuse_unsupported(model: TermModel, tokens: int) -> None:
    """Refuse a model that the engine's caches and attention cannot run on rows of so many tokens.

    Raises:
        Unsupported: says why.
    """
    bare: Any = model.bare
    config = text_config(bare)
    if not isinstance(bare, PreTrainedModel):
        raise Unsupported(f"{model.name} is not a model of Transformers")
    if not bare._supports_attention_backend:
        raise Unsupported(f"{model.name} does not use Transformers' attention interface")
    others = set(getattr(config, "layer_types", None) or ()) - LAYERS
    if others or getattr(config, "num_kv_shared_layers", None):
        what = f"layers of type {sorted(others)}" if others else "layers that share their keys"
        raise Unsupported(f"{model.name} has {what}")
    devices = {p.device for p in bare.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        raise Unsupported(
            f"{model.name} is offloaded or spread over several devices; the engine runs models on "
            "one device, and in shards on several ranks"
        )
    whole = (getattr(bare, "tp_size", None) or 1) == 1
    if whole and any(in_shards(p) for p in bare.parameters()):
        raise Unsupported(
            f"{model.name} lies in shards that its modules gather, as of FSDP; the engine runs "
            "whole models, and those loaded with distributed_config=DistributedConfig(tp_size=...)"
        )
    if why := model.follows_longest(tokens):
        raise Unsupported(why)
