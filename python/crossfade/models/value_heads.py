"""Value heads over the hidden states of a language model.

Let ``h_t`` be the last hidden state after token ``y_t`` of a response. A *Q-head* gives a number
for each token that may come next, and ``V(x, y_1 .. y_t) = head(h_{t-1})[y_t]``. A *scalar head*
gives one number, and ``V(x, y_1 .. y_t) = head(h_t)``. A value model, which `value_model` makes and
`crossfade.ValueHead` takes, is a causal LM that has the head in the place of its output embeddings.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .after_head import after_head
from .hf import check_language_model, is_peft, text_config, underlying

KINDS = ("q", "scalar")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowRankHead(nn.Module):
    """A Q-head of rank r: ``(h A^T) B^T`` in float32, whatever the dtype of ``h [..., H]``.

    At first A is random and B is zero, as in LoRA, so that all values are 0. Both are parameters
    and not layers, so that PEFT's adapters for "all linear layers" leave them alone.

    Attributes:
        a, b: A ``[r, H]`` and B ``[V, r]``.
    """

    def __init__(self, hidden: int, vocabulary: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = hidden, vocabulary
        self.a = nn.Parameter(torch.randn(rank, hidden, dtype=torch.float32).to(dtype))
        self.b = nn.Parameter(torch.zeros(vocabulary, rank, dtype=dtype))
        with torch.no_grad():
            self.a.mul_(hidden**-0.5)  # entries of h A^T are then about as large as those of h

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(F.linear(hidden.float(), self.a.float()), self.b.float())


class WideLinear(nn.Linear):
    """A linear layer that takes inputs of any dtype and gives float32, whatever its own dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).float()


