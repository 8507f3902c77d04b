"""Log-probs of labels from a causal LM, by `linear_logp`, as TRL's trainers ask for them."""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..extras import require
from ..ops import logp_tiles
from ..ops.logp import all_results, temperature_of
from ..ops.logp_tiles import Settings

IGNORED = -100  # the label of a position that does not count
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


@dataclass(frozen=True)
class Logits:
    """What a model makes of its head's products x: ``c tanh(s x / c) / temperature``.

    `scale` is s and `softcap` c; without one (None) it is ``s x / temperature``.
    """

    scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, config: Any, temperature: float) -> Logits:
        """As the config of a text model says, by whichever of the names its family has for it."""
        scale = next(
            (
                getattr(config, name)
                for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if getattr(config, name, None) is not None
            ),
            None,
        )
        if scale is None and getattr(config, "logits_scaling", None) is not None:
            multiplies = config.model_type == "hyperclovax"
            scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
        scale = 1.0 if scale is None else float(scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"the model scales its logits by {scale}; it must be above 0")
        return cls(scale, getattr(config, "final_logit_softcapping", None) or None, temperature)

    def settings(self) -> tuple[float, float]:
        """The soft cap (0 for none) and the temperature of `linear_logp`, which has no scale.

        ``c tanh(s x / c)`` is ``s`` times ``(c / s) tanh(x / (c / s))``.
        """
        return (self.softcap or 0.0) / self.scale, self.temperature / self.scale


