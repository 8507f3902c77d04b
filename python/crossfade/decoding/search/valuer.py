"""The values of a search's rows: which models and functions are asked, and what they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from ...blends.blend import Model
from ...blends.values import LogRatio, Reward
from ...checks import warn
from ...models.hf import is_scalar
from ..engine.modules import Unsupported
from ..engine.options import Engine
from ..forms import Ids
from ..job import Row
from ..rows import Slots
from ..simple.term_model import TermModel
from ..stats import ModelStats
from .answers import log_ratios, numbers
from .candidates import Candidates
from .job import NOTHING, SearchJob, Source, search_of
from .readers import Question, Reader, Rereader


class Reading:
    """Asks some models one question: over caches or, where that cannot be, of whole texts.

    Args:
        place: the place of the question in `SearchJob.questions` of every job.
        sources: the models that are asked, and what they read of the first job.
        slots, limit, engine: as in `EngineRunner`.
    """

    def __init__(
        self,
        place: int,
        question: Question,
        sources: Sequence[Source],
        slots: int,
        limit: int,
        engine: Engine,
    ) -> None:
        self.place, self.question = place, question
        self.models = [s.model for s in sources]
        self.keys = [s.key for s in sources]
        self.notes: list[str] = []
        self.full: WeakSet[Row] = WeakSet()  # rows whose text is longer than a context
        self.reader: Reader | Rereader = Rereader(question, self.models)
        if not engine.simple:
            longest = [max(map(len, s.prompts)) for s in sources]
            try:
                reader = Reader(question, self.models, longest, slots, limit, engine)
                self.reader, self.notes = reader, reader.runner.notes
                if engine.compile:
                    names = " and ".join(m.name for m in self.models)
                    self.notes.append(f"{names} not compiled: texts of any length are read")
            except Unsupported as reason:
                self._reread(reason)

    def _reread(self, reason: Unsupported) -> None:
        """Ask of whole texts from now on."""
        names = " and ".join(m.name for m in self.models)
        self.notes.append(f"{names} read whole texts at every boundary: {reason}")
        self.reader = Rereader(self.question, self.models)

    def _sources(self, row: Row) -> list[Source]:
        """The models, and what they read of the requests of a row's job."""
        return [s for s in search_of(row).questions[self.place][1] if s.key in self.keys]

    def join(self, seated: Mapping[int, Row]) -> None:
        """Let rows take slots, and read their prompts, that of each request once."""
        requests: dict[int, list[list[int]]] = {}
        for row in seated.values():
            if id(row.prompt_ids) not in requests:
                requests[id(row.prompt_ids)] = [s.prompts[row.request] for s in self._sources(row)]
        rows = seated.values()
        try:
            self.reader.join(
                [*seated],
                [requests[id(row.prompt_ids)] for row in rows],
                [row.limit for row in rows],
            )
        except Unsupported as reason:  # Only its first forward shows what a model does.
            self._reread(reason)

    def read(self, candidates: Candidates) -> dict[Any, list[list[float]]]:
        """The answers about what candidates have written, by the keys of the sources."""
        count = len(candidates.rows)
        texts: list[list[Ids]] = [[()] * count for _ in self.models]
        firsts = [[0] * count for _ in self.models]
        for at, its in candidates.by_job:
            for k, source in enumerate(self._sources(its.rows[0])):
                for i, row, text in zip(at, its.rows, source.texts(its), strict=True):
                    texts[k][i] = text
                    firsts[k][i] = len(source.prompts[row.request])
        texts, unread = self._readable(texts, candidates)
        try:
            found = self.reader.read(candidates.slots, texts, firsts)
        except Unsupported as reason:
            self._reread(reason)
            found = self.reader.read(candidates.slots, texts, firsts)
        for k, i in unread:
            found[k][i] = [float("nan")] * max(len(found[k][i]), 1)
        return dict(zip(self.keys, found, strict=True))

    def _readable(
        self, texts: list[list[Ids]], candidates: Candidates
    ) -> tuple[list[list[Ids]], list[tuple[int, int]]]:
        """The texts as each model can read them, and which others have no answer, as (model, text):
        those that were cut, as they are longer than a context, and those without a token."""
        unread = []
        for k, model in enumerate(self.models):
            most = None if model.context is None else model.context + self.question.predicted
            for i, text in enumerate(texts[k]):
                if text and (most is None or len(text) <= most):
                    continue
                unread.append((k, i))
                if not text:
                    continue
                row = candidates.rows[i]
                if row not in self.full:
                    self.full.add(row)
                    warn(
                        f"{row} has no value from its token {len(candidates.tokens[i])} on: "
                        f"{model.name} would read {len(text)} tokens, and its context is "
                        f"{model.context}",
                        RuntimeWarning,
                    )
            texts[k] = [text[:most] or NOTHING for text in texts[k]]
        return texts, unread


