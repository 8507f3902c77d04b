"""Log-probs of labels from a causal LM, computed by `linear_logp` when TRL's trainers ask."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import did_you_mean
from ..extras import require
from ..models.after_head import after_head
from ..ops import check
from ..ops.logp.api import all_results, temperature_of
from ..ops.logp.tiles import Settings
from . import processes
from .logits import Logits, log_sum_squares, mean_logits
from .processes import IGNORED

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class HeadSettings:
    """How the log-probs of a model are computed, see `add_linear_logp`."""

    logits: Logits
    outputs: tuple[str, ...]
    mean_only: bool
    cast_lm_head_to_fp32: bool  # passed on to TRL for heads that are left to it


def add_linear_logp(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    mean_only: bool = False,
    uniform: bool | None = None,
) -> None:
    """Have `model` compute log-probs of labels by `linear_logp`, as TRL's `add_fused_lm_head` does.

    After this ``model(..., labels=labels, fused_lm_head=True)`` runs the backbone, takes the hidden
    states of the positions whose next token has a label, and returns TRL's `FusedCausalLMOutput`.
    All other calls are as before. The output has, for each position (``[batch, length - 1]``,
    float32, or float64 if the model is) and with 0 where there is no label: `log_probs`, the only
    one with gradients, `entropy`, `mean_logits` (over the vocabulary), `is_top1` (whether no token
    has a larger logit) and `log_sum_sq_probs` (of the squared probabilities of all tokens, see
    `losses.wpo_weights`). Products and sums are float32 even under autocast. Logits are stored a
    tile at a time, see `linear_logp`. A head whose weight is in pieces (FSDP's DTensors, ZeRO-3) is
    left to TRL's function, with a warning.

    The model's class becomes a subclass of what it was. Copies and pickles of the model have the
    class from before. The trainers here do this only while they train.

    Args:
        model: a causal LM of Transformers; for a PEFT model, its base model.
        temperature: what logits are divided by, above 0.
        cast_lm_head_to_fp32: an argument of TRL's function, which changes nothing here: the head's
            products are always float32.
        outputs: the fields of `FusedCausalLMOutput` to compute besides `loss` and `log_probs`.
        mean_only: whether the loss will be a sum or mean of `log_probs`, see `linear_logp`.
        uniform: what `mean_only` was called before; it will be removed in the next release.

    Raises:
        TypeError, ValueError: `temperature` is not a number above 0, `mean_only` is not a bool,
            `outputs` has a name that is no field, or the model scales its logits by a number that
            is not above 0.
        NotImplementedError: the head is not a plain linear layer, or its logits are not those of a
            scaled or soft-capped product.
    """
    if uniform is not None:
        said = "add_linear_logp's uniform is now called mean_only; uniform will be removed"
        warnings.warn(said, FutureWarning, stacklevel=2)
        mean_only = check.flag("uniform", uniform)
    _seat(model, class_with_logp(model, temperature, cast_lm_head_to_fp32, outputs, mean_only))


def class_with_logp(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    mean_only: bool = False,
) -> type:
    """The class that `add_linear_logp` would give to `model`; `seated` gives it for a while."""
    require("trl.trainer.utils", "train")
    temperature = temperature_of(temperature)
    check.flag("mean_only", mean_only)
    for name in outputs:
        if name not in FIELDS:
            raise ValueError(
                f"outputs has {name!r}; it must be among {', '.join(FIELDS)}"
                f"{did_you_mean(name, FIELDS)}"
            )
    logits = Logits.of(model.config.get_text_config(), temperature)
    plain_layer(model, _head(model))
    check_logits(model, logits)
    return _class_of(
        getattr(type(model), "plain_class", type(model)),
        HeadSettings(logits, tuple(outputs), mean_only, cast_lm_head_to_fp32),
    )


@contextmanager
def seated(model: Any, made: type) -> Iterator[None]:
    """Give `model` a class that `class_with_logp` made, for the length of a ``with`` block."""
    if isinstance(model, made):
        yield
        return
    before = type(model)
    try:
        _seat(model, made)
        yield
    finally:
        if type(model) is made:  # else FSDP has made a subclass of it, which has to stay
            model.__class__ = before
        if BELOW in vars(model) and "forward" not in vars(model):
            vars(model)["forward"] = vars(model).pop(BELOW)


# The attribute that keeps a forward which was set on a model itself, and not on its class.
BELOW = "_forward_below"


def _seat(model: Any, made: type) -> None:
    own = vars(model).get("forward")
    if own is not None and not _is_ours(inspect.unwrap(own, stop=_is_ours)):
        # accelerate, or somebody else, has set a forward on the model, which would hide that of the
        # class. If it is Accelerator's wrapper (for autocast) of ours, it stays: it calls ours
        vars(model)[BELOW] = vars(model).pop("forward")
    model.__class__ = made


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "of_linear_logp", False)


class _WithLogp:
    """The first base of the classes that `class_with_logp` makes; the second is the model's own."""

    linear_logp: HeadSettings
    plain_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle the model with its own class, without what was added here."""
        kind = type(self)
        if kind.__bases__ != (_WithLogp, kind.plain_class):  # it is FSDP's subclass
            return super().__reduce_ex__(protocol)
        state = dict(vars(self))
        if BELOW in state and "forward" not in state:
            state["forward"] = state.pop(BELOW)
        return object.__new__, (kind.plain_class,), state


def _class_of(plain: Any, settings: HeadSettings) -> type:
    @functools.wraps(plain.forward)  # `generate` checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        # Accelerator may go on calling this function after training, on this model or a copy. So it
        # holds nothing of one model: `_log_probs` reads all from the class of the model it is given
        if fused_lm_head:
            return processes.together(functools.partial(_log_probs, self, *args), **kwargs)
        below = getattr(self, BELOW, None)
        return plain.forward(self, *args, **kwargs) if below is None else below(*args, **kwargs)

    forward.of_linear_logp = True  # type: ignore[attr-defined]
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    added = {"forward": forward, "linear_logp": settings, "plain_class": plain}
    return type(plain.__name__, (_WithLogp, plain), names | added)  # saved configs contain the name


def _log_probs(
    model: Any,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Any:
    """TRL's `FusedCausalLMOutput` of a model whose class `class_with_logp` made."""
    settings: HeadSettings | None = getattr(type(model), "linear_logp", None)
    if settings is None:
        raise TypeError(
            f"fused_lm_head is True; it must be left out for a {type(model).__name__} that is not "
            "being trained"
        )
    trl = require("trl.trainer.utils", "train")
    head = _head(model)  # looked up at each call, as PEFT and FSDP replace it
    if in_pieces(head):
        warnings.warn(
            f"the head of {type(model).__name__} is in pieces: its log-probs are TRL's, not "
            "linear_logp's",
            stacklevel=2,
        )
        kwargs |= {"labels": labels, "shift_labels": shift_labels, "fused_lm_head": True}
        return _of_trl(model, settings)(
            model, *args, num_items_in_batch=num_items_in_batch, **kwargs
        )
    config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = model.base_model(*args, **kwargs)
    hidden = backbone.last_hidden_state
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels is None; it must be given with fused_lm_head=True")
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    weight, bias = head.weight, getattr(head, "bias", plain_layer(model, head).bias)
    shift_labels = shift_labels.to(weight.device)
    mask = shift_labels != IGNORED
    chosen = hidden.to(weight.device)[mask]
    with torch.autocast(chosen.device.type, enabled=False):
        found = _of_tokens(chosen, weight, bias, shift_labels[mask], settings)
    # masked_scatter keeps the graph even if no position has a label: the gradient is then 0
    found = {k: x.new_zeros(mask.shape).masked_scatter(mask, x) for k, x in found.items()}
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, aux_loss = -found["log_probs"].sum() / count, None
    if kwargs.get("output_router_logits"):
        aux_loss = _load_balancing(config, backbone.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return trl.FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **found)


class _Template:
    """As much of a model as TRL's `add_fused_lm_head` reads, to get the forward that it makes."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def forward(self) -> None: ...


def _of_trl(model: Any, settings: HeadSettings) -> Any:
    """The forward that TRL would give the model: ``(model, ..., fused_lm_head=True)``."""
    trl = require("trl.trainer.utils", "train")
    template: Any = _Template(model.config)
    cast = settings.cast_lm_head_to_fp32
    trl.add_fused_lm_head(template, settings.logits.temperature, cast, settings.outputs)
    return template.forward.__func__


def _of_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    asked: HeadSettings,
) -> dict[str, Tensor]:
    """The fields of the output, ``[tokens]`` each, all from one call of the op in `linear_logp`."""
    logits, outputs = asked.logits, asked.outputs
    settings = Settings(*logits.settings(), IGNORED)
    logp, lse, entropy, normaliser, *_ = all_results(
        hidden, weight, targets, bias, settings, mean_only=asked.mean_only
    )
    found = {"log_probs": logp}
    if "entropy" in outputs:
        found["entropy"] = entropy.detach()
    if "is_top1" in outputs:
        found["is_top1"] = normaliser[2] >= normaliser[0]
    if "mean_logits" in outputs:
        found["mean_logits"] = mean_logits(hidden, weight, bias, logits)
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = log_sum_squares(hidden, weight, bias, lse, logits)
    return found


def _load_balancing(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """The load balancing loss of Mixtral, which all mixtures of experts in Transformers use."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts, active = config.num_experts, config.num_experts_per_tok
    loss = load_balancing_loss_func(router_logits, experts, active, attention_mask)
    if not isinstance(loss, Tensor):
        raise ValueError("the model gave no router logits, which its auxiliary loss is of")
    return loss


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def plain_layer(model: Any, head: Any) -> nn.Linear:
    """The head's linear layer, which PEFT wraps if it trains a copy of it."""
    layer = getattr(head, "original_module", head)
    if type(layer) is not nn.Linear:
        raise NotImplementedError(
            f"the head of {type(model).__name__} is a {type(layer).__name__}; it must be a plain "
            "torch.nn.Linear, without an adapter of its own and not quantised. TRL's own trainers "
            "may do"
        )
    return layer


def in_pieces(head: Any) -> bool:
    """Whether this process holds a part of the head's weight alone: a DTensor, or ZeRO-3."""
    return type(head.weight) not in (Tensor, nn.Parameter) or hasattr(head.weight, "ds_id")


def check_logits(model: Any, settings: Logits) -> None:
    """Check that the model turns its head's products into logits as `Logits.of` read it to do.

    That reads a few names of configs, and families have others. A model that does more to its
    logits would be trained on log-probs that are not its own.
    """
    head = _head(model)
    if in_pieces(head) or head.weight.is_meta:
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found = after_head(model)
    finally:
        for module, training in modes:
            module.training = training
    # some families scale hidden states before the head instead of logits after it
    products = found.given.double() / (found.reads or 1.0)
    if found.reads is None or not found.is_like(settings.without_temperature(products)):
        raise NotImplementedError(
            f"{type(model).__name__} does more to its logits than its config says by the names "
            "known here: log-probs of linear_logp would be others. Use TRL's own trainers"
        )
