"""The values of a search's rows: which models and functions are asked, and what they are shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...blends.blend import Blend, Model, ValueHead
from ...blends.values import LogRatio, Reward, RewardModel
from ...blends.vocabulary import check_vocabularies, vocabulary
from ...search import ChunkBeamSearch
from ..engine.modules import Unsupported
from ..engine.options import Engine
from ..forms import Ids, Request, is_ids
from ..inputs import Prompts, Requests, encode, left_pad, plain_text, term_prompts
from ..job import Row
from ..output import ModelStats
from ..rows import Slots
from ..simple.term_model import TermModel
from ..writing import Writing, as_text
from .readers import Question, Reader, Rereader, log_prob, q_value, scalar


@dataclass(frozen=True)
class SearchJob:
    """A search as one call runs it.

    Attributes:
        writing: what rows write, as texts; None without a tokenizer.
        vocabulary: columns that the blend's models share.
        returned: rows that each request gets.
        models: those of the value, by what they are of; every job of a call has the same.
    """

    settings: ChunkBeamSearch
    blend: Blend
    requests: Requests
    tokenizer: Any
    writing: Writing | None
    vocabulary: int
    returned: int
    models: dict[Any, TermModel] = field(default_factory=dict)

    @cached_property
    def weights(self) -> Tensor:
        """``[requests, parts]`` float64."""
        return self.settings.value.row_weights(len(self.requests))

    @cached_property
    def asked(self) -> list[tuple[Question, list[Source]]]:
        """The models that read what rows write; those of one question share its forwards.

        Prompts are encoded here, so that what is wrong with them is said before decoding.
        """
        log_probs: dict[int, tuple[Question, list[Source]]] = {}
        others = []
        for value, name in zip(self.settings.value.values, self.settings.value.names, strict=True):
            if isinstance(value, LogRatio):
                columns = check_vocabularies(value.tuned + value.ref)
                own = value.tuned.tokenizer or value.ref.tokenizer
                for role, model in (("tuned", value.tuned), ("ref", value.ref)):
                    known = [s.key for _, sources in log_probs.values() for s in sources]
                    if model in self.blend.terms or model in known:
                        continue
                    source = self._source(model, f"{name}.{model.name or role}", own)
                    blends = source.writing is None  # its tokens are the blend's
                    question = log_prob(self.vocabulary if blends else columns)
                    log_probs.setdefault(id(None if blends else own), (question, []))[1].append(
                        source
                    )
            elif isinstance(value, ValueHead):
                source = self._source(value, name, value.tokenizer)
                question = scalar() if _is_scalar(source.model.bare) else q_value()
                others.append((question, [source]))
            elif isinstance(value, RewardModel):
                others.append((scalar(value.label), [self._reward(value, name)]))
        return [*log_probs.values(), *others]

    def __post_init__(self) -> None:
        """Say before decoding what is wrong with the value for these requests."""
        _ = self.weights, self.asked
        needs_text = any(isinstance(v, Reward) for v in self.settings.value.values)
        if needs_text or self.settings.chunk_end is not None:
            _ = self.texts

    @property
    def needs_term_logprobs(self) -> bool:
        """Whether decoding can give the log-probs that a log-ratio needs."""
        ratios = [v for v in self.settings.value.values if isinstance(v, LogRatio)]
        return any(m in self.blend.terms for v in ratios for m in (v.tuned, v.ref))

    @cached_property
    def texts(self) -> list[Request]:
        """The requests as texts and chats."""
        if self.tokenizer is None:
            raise ValueError(
                "tokenizer is None; the value reads texts: give Model(..., tokenizer=...) or "
                "tokenizer=..."
            )
        return [as_text(r, self.tokenizer) if is_ids(r) else r for r in self.requests.items]

    def _source(self, member: Model | ValueHead, name: str, own: Any) -> Source:
        """`own`: the tokenizer of its ids; None: they are the blend's."""
        tokenizer = own or self.tokenizer
        if own is None or self.tokenizer is None or _same(own, self.tokenizer):
            own = None
        prompts = term_prompts(
            self.requests if own is None else Requests(self.texts),
            term=name,
            tokenizer=tokenizer,
            system=getattr(member, "system", None),
            prompt=getattr(member, "prompt", None),
        )
        adapter = getattr(member, "adapter", "active")
        model = self._model(member, name, adapter)
        model.check(prompts)
        return Source(member, model, prompts, None if own is None else Writing(own, prompts))

    def _model(self, member: Any, name: str, adapter: str | None = "active") -> TermModel:
        if member not in self.models:
            self.models[member] = TermModel(member.model, name, adapter)
        return self.models[member]

    def _reward(self, value: RewardModel, name: str) -> Source:
        def whole(request: int, response: str) -> Ids:
            return _whole(value, name, self.texts[request], response)

        prompts = left_pad([whole(r, "") for r in range(len(self.texts))], 0)
        model = self._model(value, name)
        model.check(prompts)
        return Source(value, model, prompts, whole=whole)


