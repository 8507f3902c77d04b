"""The prompts that `CLPTrainer` samples responses to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from ...decoding.inputs import encode
from ..processes import get_logger
from ..rows import Checker, keys_of

logger = get_logger(__name__)


class Prompt(NamedTuple):
    """A prompt: its place in the dataset, what rewards read, and what the reference reads."""

    place: int
    item: Any
    ids: list[int]


class Prompts(Dataset[Prompt]):
    """The rows of a dataset as prompts.

    Args:
        rows: a list, or a dataset that has a length, of mappings with `prompt`, a text or a chat,
            or with `prompt_ids`.
        tokenizer: encodes texts; None if there are none.
        vocabulary: ids must be below it.
        longest: how many tokens a prompt may have; those that have more are left out.
        name: what errors call `rows`.

    Attributes:
        items: all prompts of `rows`, also those that are left out.

    Raises:
        TypeError, ValueError: names the row, what it was and what it must be.
    """

    def __init__(self, rows: Any, tokenizer: Any, vocabulary: int, longest: float, name: str):
        if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
            raise TypeError(
                f"{name} is a {type(rows).__name__}; it must be a list of rows or a data set with "
                "a length (streams are not supported)"
            )
        if not len(rows):
            raise ValueError(f"{name} has no rows; it must have some with prompt or prompt_ids")
        columns = set(rows[0]) if isinstance(rows[0], Mapping) else set()
        bare = tokenizer is None or bool(tokenizer("")["input_ids"])
        check = Checker(keys_of("prompts", columns), name, vocabulary, bare)
        read = []
        for i in range(len(rows)):
            check(rows[i], i)
            read.append(_prompt(rows[i], i, tokenizer, f"row {i} of {name}"))
        self.items = [prompt.item for prompt in read]
        self.rows = [prompt for prompt in read if len(prompt.ids) <= longest]
        left = len(read) - len(self.rows)
        if left:
            why = f"longer than {longest} tokens, which max_length less max_new_tokens leaves"
            if not self.rows:
                raise ValueError(f"{name} has no row left: all prompts are {why}")
            logger.warning("%s: %d of %d prompts are left out, as %s", name, left, len(read), why)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Prompt:
        return self.rows[i]


def _prompt(row: Mapping[str, Any], index: int, tokenizer: Any, name: str) -> Prompt:
    item, ids = row.get("prompt"), row.get("prompt_ids")
    if item is None:
        return Prompt(index, list(ids), list(ids))  # type: ignore[arg-type]
    if not isinstance(item, str):  # a table has None for the keys that a message does not have
        item = [{key: x for key, x in message.items() if x is not None} for message in item]
    return Prompt(index, item, list(ids) if ids else encode(item, tokenizer, name))
