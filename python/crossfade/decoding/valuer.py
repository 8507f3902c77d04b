"""The values of a search's rows: which models and functions are asked, and what they are shown."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..blend import Blend, Model, ValueHead
from ..search import ChunkBeamSearch
from ..values import LogRatio, Reward, RewardModel
from ..vocabulary import check_vocabularies, vocabulary
from .engine import Engine
from .forms import Ids, Request, is_ids
from .inputs import Prompts, Requests, encode, left_pad, plain_text, term_prompts
from .modules import Unsupported
from .output import ModelStats
from .readers import Question, Reader, Rereader, log_prob, q_value, scalar
from .rows import Results
from .term_model import TermModel
from .writing import Writing, as_text


@dataclass(frozen=True)
class Search:
    """A search as one call runs it.

    Attributes:
        writing: what rows write, as texts; None without a tokenizer.
        vocabulary: columns that the blend's models share.
        returned: rows that each request gets.
    """

    settings: ChunkBeamSearch
    blend: Blend
    requests: Requests
    tokenizer: Any
    writing: Writing | None
    vocabulary: int
    returned: int

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
        model = TermModel(member.model, name, getattr(member, "adapter", "active"))
        return Source(member, model, prompts, None if own is None else Writing(own, prompts))

    def _reward(self, value: RewardModel, name: str) -> Source:
        def whole(request: int, response: str) -> Ids:
            return _whole(value, name, self.texts[request], response)

        prompts = left_pad([whole(r, "") for r in range(len(self.texts))], 0)
        return Source(value, TermModel(value.model, name), prompts, whole=whole)


@dataclass(frozen=True)
class Source:
    """A model of a value, and how it reads a row.

    Attributes:
        key: the `Model`, `ValueHead` or `RewardModel` that it is.
        writing: of its own tokens, where these are not the blend's.
        whole: of a reward model, what it reads of a request and its response as a text.
    """

    key: Any
    model: TermModel
    prompts: Prompts
    writing: Writing | None = None
    whole: Callable[[int, str], Ids] | None = None

    @cached_property
    def heads(self) -> list[list[int]]:
        return self.prompts.unpadded()

    def texts(self, written: Written) -> list[Ids]:
        """What it reads of each slot."""
        if self.whole is not None:
            return list(map(self.whole, written.requests, written.texts))
        responses: Sequence[Ids] = written.tokens
        if self.writing is not None:
            eos = getattr(self.writing.tokenizer, "eos_token_id", None)
            end = [] if eos is None else [eos]
            encoded = self.writing.tokens(written.requests, written.texts)
            responses = [
                [*ids, *end] if ended else ids
                for ids, ended in zip(encoded, written.finished, strict=True)
            ]
        return [[*self.heads[r], *ids] for r, ids in zip(written.requests, responses, strict=True)]


@dataclass(frozen=True)
class Written:
    """What the rows in some slots have written so far."""

    slots: list[int]
    rows: list[int]  # of the call
    requests: list[int]
    tokens: list[list[int]]
    finished: list[bool]  # by EOS or a stop string
    writing: Writing | None

    @cached_property
    def texts(self) -> list[str]:
        assert self.writing is not None  # `Search.texts` has said so where there is none
        return self.writing.texts(self.requests, self.tokens)

    def since(self, starts: Sequence[int]) -> list[str]:
        """What each slot has written from the token on that `starts` has for it."""
        assert self.writing is not None
        return self.writing.texts(self.requests, self.tokens, [starts[s] for s in self.slots])


class Asked:
    """Models that are asked one question: over caches or, where that cannot be, of whole texts."""

    def __init__(
        self,
        question: Question,
        sources: Sequence[Source],
        copies: int,
        slots: int,
        limit: int,
        engine: Engine,
    ) -> None:
        self.question, self.sources = question, sources
        self.models = [s.model for s in sources]
        self.notes: list[str] = []
        self.full: set[int] = set()  # rows whose text is longer than a context
        self.reader: Reader | Rereader = Rereader(question, self.models)
        if not engine.simple:
            prompts = [s.prompts for s in sources]
            try:
                reader = Reader(question, self.models, prompts, copies, slots, limit, engine)
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

    def join(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        try:
            self.reader.join(slots, rows)
        except Unsupported as reason:  # a model shows at its first forward what it is
            self._reread(reason)

    def read(self, written: Written) -> dict[Any, list[list[float]]]:
        """Of each source's key the answers about what slots have written."""
        texts = [s.texts(written) for s in self.sources]
        firsts = [[len(s.heads[r]) for r in written.requests] for s in self.sources]
        texts, full = self._fitting(texts, written)
        try:
            found = self.reader.read(written.slots, texts, firsts)
        except Unsupported as reason:
            self._reread(reason)
            found = self.reader.read(written.slots, texts, firsts)
        for k, i in full:
            found[k][i] = [float("nan")] * max(len(found[k][i]), 1)
        return dict(zip((s.key for s in self.sources), found, strict=True))

    def _fitting(
        self, texts: list[list[Ids]], written: Written
    ) -> tuple[list[list[Ids]], list[tuple[int, int]]]:
        """What of the texts of each model and slot it can read, and which it cannot read whole."""
        full = []
        for k, model in enumerate(self.models):
            most = None if model.context is None else model.context + self.question.predicted
            for i, text in enumerate(texts[k]):
                if most is None or len(text) <= most:
                    continue
                full.append((k, i))
                if written.rows[i] not in self.full:
                    self.full.add(written.rows[i])
                    warnings.warn(
                        f"row {written.rows[i]}, of request {written.requests[i]}, has no value "
                        f"from its token {len(written.tokens[i])} on: {model.name} would read "
                        f"{len(text)} tokens, and its context is {model.context}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            texts[k] = [text[:most] for text in texts[k]]
        return texts, full


class Valuer:
    """Scores the rows in `slots` places, in each of which a row of the call is decoded.

    Args:
        copies, slots, limit: as in `EngineRunner`.
        results: of the call; those of terms' log-probs are read.
    """

    def __init__(
        self, search: Search, copies: int, slots: int, limit: int, engine: Engine, results: Results
    ) -> None:
        self.search, self.results = search, results
        self.asked = [Asked(*each, copies, slots, limit, engine) for each in search.asked]

    def join(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        """Rows of the call take slots: their prompts are read, one request's once."""
        for asked in self.asked:
            asked.join(slots, rows)

    def fork(self, parents: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is."""
        for asked in self.asked:
            asked.reader.fork(parents)

    def score(self, written: Written) -> Tensor:
        """``[n, parts]`` float64: the parts of the value of what slots have written."""
        answers: dict[Any, list[list[float]]] = {}
        for asked in self.asked:
            answers |= asked.read(written)
        values = self.search.settings.value
        parts = [
            self._part(value, name, written, answers)
            for value, name in zip(values.values, values.names, strict=True)
        ]
        return torch.tensor(parts, dtype=torch.float64, device="cpu").T

    def _part(
        self, value: Any, name: str, written: Written, answers: dict[Any, list[list[float]]]
    ) -> list[float]:
        if isinstance(value, Reward):
            return self._reward(value, name, written)
        if not isinstance(value, LogRatio):
            return [each[-1] for each in answers[value]]
        tuned, ref = (
            answers[m] if m in answers else self._drawn(m, written)
            for m in (value.tuned, value.ref)
        )
        return [
            value.beta * (sum(a) - sum(b)) / (max(len(a), 1) if value.normalize else 1)
            for a, b in zip(tuned, ref, strict=True)
        ]

    def _drawn(self, model: Model, written: Written) -> list[list[float]]:
        """The log-probs of a term of the blend, which decoding gave."""
        assert self.results.term_logprobs is not None
        k = self.search.blend.terms.index(model)
        rows = self.results.term_logprobs[written.rows, :, k].tolist()
        return [row[: len(ids)] for row, ids in zip(rows, written.tokens, strict=True)]

    def _reward(self, value: Reward, name: str, written: Written) -> list[float]:
        prompts = [self.search.texts[r] for r in written.requests]
        scores: Any = value.fn(prompts, written.texts)
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
        return [s for asked in self.asked for s in asked.reader.stats()]

    @property
    def notes(self) -> list[str]:
        """What was left out, and why."""
        return [note for asked in self.asked for note in asked.notes]

    @property
    def cache_bytes(self) -> int:
        return sum(asked.reader.cache_bytes for asked in self.asked)

    @property
    def peak_bytes(self) -> int:
        return sum(asked.reader.peak_bytes for asked in self.asked)


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