@dataclass(frozen=True)
class Source:
    """A model of a value, and how it reads a row.

    Attributes:
        key: the `Model`, `ValueHead` or `RewardModel` that it is.
        padded: what it reads before a response, of every request of the job.
        writing: of its own tokens, where these are not the blend's.
        whole: of a reward model, what it reads of a request and its response as a text.
    """

    key: Any
    model: TermModel
    padded: Prompts
    writing: Writing | None = None
    whole: Callable[[int, str], Ids] | None = None

    @cached_property
    def prompts(self) -> list[list[int]]:
        return self.padded.unpadded()

    def texts(self, candidates: Candidates) -> list[Ids]:
        """What it reads of each of some candidates of its job."""
        requests = [row.request for row in candidates.rows]
        if self.whole is not None:
            return list(map(self.whole, requests, candidates.texts))
        responses: Sequence[Ids] = candidates.tokens
        if self.writing is not None:
            eos = getattr(self.writing.tokenizer, "eos_token_id", None)
            end = [] if eos is None else [eos]
            encoded = self.writing.tokens(requests, candidates.texts)
            responses = [
                [*ids, *end] if ended else ids
                for ids, ended in zip(encoded, candidates.finished, strict=True)
            ]
        return [[*self.prompts[r], *ids] for r, ids in zip(requests, responses, strict=True)]


@dataclass(frozen=True)
class Candidates:
    """What the rows in some slots have written so far."""

    slots: list[int]
    rows: list[Row]
    tokens: list[list[int]]
    finished: list[bool]  # by EOS or a stop string

    @cached_property
    def by_job(self) -> list[tuple[list[int], Candidates]]:
        """The candidates of each job, and where they stand among these."""
        found: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            found.setdefault(id(row.job), []).append(i)
        if len(found) == 1:
            return [(list(range(len(self.rows))), self)]
        return [
            (
                at,
                Candidates(
                    [self.slots[i] for i in at],
                    [self.rows[i] for i in at],
                    [self.tokens[i] for i in at],
                    [self.finished[i] for i in at],
                ),
            )
            for at in found.values()
        ]

    @cached_property
    def texts(self) -> list[str]:
        return self._texts(None)

    def since(self, starts: Sequence[int]) -> list[str]:
        """What each slot has written from the token on that `starts` has for it."""
        return self._texts(starts)

    def _texts(self, starts: Sequence[int] | None) -> list[str]:
        texts = [""] * len(self.rows)
        for at, its in self.by_job:
            writing = search_of(its.rows[0]).writing
            assert writing is not None  # `SearchJob.texts` has said so where there is none
            from_each = None if starts is None else [starts[s] for s in its.slots]
            found = writing.texts([row.request for row in its.rows], its.tokens, from_each)
            for i, text in zip(at, found, strict=True):
                texts[i] = text
        return texts


def search_of(row: Row) -> SearchJob:
    """How a row's job is searched."""
    assert row.job.search is not None
    return row.job.search