def add_linear_logp(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Sequence[str] = ("log_probs",),
    uniform: bool = False,
) -> None:
    """Give `model` log-probs of labels by `linear_logp`, in place of TRL's `add_fused_lm_head`.

    ``model(..., labels=labels, fused_lm_head=True)`` then runs the backbone, takes the hidden
    states of the positions whose next token has a label, and gives TRL's `FusedCausalLMOutput`;
    other calls are the model's own. Per position, ``[batch, length - 1]`` float32 (float64 for
    float64), 0 where there is no label: `log_probs`, which alone has gradients, `entropy`,
    `mean_logits` (over the vocabulary) and `is_top1` (ties count). Products and sums are float32,
    under autocast too. Logits are stored in tiles alone, see `linear_logp`. A head whose weight is
    in pieces (FSDP's DTensors, ZeRO-3) is left to TRL's function, with a warning.

    Args:
        model: a causal LM of Transformers; of a PEFT model, its base model.
        temperature: what logits are divided by, above 0.
        cast_lm_head_to_fp32: TRL's; has no effect, as the head's products are float32 anyway.
        outputs: fields of `FusedCausalLMOutput` to compute besides `loss` and `log_probs`.
        uniform: expect a loss that is a sum or mean of `log_probs`, see `linear_logp`.

    Raises:
        TypeError, ValueError: `temperature` is no number above 0, or the model scales its logits by
            a number that is not.
        NotImplementedError: the head is not a plain linear layer, its logits are not those of a
            scaled or soft-capped product, or `outputs` has "log_sum_sq_probs".
    """
    trl = require("trl.trainer.utils", "train")
    temperature = temperature_of(temperature)
    unknown = [name for name in outputs if name not in FIELDS]
    if unknown:
        raise NotImplementedError(
            f"outputs has {unknown[0]!r}; it must be among {', '.join(FIELDS)}. TRL's own trainers "
            "have the others"
        )
    config = model.config.get_text_config()
    logits = Logits.of(config, temperature)
    _plain(model, _head(model))
    own = model.forward
    trl.add_fused_lm_head(model, temperature, cast_lm_head_to_fp32, tuple(outputs))
    trls = model.forward

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            given: dict[str, Any] = {"labels": labels, "shift_labels": shift_labels}
            given["num_items_in_batch"] = num_items_in_batch
            return own(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        head = _head(self)  # at each call: PEFT and FSDP replace it
        if _in_pieces(head):
            warnings.warn(
                f"the head of {type(self).__name__} is in pieces: its log-probs are TRL's, not "
                "linear_logp's",
                stacklevel=2,
            )
            return trls(
                *args,
                fused_lm_head=True,
                labels=labels,
                shift_labels=shift_labels,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        kwargs["use_cache"] = False
        if getattr(config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        backbone = self.base_model(*args, **kwargs)
        hidden = backbone.last_hidden_state
        if shift_labels is None:
            if labels is None:
                raise ValueError("labels is None; it must be given with fused_lm_head=True")
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        weight, bias = head.weight, getattr(head, "bias", _plain(self, head).bias)
        shift_labels = shift_labels.to(weight.device)
        mask = shift_labels != IGNORED
        chosen = hidden.to(weight.device)[mask]
        with torch.autocast(chosen.device.type, enabled=False):
            found = _of_tokens(chosen, weight, bias, shift_labels[mask], logits, outputs, uniform)
        # scattered: a batch without labels still has a graph, and a gradient of 0
        found = {k: x.new_zeros(mask.shape).masked_scatter(mask, x) for k, x in found.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -found["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            aux_loss = _load_balancing(config, backbone.router_logits, kwargs.get("attention_mask"))
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
        return trl.FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **found)

    model.forward = types.MethodType(forward, model)
    try:
        _check_against_own(model, own, temperature)
    except NotImplementedError:
        model.forward = own
        raise


def _of_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logits: Logits,
    outputs: Sequence[str],
    uniform: bool,
) -> dict[str, Tensor]:
    """Fields of the output, ``[tokens]`` each. The op below `linear_logp` has them all at once."""
    settings = Settings(*logits.settings(), IGNORED)
    logp, _, entropy, normaliser, *_ = all_results(
        hidden, weight, targets, bias, settings, uniform=uniform
    )
    found = {"log_probs": logp}
    if "entropy" in outputs:
        found["entropy"] = entropy.detach()
    if "is_top1" in outputs:
        found["is_top1"] = normaliser[2] >= normaliser[0]
    if "mean_logits" in outputs:
        found["mean_logits"] = _mean_logits(hidden, weight, bias, logits)
    return found


@torch.no_grad()
def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits) -> Tensor:
    """Mean of a token's logits: of the products it is a product; soft caps take another pass."""
    dtype = logp_tiles.compute_dtype(hidden.dtype)
    hidden = hidden.to(dtype)
    if logits.softcap is None:
        x = hidden @ weight.mean(0, dtype=dtype)
        x = x if bias is None else x + bias.mean(dtype=dtype)
        return x * (logits.scale / logits.temperature)
    total = hidden.new_zeros(len(hidden))
    cap = logits.softcap / logits.scale
    for i in range(0, len(hidden), logp_tiles.ROWS):
        rows = slice(i, i + logp_tiles.ROWS)
        for j in range(0, len(weight), logp_tiles.COLUMNS):
            columns = slice(j, j + logp_tiles.COLUMNS)
            x = hidden[rows] @ weight[columns].to(dtype).t()
            x = x if bias is None else x + bias[columns].to(dtype)
            total[rows] += (x / cap).tanh_().sum(1)
    return total * (logits.softcap / logits.temperature / len(weight))


def _load_balancing(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    """Mixtral's, which every family of mixtures of experts has."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts, active = config.num_experts, config.num_experts_per_tok
    loss = load_balancing_loss_func(router_logits, experts, active, attention_mask)
    if not isinstance(loss, Tensor):
        raise ValueError("the model gave no router logits, which its auxiliary loss is of")
    return loss


def _head(model: Any) -> Any:
    return model.get_output_embeddings()


def _plain(model: Any, head: Any) -> nn.Linear:
    """The linear layer that the head is, maybe as PEFT wraps one to train a copy of it."""
    layer = getattr(head, "original_module", head)
    if type(layer) is not nn.Linear:
        raise NotImplementedError(
            f"the head of {type(model).__name__} is a {type(layer).__name__}; it must be a plain "
            "torch.nn.Linear, without an adapter of its own and not quantised. TRL's own trainers "
            "may do"
        )
    return layer


def _in_pieces(head: Any) -> bool:
    """Whether the weight is a DTensor, or a parameter of which ZeRO-3 keeps a part."""
    return type(head.weight) not in (Tensor, nn.Parameter) or hasattr(head.weight, "ds_id")


@torch.no_grad()
def _check_against_own(model: Any, own: Any, temperature: float) -> None:
    """That three tokens' log-probs are those of the model's own logits.

    Configs are read by names, and families differ: a model that does more to its logits than
    they say would be trained on something else.
    """
    head = _head(model)
    if _in_pieces(head) or head.weight.is_meta:
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        ids = torch.arange(4, device=head.weight.device)[None] % len(head.weight)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = own(**given, use_cache=False).logits[:, :-1].float() / temperature
        found = model(**given, labels=ids, fused_lm_head=True).log_probs
    finally:
        for module, training in modes:
            module.training = training
    expected = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    off = float((found - expected).abs().max())
    rounding = torch.finfo(head.weight.dtype).eps * float(logits.abs().max())
    if not off <= 1e-3 + 16 * rounding:
        raise NotImplementedError(
            f"{type(model).__name__} does more to its logits than its config says by the names "
            f"known here: log-probs of linear_logp are off by {off:.2g}. Use TRL's own trainers"
        )
