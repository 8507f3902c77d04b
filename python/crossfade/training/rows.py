"""Checks of rows of training data. Errors name the row, the key, what it is and must be."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

from .. import reading
from ..checks import check_number
from ..extras import require

IDS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
PROMPTS = {"prompt": "written", "prompt_ids": "ids"}
LONGEST = 1 << 63  # ids are int64


def keys_of(kind: str, columns: Collection[str], text_field: str = "text") -> dict[str, str]:
    """The keys that a trainer reads, and the kind of value that each must hold (see `CHECKS`).

    Args:
        kind: "sft", "dpo" or "kto", or "prompts" for prompts alone.
        columns: the keys of the first row. If there are ids, texts beside them are not read.
        text_field: for SFT, the key of whole texts.
    """
    if kind == "prompts":
        return {k: v for k, v in PROMPTS.items() if k in columns} or {"prompt": "written"}
    responses = ("chosen", "rejected") if "chosen" in columns else ("completion",)
    ids = [key for key in IDS if key in columns]
    found: dict[str, str] = {}
    if ids:
        found = dict.fromkeys(ids, "ids")
    elif kind == "sft" and "input_ids" in columns:
        found["input_ids"] = "ids"
        found |= {k: "mask" for k in ("completion_mask", "assistant_masks") if k in columns}
        found |= {"labels": "labels"} if "labels" in columns else {}
    elif kind == "sft" and not {"prompt", "completion"} <= set(columns):
        chats = [key for key in ("messages", "conversations") if key in columns]
        found = dict.fromkeys(chats, "chat") if chats else {text_field: "text"}
    else:
        found = dict.fromkeys((*(k for k in ("prompt",) if k in columns), *responses), "written")
    if kind == "kto" and "chosen" not in found:
        found["label"] = "label"
    if kind == "dpo" and "margins" in columns:
        found["margins"] = "numbers"
    found |= {"tools": "tools"} if "tools" in columns and not ids else {}
    return found


class Checker:
    """Checks one row after another.

    Args:
        keys: the keys to look at, as `keys_of` gives them.
        name: what errors call the data.
        vocabulary: ids must be below it.
        bare: whether an empty prompt is allowed, because the tokenizer puts a token (BOS) before
            each text, so that the first token of the response can be predicted from something.
    """

    def __init__(
        self, keys: Mapping[str, str], name: str, vocabulary: int = LONGEST, bare: bool = True
    ) -> None:
        self.keys, self.name, self.vocabulary, self.bare = keys, name, vocabulary, bare
        self.kinds: dict[str, str] = {}  # "a text" or "a chat", and a key that had it first

    def __call__(self, row: Any, index: int) -> None:
        """Check a row.

        Raises:
            TypeError, ValueError: name the row, the key, what it was and what it must be.
        """
        where = f"row {index} of {self.name}"
        if not isinstance(row, Mapping):
            raise TypeError(f"{where} is a {type(row).__name__}; it must be a mapping")
        for key, kind in self.keys.items():
            value = row.get(key)
            if value is None:
                if kind == "tools":
                    continue
                there = "is None" if key in row else "is missing"
                raise ValueError(f"{key} of {where} {there}; it must have {', '.join(self.keys)}")
            CHECKS[kind](self, value, f"{key} of {where}")
            if kind == "written":
                found = "a text" if isinstance(value, str) else "a chat"
                first, of = next(iter(self.kinds.items()), (found, key))
                if found != first:
                    raise ValueError(
                        f"{key} of {where} is {found}, and {of} of the first row is {first}; all "
                        "must be texts, or all lists of messages"
                    )
                self.kinds[found] = of
        if self.keys.get("prompt") == "written" and row["prompt"] == "" and not self.bare:
            raise ValueError(
                f"prompt of {where} is empty, and the tokenizer puts no token before a text; it "
                "must have one, whose successor is predicted"
            )
        lengths = {k: len(row[k]) for k, v in self.keys.items() if v in ("mask", "labels")}
        for key, length in lengths.items():
            if length != len(row["input_ids"]):
                raise ValueError(
                    f"{key} of {where} has {length} entries; it must have "
                    f"{len(row['input_ids'])}, as input_ids"
                )

    # ---- one key's value

    def _ids(self, value: Any, name: str) -> None:
        check_ids(value, name, self.vocabulary)

    def _labels(self, value: Any, name: str) -> None:
        values = [x for x in _list(value, name, "labels") if x != -100]
        if values:
            self._ids(values, name)

    def _mask(self, value: Any, name: str) -> None:
        for x in _list(value, name, "0 and 1"):
            if x not in (0, 1):
                raise ValueError(f"{name} has {x!r:.80}; it must be a list of 0 and 1")

    def _numbers(self, value: Any, name: str) -> None:
        for x in _list(value, name, "numbers"):
            check_number(name, x)

    def _label(self, value: Any, name: str) -> None:
        if not isinstance(value, (bool, numbers.Integral)) or value not in (0, 1):
            raise TypeError(f"{name} is {value!r:.80}; it must be a bool")

    def _text(self, value: Any, name: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{name} is {value!r:.80}; it must be a text")
        reading.check_unicode(value, name)

    def _chat(self, value: Any, name: str) -> None:
        if not isinstance(value, (list, tuple)) or not value:
            raise TypeError(f"{name} is {value!r:.80}; it must be a list of messages, not empty")
        for i, message in enumerate(value):
            check_message(message, f"message {i} in {name}")

    def _written(self, value: Any, name: str) -> None:
        if isinstance(value, (list, tuple)):
            self._chat(value, name)
        elif isinstance(value, str):
            self._text(value, name)
        else:
            raise TypeError(f"{name} is {value!r:.80}; it must be a text or a list of messages")

    def _tools(self, value: Any, name: str) -> None:
        if isinstance(value, str):
            reading.parse_json(value, name)


CHECKS: dict[str, Callable[[Checker, Any, str], None]] = {
    "ids": Checker._ids,
    "labels": Checker._labels,
    "mask": Checker._mask,
    "numbers": Checker._numbers,
    "label": Checker._label,
    "text": Checker._text,
    "chat": Checker._chat,
    "written": Checker._written,
    "tools": Checker._tools,
}


def check_ids(value: Any, name: str, vocabulary: int) -> list[int]:
    """The token ids of a list, an array or a tensor, as a list. There must be at least one."""
    found = []
    for x in _list(value, name, "token ids"):
        if isinstance(x, bool) or not isinstance(x, numbers.Integral):
            raise TypeError(f"{name} has {x!r:.80}; it must be a list of token ids")
        if not 0 <= int(x) < vocabulary:
            limit = "2**63" if vocabulary == LONGEST else str(vocabulary)
            raise ValueError(f"{name} has id {x}; ids must be within [0, {limit})")
        found.append(int(x))
    if not found:
        raise ValueError(f"{name} has no tokens; it must have at least 1")
    return found


def check_message(message: Any, name: str) -> None:
    """Require a role, and a content or calls of tools; or `from` and `value`, as in older data."""
    if not isinstance(message, Mapping):
        raise TypeError(f"{name} is {message!r:.80}; it must be a mapping with role and content")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise TypeError(f"{name} has the role {role!r:.80}; it must be a text")
    if not isinstance(content, (str, list)) and not message.get("tool_calls"):
        raise TypeError(f"{name} has the content {content!r:.80}; it must be a text")
    reading.check_depth(message, name)
    reading.check_unicode(message, name)


def check_rows(kind: str, found: list[Any], name: str, text_field: str = "text") -> None:
    """Check all rows of a file, which errors count from 1, and that one dataset can hold them."""
    for number, row in enumerate(found, 1):
        if row.keys() != found[0].keys():
            raise ValueError(
                f"row {number} of {name} has the keys {', '.join(row)}; it must have "
                f"{', '.join(found[0])}, as the first"
            )
    keys = keys_of(kind, found[0], text_field)
    if keys.keys() <= found[0].keys():  # else the trainer says which keys it wants
        check = Checker(keys, name)
        for number, row in enumerate(found, 1):
            check(row, number)
    array = require("pyarrow", "train").array
    for key in found[0]:
        values = [row[key] for row in found]
        if not _converts(array, values):
            low, high = 1, len(values)  # the first row that does not fit to those before
            while low < high:
                middle = (low + high) // 2
                low, high = (
                    (middle + 1, high) if _converts(array, values[:middle]) else (low, middle)
                )
            raise ValueError(
                f"{key} of row {low} of {name} is {values[low - 1]!r:.80}, which is of "
                "another type than in the rows before, or holds what a table cannot"
            )


def _converts(array: Callable[[list[Any]], Any], values: list[Any]) -> bool:
    try:
        array(values)
    except (ValueError, TypeError, OverflowError, NotImplementedError):
        return False
    return True


def checked(
    dataset: Any, kind: str, name: str, vocabulary: int, text_field: str, bare: bool
) -> Any:
    """The dataset, after all its rows were checked. Rows of a stream are checked as they come.

    Raises:
        TypeError, ValueError: it is no dataset, has no rows, or has a row that is wrong.
    """
    datasets = require("datasets", "train")
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}; it must be a datasets.Dataset or a "
            "datasets.IterableDataset (Dataset.from_list makes one of rows)"
        )
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"{name} has no rows")
    keys = keys_of(kind, first, text_field)
    if {"image", "images"} & set(first) or not keys.keys() <= set(first):
        return dataset  # TRL checks images, and the trainer says which keys are missing
    check = Checker(keys, name, vocabulary, bare)
    if isinstance(dataset, datasets.Dataset):
        if dataset.format["type"] != "custom":
            for i, row in enumerate(dataset.with_format(None).select_columns(list(keys))):
                check(row, i)
        return dataset

    def looked_at(row: Any, index: int) -> Any:
        check(row, index)
        return row

    return dataset.map(looked_at, with_indices=True, features=dataset.features)


def check_template(dataset: Any, tokenizer: Any, name: str) -> None:
    """Find the row with a chat that the tokenizer's template refuses.

    Raises:
        ValueError: names the row, and says what the template says.
    """
    for i, row in enumerate(dataset):
        chats = [row[key] for key in ("messages", "conversations") if row.get(key)]
        chats += [row["prompt"]] if "prompt" in row else []
        responses = [row[key] for key in ("chosen", "rejected", "completion") if key in row]
        chats += [[*row.get("prompt", ()), *x] for x in responses]
        for chat in chats:
            _render(tokenizer, list(chat), f"row {i} of {name}")


def _render(tokenizer: Any, chat: list[Any], where: str) -> None:
    try:
        tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template is a program, which may raise anything
        raise ValueError(f"the chat template does not take the chat in {where}: {error}") from error


def check_tokens(dataset: Any, name: str, vocabulary: int) -> None:
    """Require that the model knows all ids of an encoded dataset; its tokenizer may have more."""
    datasets = require("datasets", "train")
    if not isinstance(dataset, datasets.Dataset):
        return
    compute = require("pyarrow.compute", "train")
    for key in (*IDS, "input_ids"):
        if key in dataset.column_names:
            column = dataset.with_format("arrow")[key]
            most = max(
                (
                    compute.max(compute.list_flatten(chunk)).as_py() or 0
                    for chunk in _chunks(column)
                ),
                default=0,
            )
            if most >= vocabulary:
                raise ValueError(
                    f"{key} of {name} has id {most} once its texts are encoded; the model has "
                    f"{vocabulary} (resize_token_embeddings, or the tokenizer is another model's)"
                )


def lengths(dataset: Any) -> list[int]:
    """How many tokens each row of an encoded dataset has.

    That of a pair is the length of the prompt with the longer response.
    """
    compute = require("pyarrow.compute", "train")
    counts: dict[str, list[int]] = {
        key: [
            count
            for chunk in _chunks(dataset.with_format("arrow")[key])
            for count in compute.list_value_length(chunk).to_pylist()
        ]
        for key in (*IDS, "input_ids")
        if key in dataset.column_names
    }
    if "input_ids" in counts:
        return counts["input_ids"]
    prompts = counts.pop("prompt_ids")
    return [sum(x) for x in zip(prompts, map(max, zip(*counts.values(), strict=True)), strict=True)]


def _chunks(column: Any) -> Any:
    return column.chunks if hasattr(column, "chunks") else [column]


def _list(value: Any, name: str, of: str) -> list[Any]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} is {value!r:.80}; it must be a list of {of}")
    return list(value)
