"""Supervised fine-tuning by TRL's trainer, on texts, chats and ids."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ...extras import require
from ..fused_head import IGNORED
from .base import LogpTrainer, are_ids, columns_error, columns_of

trl = require("trl", "train")


class SFTTrainer(LogpTrainer, trl.SFTTrainer):  # type: ignore[name-defined]
    """TRL's `SFTTrainer` with the log-probs of `linear_logp`.

    Datasets may also have `prompt_ids` and `completion_ids`, or `input_ids` with a
    `completion_mask`. The loss is then that of the completions, unless `completion_only_loss` is
    False. If all weights are trained on a CPU, a step computes three products of the head's size
    and needs memory of twice the head's weight, see `linear_logp(mean_only=True)`.
    """

    _trls = trl.SFTTrainer
    _kind = "sft"
    _of_rows = False
    _equal_weights = True  # whether all tokens count alike in the loss

    def __init__(self, model: Any, args: Any = None, *rest: Any, **options: Any) -> None:
        self._mean_only = self._equal_weights and getattr(args, "loss_type", "nll") == "nll"
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
                wanted = f"prompt and completion, messages, {args.dataset_text_field}, prompt_ids "
                wanted += "and completion_ids, or input_ids"
                raise columns_error("the dataset", columns, wanted)
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
    """The `input_ids` of a row, and its `labels`: of every token, or of the completion alone."""
    if "prompt_ids" in row:
        ids = row["prompt_ids"] + row["completion_ids"]
        counts = [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"])
    else:
        ids, counts = row["input_ids"], row["completion_mask"]
    assistant = row.get("assistant_masks", [1] * len(ids))
    masks = zip(ids, counts, assistant, strict=True)
    labels = [i if (every or c) and a else IGNORED for i, c, a in masks]
    return {"input_ids": ids, "labels": labels}
