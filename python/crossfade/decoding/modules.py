"""What a model's modules do where the engine runs it: the same arithmetic, by other kernels.

They are installed in a `Replica`: Hugging Face's models stay as they are. Attention is replaced
through Transformers' own registry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from ..adapters import adapter_layers
from .kv_cache import KVCache

Forward = Callable[..., Any]


class Unsupported(Exception):
    """Why the engine cannot run a model; the simple path can."""


@dataclass(frozen=True)
class Call:
    """One forward: which rows of the cache it is for, and the tokens that each has already."""

    cache: KVCache
    lengths: Tensor  # [B] int64
    rows: Tensor | None = None  # [B] int64, of the cache; None: all, in order


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
    crossfade: Call | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over the engine's caches, which it appends to."""
    if crossfade is None:
        raise Unsupported("its layers do not hand keyword arguments on to attention")
    if dropout:
        raise Unsupported("it has dropout and is in training mode")
    for name in ("s_aux", "position_bias"):
        if others.get(name) is not None:
            raise Unsupported(f"its attention uses {name}")
    index: Any = module.layer_idx
    types = getattr(module.config, "layer_types", None)
    if types and types[index] == "sliding_attention" and not sliding_window:
        raise Unsupported("its layers do not say how far they look back")
    if not getattr(module, "is_causal", True):
        raise Unsupported("its attention is not causal")
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
    """`ops.linear` for every plain linear layer: on CPUs it reads few rows' weights faster.

    Not where an adapter of a parameter gives the layer another weight for each of its forwards.
    """
    changed = {x.get_base_layer() for x in adapter_layers(model) if hasattr(x, "parameter_name")}
    return {m: _linear(m) for m in model.modules() if is_plain(m) and m not in changed}


def is_plain(module: Any) -> bool:
    """Whether a module is torch's own linear layer that nobody has changed."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


def _linear(module: Any) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return ops.linear(x, module.weight, module.bias)

    return forward
