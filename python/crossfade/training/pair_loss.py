"""Losses of `crossfade.losses` for `DPOTrainer`, with their options and what they need."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import losses

PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {**losses.PAIR_LOSSES, "modpo": losses.modpo}
WITHOUT_REFERENCE = ("orpo", "simpo")
# of DPOConfig, what a loss of ours takes from its own options, or does without
DPO_OPTIONS = (
    "beta",
    "discopop_tau",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_type",
    "loss_weights",
    "use_weighting",
)


@dataclasses.dataclass
class WithMargins:
    """A collator's batch, and the rows' margins ``[pairs, others]``."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        counts = {len(row["margins"]) for row in rows}
        if len(counts) > 1:
            raise ValueError(f"margins has rows of {sorted(counts)} numbers; all must have as many")
        return {**batch, "margins": torch.tensor([row["margins"] for row in rows]).float()}


def pair_loss(
    name: str | None, options: Mapping[str, Any] | None, args: Any
) -> Callable[..., Tensor] | None:
    """The loss with its options, after a look at whether they are its own."""
    if name is None:
        if options:
            raise ValueError("loss_options is given, and loss is None; it must be a name")
        return None
    if name not in PAIR_LOSSES:
        raise ValueError(f"loss is {name!r}; it must be among {', '.join(PAIR_LOSSES)}")
    loss = PAIR_LOSSES[name]
    options = dict(options or {})
    known = [p for p in inspect.signature(loss).parameters if p not in ("pairs", "margins")]
    for key in options:
        if key not in known:
            raise ValueError(f"loss_options has {key!r}; for {name} it may have {', '.join(known)}")
    needed = ("weight", "other_weights") if name == "modpo" else ()
    for key in needed:
        if key not in options:
            raise ValueError(f"loss_options has no {key!r}, which modpo must have")
    if args is not None:
        fields = {field.name: field for field in dataclasses.fields(args)}
        for key in DPO_OPTIONS:
            factory = fields[key].default_factory
            plain = fields[key].default if factory is dataclasses.MISSING else factory()
            if getattr(args, key) != plain:
                raise ValueError(
                    f"args.{key} is {getattr(args, key)!r}; with loss={name!r} it must be left at "
                    "its default, and what the loss takes be in loss_options"
                )
    bound: Callable[..., Tensor] = functools.partial(loss, **options)
    one = torch.zeros(1)
    empty = losses.Pairs(one, one, one, one, one.long() + 1, one.long() + 1)
    others = options.get("other_weights")
    width = len(others) if isinstance(others, (list, tuple)) else 0
    bound(empty, **({"margins": torch.zeros(1, width)} if name == "modpo" else {}))  # its checks
    return bound


def beta_of(name: str | None, options: Mapping[str, Any] | None) -> float:
    """What a loss's rewards are of its log-ratios; 1 where it has no beta."""
    if name is None:
        return 1.0
    beta = inspect.signature(PAIR_LOSSES[name]).parameters.get("beta")
    return float((options or {}).get("beta", 1.0 if beta is None else beta.default))


def check_no_reference(loss: str | None, ref_model: Any, args: Any) -> None:
    given = {"ref_model": ref_model is not None}
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        given[f"args.{name}"] = args is not None and getattr(args, name)
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name} is given; loss={loss!r} has no reference")
