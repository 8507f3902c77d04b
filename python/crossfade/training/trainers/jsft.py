"""Supervised fine-tuning of one model to answer and to judge answers (JSFT).

Source: Lee et al., arXiv:2402.11253, section 3.1.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...checks import check_number
from ...extras import require
from ..fused_head import IGNORED
from ..processes import get_logger
from .base import columns_of
from .sft import SFTTrainer

trl = require("trl", "train")
logger = get_logger(__name__)
# What a token is in the column `judge_tokens`: none of a judgment, one of it, or its label.
OTHER, OF_JUDGMENT, LABEL = 0, 1, 2
# What is counted over the tokens of the rows that a log tells of: sums, and their numbers.
COUNTED = ("loss/sft", "loss/judge", "judge_accuracy")


class JSFTTrainer(SFTTrainer):
    """`SFTTrainer` for rows of answers and rows of judgments, which may count more.

    Datasets have `prompt_ids` and `completion_ids`, and `judge`: whether a row is a judgment. Rows
    without it are no judgments. The completion of a judgment begins with its label, which is one
    token, and may go on with a rationale. The loss is ``sum_t w_t nll_t / sum_t w_t`` over the
    tokens of a step, in all its batches and all processes (with the defaults of `args`), where w is
    `judge_weight` for the tokens of judgments and 1 for the others.

    Rows that are longer than ``args.max_length`` are left out, and counted in the log: what is cut
    from the left of a judgment is its question, what is cut from the right its label.

    Beside the figures of `SFTTrainer` it logs `loss/sft` and `loss/judge`, the mean loss of a token
    in rows of either kind, and `judge_accuracy`, the share of judgments whose label is the most
    likely token. They are of all tokens since the last log, or of all that are evaluated.

    Args:
        judge_weight: how often a token of a judgment counts, above 0. A judgment has one label
            beside hundreds of tokens of an answer. At 1, the paper's, the loss is that of
            `SFTTrainer` to the last bit.

    Raises:
        ValueError: `judge_weight` is not above 0, or `args` has what does not go with it. Packing
            is refused always, because packed rows are not told apart.
    """

    def __init__(
        self, model: Any, args: Any = None, *rest: Any, judge_weight: float = 1.0, **options: Any
    ) -> None:
        self.judge_weight = check_number("judge_weight", judge_weight)
        if self.judge_weight <= 0:
            raise ValueError(f"judge_weight is {judge_weight}; it must be above 0")
        self._equal_weights = self.judge_weight == 1
        self._mean_weight: Tensor | float = 1.0
        self._check_arguments(args)
        super().__init__(model, args, *rest, **options)
        if not self._equal_weights and self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func is given, and judge_weight is {self.judge_weight}; it must be "
                "1.0 then"
            )
        self.data_collator = WithJudgeTokens(self.data_collator)

    def _check_arguments(self, args: Any) -> None:
        for name in ("packing", "eval_packing"):
            if getattr(args, name, False):
                raise ValueError(
                    f"args.{name} is True; it must be False, as packed rows of answers and of "
                    "judgments are not told apart"
                )
        refused = {
            "loss_type": getattr(args, "loss_type", "nll") != "nll",
            "label_smoothing_factor": getattr(args, "label_smoothing_factor", 0) > 0,
            "parallelism_config": getattr(
                getattr(args, "parallelism_config", None), "sp_enabled", False
            ),
        }
        for name, is_refused in refused.items():
            if is_refused and not self._equal_weights:
                raise ValueError(
                    f"args.{name} is {getattr(args, name)!r}, and judge_weight is "
                    f"{self.judge_weight}; weights go with the plain loss of tokens alone: leave "
                    f"out one of args.{name} and judge_weight"
                )

    # ---- rows

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any
    ) -> Any:
        columns = columns_of(dataset)
        name = f"the {rest[-1]} dataset"
        if "judge" in columns and "judge_tokens" not in columns:
            if not {"prompt_ids", "completion_ids"} <= columns:
                raise ValueError(
                    f"{name} has judge, but no prompt_ids and completion_ids; it must have them, "
                    "as EOS would be put after the label of a judgment that is a text"
                )
            mark = functools.partial(_marked, name=name)
            dataset = dataset.map(mark, with_indices=True)
        whole = copy.copy(args)
        whole.max_length = None  # nothing is cut
        prepared = super()._prepare_dataset(dataset, processing_class, whole, *rest, **options)
        return self._short_enough(prepared, name, args)

    def _short_enough(self, prepared: Any, name: str, args: Any) -> Any:
        limit = args.max_length
        if limit is None:
            return prepared
        kept = prepared.filter(lambda row: len(row["input_ids"]) <= limit)
        if not hasattr(kept, "__len__") or len(kept) == len(prepared):
            return kept
        if len(kept) == 0:
            raise ValueError(
                f"{name} has no row left: all are longer than args.max_length, {limit} tokens"
            )
        judgments = [sum(map(_is_judgment, x)) for x in (prepared, kept)]
        logger.warning(
            "%s: %d of %d rows are left out, as they are longer than args.max_length, %d tokens; "
            "%d of them are judgments",
            name,
            len(prepared) - len(kept),
            len(prepared),
            limit,
            judgments[0] - judgments[1],
        )
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "judge_tokens" not in self._signature_columns:
            self._signature_columns.append("judge_tokens")

    # ---- the loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: Any) -> Any:
        """As in Transformers; and find the mean weight of the tokens that are counted."""
        count = super()._get_num_items_in_batch(batch_samples, device)
        if count is not None and not self._equal_weights:
            judged = [
                {"labels": x["labels"].masked_fill(x["judge_tokens"] == OTHER, IGNORED)}
                for x in batch_samples
            ]
            of_judge = super()._get_num_items_in_batch(judged, device)
            self._mean_weight = 1 + (self.judge_weight - 1) * of_judge / count.clamp(min=1)
        return count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As in TRL, with the weights of `judge_weight`."""
        kinds = inputs["judge_tokens"][:, 1:]
        inputs = {name: x for name, x in inputs.items() if name != "judge_tokens"}

        def weighted(**given: Any) -> Any:
            """The model, whose log-probs count by the weight of their token over the mean one."""
            outputs = model(**given)
            if not given.get("fused_lm_head"):
                return outputs  # of logits, for compute_metrics
            self._count(outputs, kinds)
            if self._equal_weights:
                return outputs
            length = kinds.shape[1]  # PEFT's prompt learning puts more positions before these
            weights = torch.where(kinds == OTHER, 1.0, self.judge_weight)
            mean = self._mean_weight
            if num_items_in_batch is None:  # the loss is the mean of this batch
                mask = outputs.label_mask[:, -length:]
                mean = (weights * mask).sum() / mask.sum().clamp(min=1)
            log_probs = outputs.log_probs.clone()
            log_probs[:, -length:] *= weights / mean
            return dataclasses.replace(outputs, log_probs=log_probs)

        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch)

    def _count(self, outputs: Any, kinds: Tensor) -> None:
        """Add the tokens of a batch, of all processes, to what the next log tells of."""
        length = kinds.shape[1]
        mask, nll, hits = (
            x.detach()[:, -length:]
            for x in (outputs.label_mask, -outputs.log_probs, outputs.is_top1)
        )
        of = mask & (kinds == OTHER), mask & (kinds != OTHER), mask & (kinds == LABEL)
        sums = [(x * y).sum(1).float() for x, y in zip((nll, nll, hits), of, strict=True)]
        rows = torch.stack([*sums, *(x.sum(1).float() for x in of)], dim=1)
        mode = "train" if self.model.training else "eval"
        # an evaluation's last batch is filled up with rows that gather_for_metrics leaves out
        if mode == "eval" and not self.padding_free:
            found = self.accelerator.gather_for_metrics(rows)
        else:
            found = self.accelerator.gather(rows.sum(0, keepdim=True))
        pairs = zip(*found.cpu().double().sum(0).view(2, -1).tolist(), strict=True)
        self._tally(mode, dict(zip(COUNTED, pairs, strict=True)))

    compute_loss_func: Any
    _signature_columns: list[str]


