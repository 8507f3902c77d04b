"""Rollouts with their rewards, as `ValueTrainer` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...checks import check_number
from ...decoding.inputs import right_pad
from ..encoding import encoded
from ..fused_head import IGNORED
from ..processes import get_logger
from ..rows import check_ids

logger = get_logger(__name__)


class Rollout(NamedTuple):
    """One response of the base, as token ids. The last of them is EOS if it is `finished`."""

    prompt: list[int]
    completion: list[int]
    reward: float
    finished: bool


class Rollouts(Dataset[dict[str, Any]]):
    """The rows of a dataset as token ids, and the hidden states of their tokens if these are kept.

    Args:
        rows: a list, or a dataset that has a length. Each row is a mapping with `reward`,
            `finished`, and either `prompt_ids` and `completion_ids` or `prompt` and `completion`,
            which are texts or lists of messages.
        tokenizer: encodes texts; None if there are none.
        vocabulary: ids must be below it.
        unfinished: "drop" leaves out rows that are not finished and logs how many; "score" keeps
            them.
        name: what errors call `rows`.

    Raises:
        TypeError, ValueError: names the row, what it was and what it must be.
    """

    def __init__(
        self, rows: Any, tokenizer: Any, vocabulary: int, unfinished: str, name: str
    ) -> None:
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise TypeError(
                f"{name} is a {type(rows).__name__}; it must be a list of rows or a data set with "
                "a length (streams are not supported)"
            )
        read = [
            _rollout(rows[i], tokenizer, vocabulary, f"row {i} of {name}") for i in range(len(rows))
        ]
        self.rows = [r for r in read if r.finished or unfinished == "score"]
        self.dropped = len(read) - len(self.rows)
        if self.dropped:
            logger.warning(
                "%s: %d of %d rollouts are left out, as they were cut before they ended",
                name,
                self.dropped,
                len(read),
            )
        if not self.rows:
            cut = ", as none of them is finished" if self.dropped else ""
            raise ValueError(f"{name} has {len(read)} rows and none is left{cut}; it must have one")
        self.hidden: Tensor | None = None  # [tokens of all rows, H]
        ends = torch.tensor([len(r.completion) for r in self.rows]).cumsum(0).tolist()
        self.spans = list(zip([0, *ends], ends, strict=False))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {"rollout": self.rows[i]}
        if self.hidden is not None:
            start, end = self.spans[i]
            row["hidden"] = self.hidden[start:end]
        return row


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch, padded on the right.

    Returns:
        ``labels [B, T]``, the tokens of the completions; ``lengths`` and ``rewards [B]``; and what
        hidden states are read from: ``hidden [B, T, H]``, or ``input_ids`` and ``attention_mask
        [B, L]`` with ``starts [B]``, where each completion begins.
    """
    rollouts: list[Rollout] = [row["rollout"] for row in rows]
    batch = {
        "labels": right_pad([r.completion for r in rollouts], IGNORED)[0],
        "lengths": torch.tensor([len(r.completion) for r in rollouts]),
        "rewards": torch.tensor([r.reward for r in rollouts], dtype=torch.float32),
    }
    if "hidden" in rows[0]:
        hidden = [row["hidden"] for row in rows]
        return batch | {"hidden": torch.nn.utils.rnn.pad_sequence(hidden, batch_first=True)}
    ids, mask = right_pad([[*r.prompt, *r.completion] for r in rollouts])
    return batch | {
        "input_ids": ids,
        "attention_mask": mask,
        "starts": torch.tensor([len(r.prompt) for r in rollouts]),
    }


def _rollout(row: Any, tokenizer: Any, vocabulary: int, name: str) -> Rollout:
    if not isinstance(row, Mapping):
        raise TypeError(f"{name} is a {type(row).__name__}; it must be a mapping")
    columns = ("prompt_ids", "completion_ids") if "prompt_ids" in row else ("prompt", "completion")
    for key in (*columns, "reward", "finished"):
        if row.get(key) is None:
            raise ValueError(
                f"{name} has no {key}; it must have prompt_ids and completion_ids (or prompt and "
                "completion), reward and finished"
            )
    reward, finished = check_number(f"reward of {name}", row["reward"]), row["finished"]
    if not isinstance(finished, bool):
        raise TypeError(f"finished of {name} is {finished!r}; it must be a bool")
    if "prompt_ids" in row:
        written = row["prompt_ids"], row["completion_ids"]
    else:
        if tokenizer is None:
            raise ValueError(f"{name} is text and processing_class is None; it must be a tokenizer")
        written = encoded(row["prompt"], row["completion"], tokenizer, finished, name)
    prompt, completion = (
        check_ids(ids, f"{key} of {name}", vocabulary)
        for key, ids in zip(columns, written, strict=True)
    )
    return Rollout(prompt, completion, reward, finished)
