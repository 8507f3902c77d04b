"""KTO by TRL's trainer, with a KL term that never pairs a prompt with a response of its own.

KTO estimates a divergence from mismatched pairs: a prompt and a response to another prompt. As in
the paper, these are the responses of the batch in another order if possible. TRL moves each on to
the next row, which gives a row a response to its own prompt if the prompt stands in both rows. Here
no row gets one.

Source: Ethayarajh et al., arXiv:2402.01306, section 4.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ...extras import require
from .base import LogpTrainer, are_ids, columns_error, columns_of, tell_lengths

trl = require("trl", "train")
CHUNK = 64  # how many batches of a stream are read at a time to find pairs in


class KTOTrainer(LogpTrainer, trl.KTOTrainer):  # type: ignore[name-defined]
    """TRL's `KTOTrainer` with the log-probs of `linear_logp`.

    Datasets may also have `prompt_ids` and `completion_ids`, beside `label`. The KL term pairs each
    prompt with a response to another prompt, even if a batch has one prompt several times, or a
    single row (see `with_kl_responses`). In all other batches the pairs are those of TRL.
    """

    _trls = trl.KTOTrainer
    _kind = "kto"
    _loss_types = ("kto", "apo_zero_unpaired")

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
            wanted = "prompt, completion and label, prompt_ids, completion_ids and label, or "
            raise columns_error(name, columns, f"{wanted}prompt, chosen and rejected")
        kept = dataset
        if not ids:
            kept = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        else:
            if args.max_length is not None:
                kept = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
            tell_lengths(name, dataset, kept, args)
        if not self.calculate_KL:
            return kept
        size = args.per_device_train_batch_size * args.world_size  # of all processes
        return with_kl_responses(kept, size, name)


def with_kl_responses(dataset: Any, size: int, name: str) -> Any:
    """The dataset with a column `KL_completion_ids`: for each row a response to another prompt.

    Args:
        dataset: of ids, whose rows are trained on in order.
        size: rows of a batch.
        name: what errors call the dataset.

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
    """`with_kl_responses` for a stream, which comes in chunks of a few batches.

    A row may get a response from its own chunk or the one before.
    """

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
    """For each row, the index of the row whose response it gets, which has another prompt.

    Args:
        prompts: the prompts of all rows.
        size: rows of a batch.
        name: what errors call the prompts.

    Raises:
        ValueError: all rows have the same prompt.
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
    """An order of a batch's responses in which as few as possible meet their own prompt."""
    n = len(prompts)
    for shift in range(1, n):
        if all(prompts[i] != prompts[i - shift] for i in range(n)):
            return [(i - shift) % n for i in range(n)]
    # sort rows by prompt, then move each response on by as many rows as the commonest prompt has
    counts = Counter(prompts)
    common = [prompt for prompt, _ in counts.most_common()]
    order = sorted(range(n), key=lambda i: common.index(prompts[i]))
    found = [0] * n
    for k, i in enumerate(order):
        found[i] = order[k - counts[common[0]]]
    return found


def _outside(prompts: Sequence[Hashable], row: int, size: int, name: str) -> int:
    """A row of another batch with another prompt: going back from the same place a batch before."""
    n = len(prompts)
    for back in range(size, size + n):
        source = (row - back) % n
        if prompts[source] != prompts[row]:
            return source
    raise ValueError(
        f"{name} has one prompt in all its rows; KTO's KL term is of responses to other prompts, "
        "so there must be two (or loss_type='apo_zero_unpaired', which has no such term)"
    )
