"""DPO by TRL's trainer, and with the pair losses of `crossfade.losses`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import losses
from ...checks import did_you_mean
from ...extras import require
from ..fused_head import IGNORED
from .base import LogpTrainer, NoReference, are_ids, columns_error, columns_of, tell_lengths

trl = require("trl", "train")
PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {**losses.PAIR_LOSSES, "modpo": losses.modpo}
WITHOUT_REFERENCE = ("orpo", "simpo")
# Arguments of DPOConfig that belong to `args.loss_type`, which a loss of crossfade stands in for,
# and what each of them does. Those of the second kind are options of losses here.
OF_LOSS_TYPES = {
    "loss_type": "names losses of TRL",
    "loss_weights": "weighs several losses of args.loss_type",
    "ld_alpha": "discounts the tokens by which one response is longer",
    "f_divergence_type": "chooses another divergence than the KL",
    "f_alpha_divergence_coef": "belongs to an f-divergence",
}
AS_OPTIONS = {"beta": "beta", "label_smoothing": "label_smoothing", "discopop_tau": "tau"}
# Losses of the literature by names that others have for them.
OTHER_NAMES = {
    "aot_pair": "aot",
    "bco": "bco_pair",
    "cdpo": "sigmoid",
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "rdpo": "robust",
    "slic": "hinge",
    "sppo": "sppo_hard",
}
WITHOUT_WEIGHTS = ("aot", "aot_unpaired")
# The key of a batch that says how much each of its pairs counts.
PAIR_WEIGHTS = "pair_weights"
NO_INPUTS = (
    *("completion_mask", "margins", "ref_chosen_logps", "ref_rejected_logps", PAIR_WEIGHTS),
)


class DPOTrainer(LogpTrainer, trl.DPOTrainer):  # type: ignore[name-defined]
    """TRL's `DPOTrainer` with the log-probs of `linear_logp` and the losses of `crossfade.losses`.

    Datasets may also have `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        loss: a name in `crossfade.losses.PAIR_LOSSES`, or "modpo". None leaves the loss to TRL, by
            `args.loss_type`. The rewards that are logged are log-ratios times beta. "orpo" and
            "simpo" have no reference: none is loaded, and rewards are mean log-probs times beta.
        loss_options: arguments of the loss by name, such as ``{"beta": 2.0, "gamma": 1.0}``. With
            `loss`, the arguments of TRL's own losses in `args` must keep their defaults. "modpo"
            takes its `margins` from the dataset's column of that name, which holds for each row the
            list of the margins of all other objectives.

    With ``args.use_weighting=True`` each pair counts by `losses.wpo_weights`, in the sampled
    alignment, with any loss but "aot" and "aot_unpaired". That computes the head's product once
    more.

    Raises:
        ValueError, TypeError: a loss or an option is not known, or does not fit the others.
    """

    _trls = trl.DPOTrainer
    _kind = "dpo"
    _sequences = 2  # the chosen and the rejected one

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *rest: Any,
        loss: str | None = None,
        loss_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._pair_loss = pair_loss(loss, loss_options, args)
        self._needs_margins = loss == "modpo"
        self._without_reference = loss in WITHOUT_REFERENCE
        self._reward_scale = beta_of(loss, loss_options)
        if self._without_reference:
            check_no_reference(loss, ref_model, args)
            ref_model = NoReference()
        super().__init__(model, ref_model, args, *rest, **options)
        if self._without_reference:
            self.ref_model = None
        if self._needs_margins:
            self.data_collator = WithMargins(self.data_collator)

    @property
    def reward_scale(self) -> float:
        """What log-ratios are multiplied by to give rewards: the beta of the loss."""
        return float(self.beta) if self._pair_loss is None else self._reward_scale

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        name = f"the {dataset_name} dataset"
        ids = are_ids(name, dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
        columns = columns_of(dataset)
        if not ids and not {"chosen", "rejected"} <= columns:
            wanted = "prompt, chosen and rejected, or prompt_ids, chosen_ids and rejected_ids"
            raise columns_error(name, columns, wanted)
        if self._needs_margins and "margins" not in columns:
            raise columns_error(name, columns, "margins too, which loss='modpo' reads")
        if not ids:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        kept = dataset
        if args.max_length is not None and args.truncation_mode == "keep_start":
            # as TRL does with texts: nothing but the prompt would be left of these rows
            kept = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
        tell_lengths(name, dataset, kept, args)
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._needs_margins and "margins" not in self._signature_columns:
            self._signature_columns.append("margins")

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return super().compute_ref_log_probs(
            model, {name: x for name, x in inputs.items() if name not in ("margins", PAIR_WEIGHTS)}
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._pair_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        given = {name: x for name, x in inputs.items() if name not in NO_INPUTS}
        given["use_cache"] = False
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
        outputs = model(**given, labels=labels, fused_lm_head=True)
        mask = mask[:, 1:]
        length = mask.shape[1]  # PEFT's prompt learning puts more positions before these
        chosen, rejected = outputs.log_probs[:, -length:].sum(1).chunk(2)
        pairs = losses.Pairs(
            chosen,
            rejected,
            *self._references(inputs),
            # the log-prob of a response that was cut away whole is 0, so any length will do
            *mask.sum(1).clamp(min=1).chunk(2),
        )
        extra = {"margins": inputs["margins"]} if self._needs_margins else {}
        loss = self._pair_loss(pairs, **extra)
        if self.use_weighting:
            # these are 0 outside of responses, as log-probs are
            levels = outputs.log_sum_sq_probs[:, -length:].sum(1).chunk(2)
            loss = loss * losses.wpo_weights(pairs, *levels)
        counted = inputs.get(PAIR_WEIGHTS)
        if counted is not None:
            loss = loss * counted
        loss = loss.mean()
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss
        rewards = pairs.means if self._without_reference else pairs.log_ratios
        good, bad = (self._reward_scale * x for x in rewards)
        metrics |= {"rewards/chosen": good, "rewards/rejected": bad}
        metrics |= {"rewards/margins": good - bad, "rewards/accuracies": (good > bad).float()}
        self._record(metrics, outputs, mask, inputs["attention_mask"].sum(), counted)
        if not return_outputs:
            return loss
        with torch.no_grad():  # `compute_metrics` wants logits
            return loss, model(**given)

    def _references(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if self._without_reference:
            return None, None
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _record(
        self,
        metrics: dict[str, Tensor],
        outputs: Any,
        mask: Tensor,
        tokens: Tensor,
        counted: Tensor | None,
    ) -> None:
        """Log means over all processes: `metrics` over rows, `outputs` over tokens in `mask`.

        Args:
            counted: the weight of each pair, where some have none; these are in no mean over rows.
        """
        mode = "train" if self.model.training else "eval"
        kept = self._metrics[mode]
        counted = None if counted is None else self.accelerator.gather(counted) > 0
        for name, x in metrics.items():
            each = self.accelerator.gather(x.detach())
            if counted is not None and each.dim():
                each = each[counted]
            if each.numel():
                kept[name].append(each.mean().item())
        # these are 0 outside of responses
        fields = outputs.entropy, outputs.is_top1, outputs.mean_logits
        chosen, rejected = (
            [self.accelerator.gather_for_metrics(x).sum().item() for x in sums]
            for sums in zip(*([h.sum() for h in x.chunk(2)] for x in (mask, *fields)), strict=True)
        )
        for name, (count, _, _, logits) in (("chosen", chosen), ("rejected", rejected)):
            kept[f"logits/{name}"].append(logits / max(count, 1))
        kept["entropy"].append((chosen[1] + rejected[1]) / max(chosen[0] + rejected[0], 1))
        kept["mean_token_accuracy"].append(chosen[2] / max(chosen[0], 1))
        if mode == "train":
            read = self.accelerator.gather_for_metrics(tokens).sum().item()
            self._total_train_tokens += read // self._tp_size
        kept["num_tokens"] = [self._total_train_tokens]


@dataclasses.dataclass
class WithMargins:
    """A collator that adds the margins of the rows, ``[pairs, others]``, to another one's batch."""

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
    """The loss of that name with its options, or None without a name.

    Raises:
        ValueError, TypeError: the loss or an option is not known, or `args` has what it must not.
    """
    if name is None:
        if options:
            raise ValueError("loss_options is given, and loss is None; it must be a name")
        return None
    if name not in PAIR_LOSSES:
        meant = {other: f"it is called {ours!r} here" for other, ours in OTHER_NAMES.items()}
        raise ValueError(
            f"loss is {name!r}; it must be among {', '.join(PAIR_LOSSES)}"
            f"{did_you_mean(name, PAIR_LOSSES, meant)}"
        )
    loss = PAIR_LOSSES[name]
    options = dict(options or {})
    known = [p for p in inspect.signature(loss).parameters if p not in ("pairs", "margins")]
    for key in options:
        if key not in known:
            raise ValueError(
                f"loss_options has the key {key!r}; for loss={name!r} it may have "
                f"{', '.join(known)}{did_you_mean(key, known)}"
            )
    needed = ("weight", "other_weights") if name == "modpo" else ()
    for key in needed:
        if key not in options:
            raise ValueError(f"loss_options has no {key!r}, which modpo must have")
    if args is not None:
        _check_arguments(name, known, args)
    bound: Callable[..., Tensor] = functools.partial(loss, **options)
    one = torch.zeros(1)
    empty = losses.Pairs(one, one, one, one, one.long() + 1, one.long() + 1)
    others = options.get("other_weights")
    width = len(others) if isinstance(others, (list, tuple)) else 0
    # one call, so that the loss checks its options
    bound(empty, **({"margins": torch.zeros(1, width)} if name == "modpo" else {}))
    return bound


def _check_arguments(name: str, known: Collection[str], args: Any) -> None:
    """Refuse arguments of `DPOConfig` that a loss of crossfade would not heed, each by its name."""
    fields = {field.name: field for field in dataclasses.fields(args)}
    for key in (*OF_LOSS_TYPES, *AS_OPTIONS):
        factory = fields[key].default_factory
        plain = fields[key].default if factory is dataclasses.MISSING else factory()
        if getattr(args, key) == plain:
            continue
        given = f"args.{key} is {getattr(args, key)!r}, and loss is {name!r}"
        if key in OF_LOSS_TYPES:
            raise ValueError(
                f"{given}; it {OF_LOSS_TYPES[key]}, which goes with args.loss_type alone: leave "
                f"out one of args.{key} and loss"
            )
        option = AS_OPTIONS[key]
        there = f"give loss_options={{{option!r}: {getattr(args, key)!r}}}"
        none = f"this loss has no such option, but {', '.join(known)}"
        raise ValueError(
            f"{given}; it belongs to args.loss_type: {there if option in known else none}"
        )
    if args.use_weighting and name in WITHOUT_WEIGHTS:
        raise ValueError(
            f"args.use_weighting is True, and loss is {name!r}; it must be False, as this loss "
            "sorts the batch, so that its entries are not of one pair"
        )


def beta_of(name: str | None, options: Mapping[str, Any] | None) -> float:
    """What log-ratios are multiplied by to give a loss's rewards: its beta, or 1 if it has none."""
    if name is None:
        return 1.0
    beta = inspect.signature(PAIR_LOSSES[name]).parameters.get("beta")
    return float((options or {}).get("beta", 1.0 if beta is None else beta.default))


def check_no_reference(loss: str | None, ref_model: Any, args: Any) -> None:
    """Refuse a reference, or arguments about one, beside a loss that has no reference."""
    given = {"ref_model": ref_model is not None}
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        given[f"args.{name}"] = args is not None and getattr(args, name)
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name} is given; loss={loss!r} has no reference")
