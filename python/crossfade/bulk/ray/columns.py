"""Columns of datasets, and of a pipeline from files, which tasks that read and write know without
any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INDEX = "index"  # the place of a prompt among those of all files
LINE = "line"  # the prompt as JSON, and then its result
ERROR = "error"  # why a prompt failed
# The types, as arrow calls them, of the columns of results that have the same in all tasks. The
# others are JSON in files.
TYPES = {
    "index": "int64",
    "text": "string",
    "tokens": "int64",
    "logprob": "float64",
    "perplexity": "float64",
    "value": "float64",
    "preference": "float64",
    "winner": "string",
    "finished": "bool",
    "error": "string",
    "blend": "string",
    "run": "string",
}
INTS = ("seed", "max_new_tokens", "top_k")  # settings that are whole numbers


def plain(x: Any) -> Any:
    """A value of a column as JSON has it.

    Of a struct, what is null is left out, as it has the keys of all rows. A map of arrow, which is
    a list of pairs, is an object.
    """
    if hasattr(x, "tolist"):  # an array or a number of numpy
        x = x.tolist()
    if isinstance(x, Mapping):
        return {key: plain(y) for key, y in x.items() if y is not None}
    if not isinstance(x, (list, tuple)):
        return x
    if x and all(isinstance(y, tuple) and len(y) == 2 for y in x):
        return plain(dict(x))
    return [plain(y) for y in x]


def row_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The cells of a row that are not null. A whole number in a column of floats is an int, where
    one is meant: a column of ints becomes one of floats where some of its cells are null."""
    found = {name: plain(x) for name, x in given.items() if x is not None}
    for name in INTS:
        x = found.get(name)
        if isinstance(x, float) and x.is_integer():
            found[name] = int(x)
    return found
