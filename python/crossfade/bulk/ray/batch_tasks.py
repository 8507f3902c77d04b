"""What an actor does with a batch of rows at a time: scores, values, corrections and judgments."""

from __future__ import annotations

import asyncio
import threading
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from ...blends.blend import Blend
from ...decoding.forms import request
from ...decoding.inputs import Requests
from ...decoding.scoring import score
from ...decoding.search.finished import TextValuer
from ...identity import run_id
from ...metrics import perplexity
from ...policies.metaaligner import MetaAligner, correct
from ...policies.self_judge.question import Question
from .. import settings
from ..open_loop import NO_TOKEN
from ..pairs import KEYS, pair_of
from ..prompts import Line
from ..records import number, seed_of
from ..searching import search_of
from .actor_spec import Spec
from .tasks import BAD, Result, Row, Task

WINNERS = {"a": "first", "b": "second", "tie": "tie", None: None}


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
    types: Mapping[str, str] = {"failed": "string", "unchanged": "bool", "edit_distance": "double"}

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
    types: Mapping[str, str] = {"failed": "string"}

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
