"""The class that `ray.data` runs on actors: batches of rows in, the same with results out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ... import reading
from ...extras import require
from .actor_spec import Spec
from .batch_tasks import Correct, Judge, Score, Value
from .columns import ERROR, INDEX, LINE, TYPES, plain, row_of
from .tasks import Generate, Result, Row, Task

np: Any = require("numpy", "ray")

TASKS: dict[str, Callable[[Spec], Task]] = {
    "generate": Generate,
    "score": Score,
    "value": Value,
    "correct": Correct,
    "judge": Judge,
}
# What a result has of its row, whose columns are there already.
OF_ROWS = ("index", "prompt", "id", "metadata", "settings")


class Decoder:
    """An actor of ``ray.data.Dataset.map_batches``: it loads the models once, and keeps one loop.

    A dataset has a column of ids, and columns named as the keys of a line of ``crossfade
    generate``: ``prompt`` or ``messages``, and settings of a row's own. Rows come back with all
    their columns and those of the results, of which ``error`` says why a row failed and is null
    elsewhere. A row is drawn by its id and the seed, so that its text depends neither on the number
    of actors nor on how the dataset is cut into blocks.

    Calls are asynchronous: Ray hands over batches while others are decoded, and a place that
    becomes free is taken by a row of the next batch.

    Args:
        spec: plain data, as `crossfade.bulk.ray.spec` makes and checks it.

    Example::

        spec = crossfade.bulk.ray.spec(model=["smollm2"], generation={"max_new_tokens": 64})
        ds = ds.map_batches(
            crossfade.bulk.ray.Decoder,
            fn_constructor_kwargs=spec,
            batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
    """

    def __init__(self, **spec: Any) -> None:
        self.spec = Spec.of(spec)
        self.task = TASKS[self.spec.task](self.spec)
        if self.spec.expects not in (None, self.task.run):
            raise ValueError(
                f"the run is {self.task.run}, and that of the results is {self.spec.expects}: they "
                "come from other models, another blend or other settings; results must be gone on "
                "with by those that they were begun with"
            )

    async def __call__(self, batch: Any) -> Any:
        """The results of a batch: a mapping of columns to arrays, or a table of pyarrow or
        pandas."""
        columns = _columns(batch)
        if self.spec.id not in columns:
            raise ValueError(
                f"the dataset has no column {self.spec.id!r} (columns: {', '.join(columns)}); id "
                "must name one whose values are different, by which rows are drawn"
            )
        if columns.keys().isdisjoint(("prompt", "messages", "chosen")):
            raise ValueError(
                f"the dataset has no column 'prompt' or 'messages' (columns: {', '.join(columns)})"
            )
        known = ("prompt", "messages", *self.task.settings, *self.task.keys, *self.spec.keep)
        given = {name: x for name, x in columns.items() if name in known and name != self.spec.id}
        rows = [
            _row(key, row_of({name: x[i] for name, x in given.items()}))
            for i, key in enumerate(columns[self.spec.id])
        ]
        more = self._results(await self.task(rows))
        taken = [name for name in more if name in columns]
        if taken:
            raise ValueError(
                f"the dataset has the column {taken[0]!r}, which results have themselves; rename it"
            )
        return _with(batch, more, self.task.types)

    def _results(self, found: Sequence[Result]) -> dict[str, list[Any]]:
        """The columns of results."""
        names = dict.fromkeys([*self.task.columns, *(name for x in found for name in x.record)])
        kept = [n for n in names if n not in (*OF_ROWS, *self.spec.keep, ERROR)]
        each = {name: [x.record.get(name) for x in found] for name in kept}
        return {**each, ERROR: [x.error for x in found]}


class LineDecoder(Decoder):
    """A `Decoder` of lines of files, each as JSON, with their places in place of ids."""

    async def __call__(self, batch: Any) -> Any:
        lines = zip(batch[INDEX].tolist(), batch[LINE], batch[ERROR], strict=True)
        found = await self.task([_line(*line) for line in lines])
        return {
            INDEX: batch[INDEX],
            LINE: _array([json.dumps(x.record, ensure_ascii=False) for x in found]),
            ERROR: _array([x.error for x in found]),
        }


def _row(key: Any, item: dict[str, Any]) -> Row:
    """A row of a dataset, with the error in its place if it has no id.

    An id is the same whether its column is of ints or, as some of its cells are null, of floats.
    """
    if isinstance(key, float) and key.is_integer():
        key = int(key)
    if isinstance(key, (int, str)) and not isinstance(key, bool):
        return Row(key, item)
    return Row(key, ValueError(f"the id is {key!r:.80}; it must be an int or a text"))


def _line(index: int, text: str | None, why: str | None) -> Row:
    """The row that a line of a file is, with the error in its place if it cannot be read."""
    where = f"prompt {index}"
    if text is None:
        return Row(index, ValueError(f"{where} {why}"))
    try:
        return Row(index, reading.parse_json(text, where))
    except ValueError as error:
        return Row(index, error)


def _columns(batch: Any) -> dict[str, list[Any]]:
    """The columns of a batch as lists of Python's own objects."""
    if hasattr(batch, "to_pydict"):  # Tables of pyarrow know which cells are null.
        return batch.to_pydict()
    if not isinstance(batch, Mapping) and not hasattr(batch, "assign"):  # as frames of pandas have
        raise TypeError(
            f"the batch is a {type(batch).__name__}; it must be a mapping of columns to arrays, or "
            "a table of pyarrow or pandas"
        )
    return {name: [_cell(x) for x in column] for name, column in batch.items()}


def _cell(x: Any) -> Any:
    """A cell of an array, of which numpy and pandas say by NaN that it is null."""
    x = plain(x)
    if isinstance(x, (dict, list)):
        return x
    return None if type(x).__name__ == "NAType" or x != x else x


def _with(batch: Any, more: Mapping[str, list[Any]], types: Mapping[str, str]) -> Any:
    """A batch with more columns, which have the same types where all of a batch are null."""
    if isinstance(batch, Mapping):
        return {**batch, **{name: _array(x) for name, x in more.items()}}
    if not hasattr(batch, "append_column"):  # a frame of pandas
        return batch.assign(**{name: _array(x) for name, x in more.items()})
    pyarrow = require("pyarrow", "ray")
    known = {**TYPES, **types}
    for name, x in more.items():
        batch = batch.append_column(name, pyarrow.array(x, known.get(name)))
    return batch


def _array(x: Sequence[Any]) -> Any:
    """An array of objects, whose None Ray takes for null."""
    found = np.empty(len(x), dtype=object)
    for i, value in enumerate(x):  # An assignment of lists would make columns of them.
        found[i] = value
    return found