class Valuer:
    """Scores the rows in some slots.

    Args:
        search: that of the first job. Other jobs of the loop ask the same models and functions.
        slots: where the rows are, the log-probs of the blend's terms, and what `heads` say.
        limit, engine: as in `EngineRunner`.
        heads: the value models that ride on the rows' forwards; see `Runner.heads`.

    Attributes:
        readings: the models that are asked by forwards of their own.
        waits: whether a row's value is known only when its last token has been fed.
    """

    def __init__(
        self,
        search: SearchJob,
        slots: Slots,
        limit: int,
        engine: Engine,
        heads: Sequence[TermModel] = (),
    ) -> None:
        self.search, self.settings, self.slots = search, search.settings, slots
        count = len(slots.each)
        of_heads = {id(head): i for i, head in enumerate(heads)}
        self.riding: dict[Any, int] = {  # the columns of `Slots.heads`
            s.key: of_heads[id(s.model)]
            for _, sources in search.questions
            for s in sources
            if id(s.model) in of_heads
        }
        self.waits = any(is_scalar(head.bare) for head in heads)
        self.readings = []
        for i, (question, sources) in enumerate(search.questions):
            asked = [s for s in sources if s.key not in self.riding]
            if asked:
                self.readings.append(Reading(i, question, asked, count, limit, engine))

    def join(self, seated: Mapping[int, Row]) -> None:
        """Let rows take slots, and read their prompts, that of each request once."""
        for reading in self.readings:
            reading.join(seated)

    def fork(self, parents: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is."""
        for reading in self.readings:
            reading.reader.fork(parents)

    def weights(self, rows: Sequence[Row]) -> Tensor:
        """``[rows, parts]`` float64: what each part of the value counts for each row."""
        return torch.stack([search_of(row).weights[row.request] for row in rows])

    def score(self, candidates: Candidates) -> Tensor:
        """``[candidates, parts]`` float64: the parts of each candidate's value."""
        answers: dict[Any, list[list[float]]] = {}
        for reading in self.readings:
            answers |= reading.read(candidates)
        each = self.search.parts
        parts = [self._part(value, name, candidates, answers) for value, name in each]
        found = torch.tensor(parts, dtype=torch.float64, device="cpu")
        return found.view(len(each), len(candidates.rows)).T

    def _part(
        self, value: Any, name: str, candidates: Candidates, answers: dict[Any, list[list[float]]]
    ) -> list[float]:
        """One part of each candidate's value, from the answers of its models."""
        if isinstance(value, Reward):
            return self._reward(value, name, candidates)
        if value in self.riding:
            return self.slots.heads[candidates.slots, self.riding[value]].tolist()
        if not isinstance(value, LogRatio):
            return [each[-1] for each in answers[value]]
        tuned, ref = (
            answers[m] if m in answers else self._drawn(m, candidates)
            for m in (value.tuned, value.ref)
        )
        return log_ratios(value, tuned, ref)

    def _drawn(self, model: Model, candidates: Candidates) -> list[list[float]]:
        """The log-probs of the candidates' tokens under a term of the blend, from decoding."""
        k = self.search.blend.terms.index(model)
        drawn = self.slots.written["term_logprobs"]
        longest = max(map(len, candidates.tokens), default=0)
        rows = drawn[candidates.slots, :longest, k].tolist()
        return [row[: len(ids)] for row, ids in zip(rows, candidates.tokens, strict=True)]

    def _reward(self, value: Reward, name: str, candidates: Candidates) -> list[float]:
        """What a function of prompts and responses gives for each candidate."""
        prompts = [search_of(row).texts[row.request] for row in candidates.rows]
        scores = value.fn(prompts, candidates.texts)
        return numbers(name, scores, len(prompts), "scores", "response")

    def stats(self) -> list[ModelStats]:
        """What the value's models did."""
        return [s for reading in self.readings for s in reading.reader.stats()]

    @property
    def notes(self) -> list[str]:
        """What is not done as the engine's options say, and why."""
        return [note for reading in self.readings for note in reading.notes]

    @property
    def cache_bytes(self) -> int:
        return sum(reading.reader.cache_bytes for reading in self.readings)

    @property
    def peak_bytes(self) -> int:
        return sum(reading.reader.peak_bytes for reading in self.readings)
