"""What an actor does with rows: the models of its spec, and how it writes texts."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...drafts import Draft
from ...policies.self_judge.question import Question
from .. import settings
from ..open_loop import Item, OpenLoop
from ..prompts import Line, line_of
from ..records import seed_of
from ..searching import search_of
from ..texts import Texts
from .actor_spec import Spec

BAD = (TypeError, ValueError, NotImplementedError)  # what a row at fault raises


@dataclass(frozen=True)
class Row:
    """A row of a dataset.

    Attributes:
        id: what its draws are made of, together with the seed.
        item: a text, or a mapping of its keys, as a line of a file has them; or the error that kept
            it from being read.
    """

    id: Any
    item: Any


@dataclass(frozen=True)
class Result:
    """What came of a row: what is said of it, and why it failed, if it did."""

    record: dict[str, Any]
    error: str | None = None


class Task(ABC):
    """Loads the models of a spec, and works on rows.

    Attributes:
        keys: those of a row besides the prompt and the settings.
        settings: those that a row may have of its own.
        columns: what all results have.
        types: those of columns in arrow that differ between tasks.
        run: the identity of what is done, as results have it.
    """

    keys: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("weights", "system")
    columns: tuple[str, ...] = ()
    types: Mapping[str, str] = {}

    def __init__(self, spec: Spec) -> None:
        self.spec, self.plan = spec, spec.plan()
        device = spec.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.loaded = self.plan.load(device, spec.dtype)
        free = dict.fromkeys(self.plan.free - self.plan.faders.keys(), 1.0)
        chats = bool(spec.system) or self.loaded.answers_chats(self.loaded.blend(free))
        self.chat = chats if spec.chat is None else spec.chat
        self.run = ""
        self._faders: set[tuple[Any, ...]] = set()  # positions of faders that were checked

    async def __call__(self, rows: Sequence[Row]) -> list[Result]:
        """The result of each row. A row that cannot be worked on is told so in its own."""
        read = [self._tried(row) for row in rows]
        good = [x for x in read if not isinstance(x, Result)]
        found = iter(await self.work(good) if good else [])
        return [x if isinstance(x, Result) else next(found) for x in read]

    def _tried(self, row: Row) -> Any:
        """A row that was read, or its result if it cannot be."""
        try:
            if isinstance(row.item, ValueError):
                raise row.item
            return self.read(row)
        except BAD as error:
            return self.failure(row, error)

    @abstractmethod
    def read(self, row: Row) -> Any:
        """A row, checked.

        Raises:
            TypeError, ValueError: says what is wrong with it.
        """

    @abstractmethod
    async def work(self, rows: Sequence[Any]) -> list[Result]:
        """The results of rows that were read."""

    def line(self, row: Row) -> Line:
        """The prompt of a row and its settings, with the formulas checked at its faders."""
        item = row.item
        if isinstance(item, dict):
            item = {key: x for key, x in item.items() if key not in self.keys}
        line = line_of(item, row.id, keep=self.spec.keep, known=self.settings)
        if self.spec.chat is False and "system" in line.settings:
            raise ValueError(f'chat is False, and prompt {row.id} has a "system", for chats')
        weights = line.settings.get("weights", {})
        key = tuple(sorted(weights.items()))
        if key not in self._faders:
            self.plan.check(weights)
            self._faders.add(key)
        return line

    def text(self, row: Row, key: str) -> str:
        """A text that a row must have under a key."""
        x = row.item.get(key) if isinstance(row.item, dict) else None
        if not isinstance(x, str) or not x:
            raise ValueError(f'prompt {row.id} has the "{key}" {x!r:.80}; it must be a text')
        return x

    def failure(self, row: Row, error: BaseException | str) -> Result:
        """The result of a row that could not be worked on."""
        text = row.item if isinstance(row.item, str) else None
        item = row.item if isinstance(row.item, dict) else {"prompt": text}
        said = {"index": row.id, "prompt": item.get("prompt", item.get("messages"))}
        said |= {key: item[key] for key in ("id", "metadata", *self.spec.keep) if key in item}
        why = _in_words_of(row, error)
        return Result({**said, "error": why, "run": self.run}, why)


def _in_words_of(row: Row, error: BaseException | str) -> str:
    """What an error says, with the name of the row and of its keys: the decoder, which reads such
    a row alone, knows it as row 0 and its "stop" as ``stop_strings``."""
    where = f"prompt {row.id}"
    said = str(error).replace("the prompt of row 0", where, 1).replace("stop_strings", "stop", 1)
    return said if where in said else f"{where}: {said}"


class Generate(Task):
    """Writes texts, in a loop that takes the next batch before the last one has ended."""

    settings = settings.SETTINGS
    types: Mapping[str, str] = {"failed": "bool"}

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        one = ("text", "tokens", "logprob", "finished", "failed")
        self.columns = (*(one if spec.n is None else ("outputs",)), "blend", "run")
        judge = None
        if self.loaded.judge is not None:
            question = Question(spec.template, spec.principle)
            judge = question.judge(self.loaded.judge, f"judge {spec.judge}")
        draft = None
        if spec.draft is not None:
            source = spec.draft if self.loaded.draft is None else self.loaded.draft
            draft = Draft(source, length=spec.draft_length)
        common = dict(spec.generation)
        if (spec.n or 1) > 1 or not common.keys().isdisjoint(settings.SAMPLING):
            common.setdefault("do_sample", True)
        self.texts = Texts(
            self.loaded,
            common,
            spec.seed,
            search_of(self.loaded, judge, **spec.search),
            draft,
            spec.n,
            spec.logprobs,
            spec.terms,
            faders=bool(self.plan.free),
        )
        self.run = self.texts.run()
        self.loop = OpenLoop(self.texts, spec.batch_size)

    def read(self, row: Row) -> tuple[Row, Item]:
        line = self.line(row)
        drawn = [name for name in settings.SAMPLING if name in line.settings]
        if drawn and self.spec.generation.get("do_sample") is False:
            raise ValueError(f'do_sample is False, and prompt {row.id} has a "{drawn[0]}"')
        if self.loop.rows > 1 and line.settings.get("temperature") == 0:
            raise ValueError(
                f'prompt {row.id} has the "temperature" 0, and several texts are drawn'
            )
        seed = line.settings.get("seed", seed_of(self.spec.seed, row.id))
        return row, Item(f"prompt {row.id}", line.sent(chat=self.chat), line, seed)

    async def work(self, rows: Sequence[tuple[Row, Item]]) -> list[Result]:
        self.loop.submit([item for _, item in rows])
        return [await self._result(row, item) for row, item in rows]

    async def _result(self, row: Row, item: Item) -> Result:
        try:
            out, why = await asyncio.wrap_future(item.future)
        except BAD as error:
            return self.failure(row, error)
        record = self.texts.record(row.id, item.prompt, item.line, out, self.run)
        return Result(record if why is None else {**record, "error": why}, why)

    def close(self) -> None:
        self.loop.close()