class Reading:
    """Models that are asked one question: over caches or, where that cannot be, of whole texts.

    Args:
        place: of the question among those that every job asks.
        sources: the models, and what they read of the first job.
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
        self.notes: list[str] = []
        self.full: set[Row] = set()  # rows whose text is longer than a context
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
        names = " and ".join(m.name for m in self.models)
        self.notes.append(f"{names} read whole texts at every boundary: {reason}")
        self.reader = Rereader(self.question, self.models)

    def _sources(self, row: Row) -> list[Source]:
        return search_of(row).asked[self.place][1]

    def join(self, seated: Mapping[int, Row]) -> None:
        """Rows take slots: their prompts are read, one request's once."""
        requests: dict[int, list[list[int]]] = {}
        for row in seated.values():
            if id(row.texts) not in requests:
                requests[id(row.texts)] = [s.prompts[row.request] for s in self._sources(row)]
        rows = seated.values()
        try:
            self.reader.join(
                [*seated], [requests[id(row.texts)] for row in rows], [row.limit for row in rows]
            )
        except Unsupported as reason:  # a model shows at its first forward what it is
            self._reread(reason)

    def read(self, candidates: Candidates) -> dict[Any, list[list[float]]]:
        """Of each source's key the answers about what candidates have written."""
        count = len(candidates.rows)
        texts: list[list[Ids]] = [[()] * count for _ in self.models]
        firsts = [[0] * count for _ in self.models]
        for at, its in candidates.by_job:
            for k, source in enumerate(self._sources(its.rows[0])):
                for i, row, text in zip(at, its.rows, source.texts(its), strict=True):
                    texts[k][i] = text
                    firsts[k][i] = len(source.prompts[row.request])
        texts, full = self._fitting(texts, candidates)
        try:
            found = self.reader.read(candidates.slots, texts, firsts)
        except Unsupported as reason:
            self._reread(reason)
            found = self.reader.read(candidates.slots, texts, firsts)
        for k, i in full:
            found[k][i] = [float("nan")] * max(len(found[k][i]), 1)
        keys = [s.key for s in self._sources(candidates.rows[0])]
        return dict(zip(keys, found, strict=True))

    def _fitting(
        self, texts: list[list[Ids]], candidates: Candidates
    ) -> tuple[list[list[Ids]], list[tuple[int, int]]]:
        """What of each model's texts it can read, and the texts that it cannot read whole."""
        full = []
        for k, model in enumerate(self.models):
            most = None if model.context is None else model.context + self.question.predicted
            for i, text in enumerate(texts[k]):
                if most is None or len(text) <= most:
                    continue
                full.append((k, i))
                row = candidates.rows[i]
                if row not in self.full:
                    self.full.add(row)
                    warnings.warn(
                        f"{row} has no value from its token {len(candidates.tokens[i])} on: "
                        f"{model.name} would read {len(text)} tokens, and its context is "
                        f"{model.context}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            texts[k] = [text[:most] for text in texts[k]]
        return texts, full


class Valuer:
    """Scores the rows in some slots.

    Args:
        search: of the first job; other jobs of the loop ask the same models and functions.
        slots: whose rows are scored; the log-probs of the blend's terms are read there.
        limit, engine: as in `EngineRunner`.
    """

    def __init__(self, search: SearchJob, slots: Slots, limit: int, engine: Engine) -> None:
        self.search, self.settings, self.slots = search, search.settings, slots
        count = len(slots.each)
        self.readings = [
            Reading(i, *each, count, limit, engine) for i, each in enumerate(search.asked)
        ]

    def join(self, seated: Mapping[int, Row]) -> None:
        """Rows take slots: their prompts are read, one request's once."""
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
        """``[n, parts]`` float64: the parts of the value of what slots have written."""
        answers: dict[Any, list[list[float]]] = {}
        for reading in self.readings:
            answers |= reading.read(candidates)
        values = self.settings.value
        parts = [
            self._part(value, name, candidates, answers)
            for value, name in zip(values.values, values.names, strict=True)
        ]
        return torch.tensor(parts, dtype=torch.float64, device="cpu").T

    def _part(
        self, value: Any, name: str, candidates: Candidates, answers: dict[Any, list[list[float]]]
    ) -> list[float]:
        if isinstance(value, Reward):
            return self._reward(value, name, candidates)
        if not isinstance(value, LogRatio):
            return [each[-1] for each in answers[value]]
        tuned, ref = (
            answers[m] if m in answers else self._drawn(m, candidates)
            for m in (value.tuned, value.ref)
        )
        return [
            value.beta * (sum(a) - sum(b)) / (max(len(a), 1) if value.normalize else 1)
            for a, b in zip(tuned, ref, strict=True)
        ]

    def _drawn(self, model: Model, candidates: Candidates) -> list[list[float]]:
        """The log-probs of a term of the blend, which decoding gave."""
        k = self.search.blend.terms.index(model)
        drawn = self.slots.written["term_logprobs"]
        longest = max(map(len, candidates.tokens), default=0)
        rows = drawn[candidates.slots, :longest, k].tolist()
        return [row[: len(ids)] for row, ids in zip(rows, candidates.tokens, strict=True)]

    def _reward(self, value: Reward, name: str, candidates: Candidates) -> list[float]:
        prompts = [search_of(row).texts[row.request] for row in candidates.rows]
        scores: Any = value.fn(prompts, candidates.texts)
        try:
            found = [float(x) for x in scores]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} returned {scores!r:.80}; it must return a number for each response"
            ) from error
        if len(found) != len(prompts):
            raise ValueError(
                f"{name} returned {len(found)} scores; it must return {len(prompts)}, one a "
                "response"
            )
        return found

    def stats(self) -> list[ModelStats]:
        """What the value's models did."""
        return [s for reading in self.readings for s in reading.reader.stats()]

    @property
    def notes(self) -> list[str]:
        """What was left out, and why."""
        return [note for reading in self.readings for note in reading.notes]

    @property
    def cache_bytes(self) -> int:
        return sum(reading.reader.cache_bytes for reading in self.readings)

    @property
    def peak_bytes(self) -> int:
        return sum(reading.reader.peak_bytes for reading in self.readings)


def _whole(value: RewardModel, name: str, prompt: Request, response: str) -> Ids:
    """A prompt and its response as a reward model reads them."""
    if value.template is not None:
        return encode(value.template(prompt, response), value.tokenizer, name)
    if isinstance(prompt, str):
        return encode(prompt + response, value.tokenizer, name)
    *turns, last = prompt
    if last["role"] == "assistant":
        answer = {**last, "content": plain_text(last["content"]) + response}
    else:
        turns, answer = prompt, {"role": "assistant", "content": response}
    return encode([*turns, answer], value.tokenizer, name, whole=True)


def _same(a: Any, b: Any) -> bool:
    """Whether two tokenizers have one vocabulary."""
    return a is b or vocabulary(a).digest == vocabulary(b).digest


def _is_scalar(model: Any) -> bool:
    """Whether a value head gives one number a token, not one for each next token."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        return getattr(head, "out_features", None) == 1
    return getattr(model.config, "num_labels", None) == 1
