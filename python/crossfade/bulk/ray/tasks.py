"""What an actor does with rows: the models of its spec, and a method for each task."""

from __future__ import annotations

import asyncio
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...blends.blend import Blend
from ...decoding.forms import request
from ...decoding.inputs import Requests
from ...decoding.scoring import score
from ...decoding.search.finished import TextValuer
from ...drafts import Draft
from ...identity import run_id
from ...metrics import perplexity
from ...policies.metaaligner import MetaAligner, correct
from ...policies.self_judge.question import Question
from .. import settings
from ..open_loop import NO_TOKEN, Item, OpenLoop
from ..pairs import KEYS, pair_of
from ..prompts import Line, line_of
from ..records import number, seed_of
from ..searching import search_of
from ..texts import Texts
from .actor_spec import Spec

BAD = (TypeError, ValueError, NotImplementedError)  # what a row at fault raises
WINNERS = {"a": "first", "b": "second", "tie": "tie", None: None}


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
        run: the identity of what is done, as results have it.
    """

    keys: tuple[str, ...] = ()
    settings: tuple[str, ...] = ("weights", "system")
    columns: tuple[str, ...] = ()

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
        why = str(error)
        return Result({**said, "error": why, "run": self.run}, why)


class Generate(Task):
    """Writes texts, in a loop that takes the next batch before the last one has ended."""

    settings = settings.SETTINGS

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


class Batched(Task):
    """Works on a batch at a time, whose rows are read together."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.run = run_id(task=spec.task, seed=spec.seed, **self.identity())
        self._busy = threading.Lock()

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the results depend on."""

    @abstractmethod
    def figures(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """What is said of rows; "failed" says why one could not be worked on.

        Raises:
            TypeError, ValueError, NotImplementedError: a row is at fault.
        """

    async def work(self, rows: Sequence[Any]) -> list[Result]:
        size = self.spec.batch_size
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [x for part in parts for x in await asyncio.to_thread(self._work, part)]

    def _work(self, rows: Sequence[Any]) -> list[Result]:
        try:
            with self._busy, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # which "failed" says
                found = self.figures(rows)
        except BAD as error:
            if len(rows) > 1:
                return [self._work([row])[0] for row in rows]
            return [self.failure(rows[0][0], error)]
        return [
            Result({"index": row.id, **figures, "run": self.run}, figures.get("failed"))
            for (row, *_), figures in zip(rows, found, strict=True)
        ]

    def blend(self, lines: Sequence[Line]) -> Blend:
        """The blend of some rows, with their own positions of the faders."""
        own = [line.settings for line in lines]
        return self.loaded.blend(settings.positions(own, self.loaded.faders))


class Score(Batched):
    """Says how likely the blend finds responses."""

    keys = ("response",)
    columns = ("logprob", "tokens", "perplexity", "run")

    def identity(self) -> dict[str, Any]:
        return {"blend": self.loaded.formula, "terms": dict(self.loaded.terms)}

    def read(self, row: Row) -> tuple[Row, Line, str]:
        return row, self.line(row), self.text(row, "response")

    def figures(self, rows: Sequence[tuple[Row, Line, str]]) -> list[dict[str, Any]]:
        lines = [line for _, line, _ in rows]
        blend, terms = self.blend(lines), self.spec.terms
        prompts = [line.sent(chat=self.chat) for line in lines]
        out = score(blend, prompts, [text for *_, text in rows], return_term_logprobs=terms)
        found = []
        for i, line in enumerate(lines):
            total, length = float(out.totals[i]), int(out.lengths[i])
            figures = {**line.carried, "logprob": number(total), "tokens": length}
            figures["perplexity"] = number(perplexity(total, length))
            if out.term_logprobs is not None:
                sums = out.term_logprobs[i].double().sum(dim=0).tolist()
                figures["terms"] = dict(zip(blend.names, map(number, sums), strict=True))
            found.append(figures)
        return found


class Value(Batched):
    """Says what the value gives to responses."""

    keys = ("response",)
    columns = ("value", "run")

    def identity(self) -> dict[str, Any]:
        return {"value": self.loaded.value}

    def read(self, row: Row) -> tuple[Row, Line, str]:
        return row, self.line(row), self.text(row, "response")

    def figures(self, rows: Sequence[tuple[Row, Line, str]]) -> list[dict[str, Any]]:
        assert self.loaded.value is not None  # `Spec.plan` has seen it.
        prompts = [request("prompt", line.sent(chat=self.chat)) for _, line, _ in rows]
        valuer = TextValuer.of(self.loaded.value, Requests(prompts))
        values = valuer(range(len(rows)), [text for *_, text in rows]).tolist()
        return [
            {**line.carried, "value": number(x)}
            for (_, line, _), x in zip(rows, values, strict=True)
        ]


class Correct(Batched):
    """Lets the blend, which is an aligner, correct answers."""

    keys = ("answer", "objectives")
    settings = ()
    columns = ("text", "unchanged", "edit_distance", "tokens", "finished", "failed", "run")

    def __init__(self, spec: Spec) -> None:
        self.aligner: Any = None
        super().__init__(spec)

    def identity(self) -> dict[str, Any]:
        self.aligner = MetaAligner(self.loaded.blend(), noun=self.spec.query_noun)
        spec = self.spec
        asked: dict[str, Any] = {
            "objectives": spec.objectives,
            "noun": spec.query_noun,
            "rounds": spec.rounds,
        }
        asked |= {"search": search_of(self.loaded, None, **spec.search)}
        asked |= {"accept": self.loaded.accept, "generation": dict(spec.generation)}
        return {"aligner": self.aligner.blend, **asked}

    def read(self, row: Row) -> tuple[Row, Line, str, Any]:
        line, answer = self.line(row), self.text(row, "answer")
        objectives = row.item.get("objectives", self.spec.objectives)
        self.aligner.prompt(line.prompt, answer, objectives)  # finds what is wrong with them
        return row, line, answer, objectives

    def figures(self, rows: Sequence[tuple[Row, Line, str, Any]]) -> list[dict[str, Any]]:
        spec = self.spec
        out = correct(
            self.aligner,
            [line.prompt for _, line, *_ in rows],
            [answer for *_, answer, _ in rows],
            [wanted if isinstance(wanted, dict) else [*wanted] for *_, wanted in rows],
            rounds=spec.rounds,
            search=search_of(self.loaded, None, **spec.search),
            accept=self.loaded.accept,
            seed=[seed_of(spec.seed, row.id) for row, *_ in rows],
            **spec.generation,
        )
        found = []
        for i, (_, line, *_) in enumerate(rows):
            figures = {
                **line.carried,
                "text": out.text[i] if out.text is not None else None,
                "rounds": [texts[i] for texts in out.rounds],
                "unchanged": bool(out.unchanged[i]),
                "edit_distance": float(out.edit_distance[i]),
                "tokens": int(out.lengths[i]),
                "finished": bool(out.finished[i]),
                "failed": NO_TOKEN if bool(out.failed[i]) else None,
            }
            if out.scores is not None:
                figures["scores"] = [number(x) for x in out.scores[i]]
            found.append(figures)
        return found


class Judge(Batched):
    """Lets the blend, which is a judge, say which of two answers is better."""

    keys = KEYS
    settings = ()
    columns = ("preference", "winner", "failed", "run")

    def __init__(self, spec: Spec) -> None:
        self.judge: Any = None
        super().__init__(spec)

    def identity(self) -> dict[str, Any]:
        question = Question(self.spec.template, self.spec.principle)
        self.judge = question.judge(self.loaded.blend(), f"blend {self.loaded.formula}")
        return {"blend": self.judge.blend, **question.identity()}

    def read(self, row: Row) -> tuple[Row, Any]:
        return row, pair_of(row.item, row.id, keep=self.spec.keep)

    def figures(self, rows: Sequence[tuple[Row, Any]]) -> list[dict[str, Any]]:
        pairs = [pair for _, pair in rows]
        each = [[p.prompt for p in pairs], [p.first for p in pairs], [p.second for p in pairs]]
        out = self.judge(*each)
        found = []
        for i, pair in enumerate(pairs):
            why = out.reasons[i]
            figures: dict[str, Any] = {"preference": None, "winner": WINNERS[out.winners[i]]}
            if why is None:
                figures["preference"] = float(out.preference[i])
            if out.principles != (None,):
                scores = out.by_principle[i].tolist()
                named = dict(zip(out.principles, scores, strict=True))
                figures["principles"] = None if why else named
            found.append({**pair.carried, **figures, "failed": why})
        return found


TASKS: dict[str, Callable[[Spec], Task]] = {
    "generate": Generate,
    "score": Score,
    "value": Value,
    "correct": Correct,
    "judge": Judge,
}
