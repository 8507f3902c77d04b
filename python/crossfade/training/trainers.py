"""TRL's trainers with the log-probs of `linear_logp`: few logits are computed, in tiles.

All that TRL documents of these classes holds: arguments, datasets, PEFT, references, metrics and
checkpoints. Products of the head are float32, also under bfloat16 autocast.

Besides TRL's formats, datasets may be of ids, with texts beside them or without: `prompt_ids` with
`chosen_ids` and `rejected_ids`, or with `completion_ids`. They are trained on as they are: sampled
tokens are not what their text would be encoded as, and nothing is put at their end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..extras import require
from .fused_head import IGNORED
from .kl_pairs import with_kl_responses
from .pair_loss import WITHOUT_REFERENCE, WithMargins, beta_of, check_no_reference, pair_loss
from .trainer_base import LogpTrainer, NoReference, are_ids, check_some, columns_of, listed

trl = require("trl", "train")


class SFTTrainer(LogpTrainer, trl.SFTTrainer):  # type: ignore[name-defined]
    """TRL's `SFTTrainer`, by `linear_logp`.

    Datasets may have `prompt_ids` and `completion_ids`, or `input_ids` with a `completion_mask`:
    the loss is of the completions, unless `completion_only_loss` is False. Where all weights are
    trained on a CPU, the head takes three products a step and memory of twice its weight, see
    `linear_logp(uniform=True)`.
    """

    _trls = trl.SFTTrainer
    _kind = "sft"

    def __init__(self, model: Any, args: Any = None, *rest: Any, **options: Any) -> None:
        self._uniform = getattr(args, "loss_type", "nll") == "nll"
        super().__init__(model, args, *rest, **options)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any
    ) -> Any:
        ids = are_ids("the dataset", dataset, ("prompt_ids", "completion_ids"))
        columns = columns_of(dataset)
        if not ids and not {"input_ids", "messages", "conversations"} & columns:
            formatted = (rest[1] if len(rest) > 1 else options.get("formatting_func")) is not None
            text = args.dataset_text_field in columns or {"prompt", "completion"} <= columns
            if not formatted and not text:
                raise ValueError(
                    f"the dataset has the columns {listed(columns)}; it must have prompt and "
                    f"completion, messages, {args.dataset_text_field}, prompt_ids and "
                    "completion_ids, or input_ids"
                )
        mask = "input_ids" in columns and "completion_mask" in columns
        if "labels" not in columns and (ids or mask):
            if args.assistant_only_loss and "assistant_masks" not in columns:
                raise ValueError(
                    "args.assistant_only_loss is True, and the dataset is of ids without "
                    "assistant_masks; it must be False"
                )
            every = args.completion_only_loss is False
            dataset = dataset.map(functools.partial(_labelled, every=every))
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **options)


def _labelled(row: Mapping[str, Any], every: bool) -> dict[str, list[int]]:
    """`input_ids`, and `labels` of the completion alone or of every token."""
    if "prompt_ids" in row:
        ids = row["prompt_ids"] + row["completion_ids"]
        counts = [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"])
    else:
        ids, counts = row["input_ids"], row["completion_mask"]
    assistant = row.get("assistant_masks", [1] * len(ids))
    masks = zip(ids, counts, assistant, strict=True)
    labels = [i if (every or c) and a else IGNORED for i, c, a in masks]
    return {"input_ids": ids, "labels": labels}


class KTOTrainer(LogpTrainer, trl.KTOTrainer):  # type: ignore[name-defined]
    """TRL's `KTOTrainer`, by `linear_logp`.

    Datasets may have `prompt_ids` and `completion_ids` besides `label`. The KL term's responses
    answer other prompts, also where a batch has a prompt several times or a single row
    (`training.kl_pairs`); where it has not, they are TRL's.
    """

    _trls = trl.KTOTrainer
    _kind = "kto"

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        name = f"the {dataset_name} dataset"
        columns = columns_of(dataset)
        if "chosen_ids" in columns and "completion_ids" not in columns:
            raise ValueError(
                f"{name} has chosen_ids; KTO is of single responses, it must have "
                "completion_ids and label"
            )
        ids = are_ids(name, dataset, ("prompt_ids", "completion_ids"))
        paired = {"chosen", "rejected"} <= columns
        if not paired and not ("label" in columns and (ids or "completion" in columns)):
            raise ValueError(
                f"{name} has the columns {listed(columns)}; it must have prompt, completion and "
                "label, prompt_ids, completion_ids and label, or chosen and rejected"
            )
        if not ids:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        elif args.max_length is not None:
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
        check_some(name, dataset, args)
        if not self.calculate_KL:
            return dataset
        return with_kl_responses(dataset, args.per_device_train_batch_size, name)


class DPOTrainer(LogpTrainer, trl.DPOTrainer):  # type: ignore[name-defined]
    """TRL's `DPOTrainer`, by `linear_logp`, and with the losses of `crossfade.losses`.

    Datasets may have `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        loss: a name in `crossfade.losses.PAIR_LOSSES`, or "modpo"; None leaves the loss to TRL's
            `args.loss_type`. Rewards that are logged are beta times log-ratios; without a
            reference, for "orpo" and "simpo", times mean log-probs, and no reference is loaded.
        loss_options: the loss's arguments by name, such as ``{"beta": 2.0, "gamma": 1.0}``. Those
            of `args` that TRL's own losses take must then be left as they are. "modpo" takes its
            `margins` from the dataset's column of that name: of each row the list of the other
            objectives' margins.

    Raises:
        ValueError, TypeError: a loss or an option is not known, or does not fit the others.
        NotImplementedError: `args.use_weighting`, whose weights `linear_logp` does not have.
    """

    _trls = trl.DPOTrainer
    _kind = "dpo"

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
        if args is not None and args.use_weighting:
            raise NotImplementedError(
                "args.use_weighting is True; it must be False, as linear_logp does not give the "
                "sums of squared probabilities that its weights are made of. trl.DPOTrainer does"
            )
        if self._without_reference:
            check_no_reference(loss, ref_model, args)
            ref_model = NoReference()
        super().__init__(model, ref_model, args, *rest, **options)
        if self._without_reference:
            self.ref_model = None
        if self._needs_margins:
            self.data_collator = WithMargins(self.data_collator)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        name = f"the {dataset_name} dataset"
        ids = are_ids(name, dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
        columns = columns_of(dataset)
        if not ids and not {"chosen", "rejected"} <= columns:
            raise ValueError(
                f"{name} has the columns {listed(columns)}; it must have prompt, chosen and "
                "rejected, or prompt_ids, chosen_ids and rejected_ids"
            )
        if self._needs_margins and "margins" not in columns:
            raise ValueError(
                f"{name} has the columns {listed(columns)}; with loss='modpo' it must have margins"
            )
        if not ids:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            # as TRL does with texts: of these rows nothing but the prompt would be left
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
        check_some(name, dataset, args)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._needs_margins and "margins" not in self._signature_columns:
            self._signature_columns.append("margins")

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return super().compute_ref_log_probs(
            model, {name: x for name, x in inputs.items() if name != "margins"}
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._pair_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        no_inputs = ("completion_mask", "margins", "ref_chosen_logps", "ref_rejected_logps")
        given = {name: x for name, x in inputs.items() if name not in no_inputs}
        given["use_cache"] = False
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
        outputs = model(**given, labels=labels, fused_lm_head=True)
        mask = mask[:, 1:]
        length = mask.shape[1]  # prompt-learning PEFT puts more before it
        chosen, rejected = outputs.log_probs[:, -length:].sum(1).chunk(2)
        pairs = losses.Pairs(
            chosen,
            rejected,
            *self._references(inputs),
            # responses that were cut away whole have log-prob 0, whatever their length
            *mask.sum(1).clamp(min=1).chunk(2),
        )
        extra = {"margins": inputs["margins"]} if self._needs_margins else {}
        loss = self._pair_loss(pairs, **extra).mean()
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss
        rewards = pairs.means if self._without_reference else pairs.log_ratios
        good, bad = (self._reward_scale * x for x in rewards)
        metrics |= {"rewards/chosen": good, "rewards/rejected": bad}
        metrics |= {"rewards/margins": good - bad, "rewards/accuracies": (good > bad).float()}
        self._record(metrics, outputs, mask, inputs["attention_mask"].sum())
        if not return_outputs:
            return loss
        with torch.no_grad():  # for `compute_metrics`, which wants logits
            return loss, model(**given)

    def _references(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if self._without_reference:
            return None, None
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _record(
        self, metrics: dict[str, Tensor], outputs: Any, mask: Tensor, tokens: Tensor
    ) -> None:
        """Means over the batch and all processes; of `mask`'s tokens, over the responses'."""
        mode = "train" if self.model.training else "eval"
        kept = self._metrics[mode]
        for name, x in metrics.items():
            kept[name].append(self.accelerator.gather(x.detach()).mean().item())
        fields = outputs.entropy, outputs.is_top1, outputs.mean_logits  # 0 outside of responses
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