def value_model(
    base: Any, kind: str = "q", *, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A value head over a model's hidden states, for `crossfade.ValueHead` and `ValueTrainer`.

    The value model has modules and a config of its own, but they hold the very weights of `base`:
    nothing of the backbone is copied. What is done to the value model (its head is trained, an
    adapter is added, it gets another dtype or device) leaves `base` as it is. Only the head
    requires a gradient. At first all values are 0. A Q-head's value of a token that no rollout has
    stays about 0, so where a Q-head steers each token, rewards should be centred: take their mean
    off.

    Args:
        base: a causal LM, which must not compute anything between its backbone, its head and its
            logits. Only a soft-cap or scale that its config tells of may be there: the value model
            has none.
        kind: "q", a number for each next token, or "scalar", one number.
        rank: None for a full Q-head, ``Linear(H, V, bias=False)``, or the rank of a `LowRankHead`.
        dtype: of the head; the backbone keeps its own.

    Returns:
        A model of the class of `base`. Its outputs are float32; if the head is a plain layer of the
        backbone's dtype, they are of that dtype.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be. A model with
            PEFT adapters is refused: merge one first (``merge_and_unload``).
        NotImplementedError: `crossfade.Model` would refuse the model too, or it computes something
            between its backbone, its head and its logits.

    Source: Q-heads and how they are trained, Mudgal et al., arXiv:2310.17022; a full head as the
    explicit value of a blend, Liu et al., arXiv:2409.17819.
    """
    check_language_model(base, head=True)
    if is_peft(base) or hasattr(base, "peft_config"):
        raise TypeError(
            f"base is a {type(base).__name__} with PEFT adapters; it must be a plain model: merge "
            "an adapter with merge_and_unload(), or load the model without"
        )
    own: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(getattr(own, "weight", None), Tensor) or own.weight.dim() != 2:
        raise TypeError(
            f"base is a {type(base).__name__} without output embeddings; it must be a causal LM"
        )
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 'q' or 'scalar'")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")
    vocabulary, hidden = own.weight.shape
    if rank is not None:
        if kind != "q":
            raise ValueError(f"rank is {rank}, but kind is {kind!r}; only a Q-head has a rank")
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank is {rank!r}; it must be an int or None")
        if not 1 <= rank <= min(hidden, vocabulary):
            raise ValueError(f"rank is {rank}; it must be within [1, {min(hidden, vocabulary)}]")

    model = shared_copy(base)
    for config in {id(c): c for c in (model.config, text_config(model))}.values():
        config.tie_word_embeddings = False
        for name, plain in (("final_logit_softcapping", None), ("logits_scaling", 1.0)):
            if getattr(config, name, None) is not None:
                setattr(config, name, plain)
    if hasattr(model, "logit_scale"):
        model.logit_scale = 1.0
    if kind == "scalar":
        model.config.num_labels = 1
    head: nn.Module
    if rank is not None:
        head = LowRankHead(hidden, vocabulary, rank, dtype)
    else:
        # the engine's kernels take plain layers alone, and these need inputs of their own dtype
        layer = nn.Linear if own.weight.dtype is dtype else WideLinear
        outputs, bias = (1, True) if kind == "scalar" else (vocabulary, False)
        head = layer(hidden, outputs, bias, dtype=dtype)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    model.set_output_embeddings(head.to(own.weight.device).train(model.training))
    model.all_tied_weights_keys = {}  # the new head is tied to no other weight
    model.value_kind = kind
    _check_head_is_last(model)
    return model


def shared_copy(model: Any) -> Any:
    """A copy of a model's modules and config that holds the model's own weights, all frozen."""
    shared: dict[int, Any] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        # another Parameter over the same storage: .to() and requires_grad_() change only one of
        # them
        plain = type(p) is nn.Parameter
        shared[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if plain else p
    return copy.deepcopy(model, shared)


def value_head(model: Any) -> Any:
    """The head of a value model, or of the value model inside a PEFT model.

    Raises:
        TypeError: `model` is no value model.
    """
    bare: Any = underlying(model) if isinstance(model, nn.Module) else None
    if getattr(bare, "value_kind", None) not in KINDS:
        raise TypeError(
            f"model is a {type(model).__name__}; it must be what value_model or load_value_head "
            "gives"
        )
    return bare.get_output_embeddings()


def check_width(model: Any, name: str, vocabulary: int) -> None:
    """Raise an error unless a value model's head fits its backbone and the tokens that it values.

    A head that does not say its width is not looked at.

    Args:
        model: what is in a `crossfade.ValueHead`.
        name: what errors call it.
        vocabulary: how many tokens there are, of which a Q-head gives each a number.

    Raises:
        ValueError: says what the head's width is and what it must be.
    """
    bare: Any = underlying(model)
    head = bare.get_output_embeddings() if hasattr(bare, "get_output_embeddings") else None
    inputs, outputs = (getattr(head, f"{way}_features", None) for way in ("in", "out"))
    if not (isinstance(inputs, int) and isinstance(outputs, int)):
        return
    hidden = getattr(text_config(bare), "hidden_size", inputs)
    widths = {hidden, bare.get_input_embeddings().weight.shape[1]}
    if inputs not in widths:
        raise ValueError(
            f"the head of {name} reads {inputs} numbers; it must read {hidden}, the hidden size of "
            "its model"
        )
    if outputs != 1 and outputs < vocabulary:
        raise ValueError(
            f"the head of {name} gives {outputs} numbers; it must give {vocabulary}, one a token, "
            "or 1"
        )


def token_values(head: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The values of some tokens; a Q-head's values of all other tokens are not computed.

    Args:
        head: the head of a value model.
        hidden: ``[..., H]``, for a Q-head the hidden state before each token, for a scalar head the
            one after it.
        tokens: int64 ``[...]``. A scalar head does not need them and ignores them.

    Returns:
        float32 ``[...]``.
    """
    parts: Any = head
    if isinstance(head, LowRankHead):
        down = F.linear(hidden.float(), parts.a.float())
        return (down * F.embedding(tokens, parts.b).float()).sum(dim=-1)
    if parts.out_features == 1:
        return parts(hidden.to(parts.weight.dtype))[..., 0].float()
    rows = F.embedding(tokens, parts.weight)
    return (hidden.float() * rows.float()).sum(dim=-1)


def _check_head_is_last(model: Any) -> None:
    """Check on one token that the head reads the backbone's output and its own output is logits."""
    found = after_head(model)
    if not (found.reads == 1 and found.is_nothing):
        raise NotImplementedError(
            f"base is a {type(model).__name__}, which computes something between its hidden "
            "states, its head and its logits; not supported yet"
        )
