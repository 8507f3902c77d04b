"""KTO by TRL's trainer, whose KL term is of responses to other prompts.

KTO estimates a divergence from pairs of a prompt and a response to another prompt. The responses of
a batch are, where that can be, those of its own rows in another order, as in the paper and in TRL,
which moves them on by one. Here no row gets a response to its own prompt.

Source: Ethayarajh et al., arXiv:2402.01306, section 4.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ...extras import require
from .base import LogpTrainer, are_ids, check_some, columns_of, listed

trl = require("trl", "train")
CHUNK = 64  # batches of a stream that are looked at together


class KTOTrainer(LogpTrainer, trl.KTOTrainer):  # type: ignore[name-defined]
    """TRL's `KTOTrainer`, by `linear_logp`.

    Datasets may have `prompt_ids` and `completion_ids` besides `label`. The KL term's responses
    answer other prompts, also where a batch has a prompt several times or a single row
    (`with_kl_responses`); where it has not, they are TRL's.
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


def with_kl_responses(dataset: Any, size: int, name: str) -> Any:
    """A dataset of ids with a column `KL_completion_ids`, for batches of `size` rows in order.

    Raises:
        ValueError: all rows have the same prompt.
    """
    datasets = require("datasets", "train")
    if not isinstance(dataset, datasets.Dataset):
        chunk = _Chunk(size, name)
        return dataset.map(chunk, batched=True, batch_size=CHUNK * size)
    prompts = [tuple(ids) for ids in dataset["prompt_ids"]]
    sources = dataset.select(mismatched(prompts, size, name)).select_columns("completion_ids")
    if "KL_completion_ids" in dataset.column_names:
        dataset = dataset.remove_columns("KL_completion_ids")
    sources = sources.rename_column("completion_ids", "KL_completion_ids")
    return datasets.concatenate_datasets([dataset, sources], axis=1)


class _Chunk:
    """The same of some batches of a stream, which may take responses from the chunk before."""

    def __init__(self, size: int, name: str) -> None:
        self.size, self.name = size, name
        self.prompts: list[tuple[int, ...]] = []
        self.responses: list[list[int]] = []

    def __call__(self, rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        now = [tuple(ids) for ids in rows["prompt_ids"]]
        prompts, responses = self.prompts + now, self.responses + rows["completion_ids"]
        found = mismatched(prompts, self.size, self.name)[len(self.prompts) :]
        self.prompts, self.responses = now, rows["completion_ids"]
        return {"KL_completion_ids": [responses[i] for i in found]}


def mismatched(prompts: Sequence[Hashable], size: int, name: str = "prompts") -> list[int]:
    """For each row, the row whose response it gets, which has another prompt.

    Raises:
        ValueError: all have the same prompt.
    """
    found: list[int] = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        found.extend(
            start + source if batch[source] != prompt else _outside(prompts, start + i, size, name)
            for i, (prompt, source) in enumerate(zip(batch, _in_batch(batch), strict=True))
        )
    return found


def _in_batch(prompts: Sequence[Hashable]) -> list[int]:
    """An order of a batch's responses in which as few as can be meet their own prompts."""
    n = len(prompts)
    for shift in range(1, n):
        if all(prompts[i] != prompts[i - shift] for i in range(n)):
            return [(i - shift) % n for i in range(n)]
    # rows with one prompt side by side, and all moved on by as many as the commonest prompt has
    counts = Counter(prompts)
    common = [prompt for prompt, _ in counts.most_common()]
    order = sorted(range(n), key=lambda i: common.index(prompts[i]))
    found = [0] * n
    for k, i in enumerate(order):
        found[i] = order[k - counts[common[0]]]
    return found


def _outside(prompts: Sequence[Hashable], row: int, size: int, name: str) -> int:
    """The nearest row with another prompt, from the same place of the batch before on."""
    n = len(prompts)
    for back in range(size, size + n):
        source = (row - back) % n
        if prompts[source] != prompts[row]:
            return source
    raise ValueError(
        f"{name} has one prompt in all its rows; KTO's KL term is of responses to other prompts, "
        "so there must be two (or loss_type='apo_zero_unpaired', which has no such term)"
    )