@dataclasses.dataclass
class WithJudgeTokens:
    """A collator that adds `judge_tokens`, ``[rows, tokens]``, to the batch of TRL's collator."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        kinds = [
            torch.tensor(row.get("judge_tokens") or [OTHER] * len(row["input_ids"])) for row in rows
        ]
        labels = batch["labels"]
        if len(labels) < len(rows):  # padding-free: the rows of a batch are one
            kinds = [torch.cat(kinds)]
        found = torch.full_like(labels, OTHER)
        for to, kind in zip(found, kinds, strict=True):
            to[: len(kind)] = kind
        return {**batch, "judge_tokens": found}


def _marked(row: Mapping[str, Any], index: int, name: str) -> dict[str, list[int]]:
    """The `judge_tokens` of a row."""
    judge = row["judge"]
    if judge is not None and not isinstance(judge, bool):
        raise TypeError(f"judge of row {index} of {name} is {judge!r:.80}; it must be a bool")
    before, after = len(row["prompt_ids"]), len(row["completion_ids"])
    marks = [LABEL] + [OF_JUDGMENT] * (after - 1) if judge else [OTHER] * after
    return {"judge_tokens": [OTHER] * before + marks}


def _is_judgment(row: Mapping[str, Any]) -> bool:
    return LABEL in (row.get("judge_tokens") or ())
