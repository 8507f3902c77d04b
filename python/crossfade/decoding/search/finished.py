"""The values of texts that are whole already, by the models and functions that searches ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...blends.blend import Blend
from ...blends.values import LogRatio, Reward, ValueSum
from ...blends.vocabulary import check_vocabularies
from ...checks import warn
from ...search import BestOfN
from ..inputs import Requests
from ..writing import Writing
from .answers import log_ratios, numbers, totals
from .job import SearchJob, Source
from .readers import Question, Rereader


@dataclass(frozen=True)
class Finished:
    """Whole responses, in the place of a search's candidates.

    Attributes:
        requests: the place of each one's request.
        tokens: none are known, as each model encodes the texts itself.
    """

    requests: list[int]
    texts: list[str]
    finished: list[bool]
    tokens: list[list[int]] = field(default_factory=list)


class TextValuer:
    """Scores responses that are given as texts, as a search would.

    What keeps a request from being read is raised when this is made.

    Args:
        tokenizer: for models that have none.
        vocabulary: how many tokens such models have at least.
    """

    def __init__(
        self, value: ValueSum, requests: Requests, tokenizer: Any, vocabulary: int
    ) -> None:
        search = BestOfN(1, value)
        self.job = SearchJob(search, Blend((), ()), requests, tokenizer, None, vocabulary, 1)
        self.value, self.tokenizer = value, tokenizer

    @classmethod
    def of(cls, value: ValueSum, requests: Requests, tokenizer: Any = None) -> TextValuer:
        """The same, whose vocabulary and, unless it is given, tokenizer come from the models."""
        vocabulary = 0
        for part in value.values:
            ratio = isinstance(part, LogRatio)
            if ratio and not vocabulary:
                vocabulary = check_vocabularies(part.tuned + part.ref)
            tokenizer = tokenizer or getattr(part.tuned if ratio else part, "tokenizer", None)
        return cls(value, requests, tokenizer, vocabulary)

    def __call__(self, requests: Sequence[int], texts: Sequence[str]) -> Tensor:
        """``[n]`` float64: the value of each text, to the request at its place in the list.

        A text is taken for finished: models read EOS after it. One that is longer than a model's
        context has no value, NaN, after a RuntimeWarning.
        """
        given = Finished([*requests], [*texts], [True] * len(texts))
        answers: dict[Any, list[list[float]]] = {}
        for question, sources in self.job.questions:
            for source in sources:
                answers[source.key] = self._answers(question, source, given)
        parts = [
            self._part(value, name, given, answers)
            for value, name in zip(self.value.values, self.value.names, strict=True)
        ]
        of_parts = torch.tensor(parts, dtype=torch.float64, device="cpu").T
        return totals(self.job.weights[given.requests], of_parts)

    def _part(
        self, value: Any, name: str, given: Finished, answers: dict[Any, list[list[float]]]
    ) -> list[float]:
        """One part of each text's value, from the answers of its models."""
        if isinstance(value, Reward):
            prompts = [self.job.texts[r] for r in given.requests]
            scores = value.fn(prompts, given.texts)
            return numbers(name, scores, len(prompts), "scores", "response")
        if isinstance(value, LogRatio):
            return log_ratios(value, answers[value.tuned], answers[value.ref])
        return [each[-1] for each in answers[value]]

    def _answers(self, question: Question, source: Source, given: Finished) -> list[list[float]]:
        """What a model answers about each text; NaN about those that its context cannot hold."""
        if source.whole is None and source.writing is None:
            source = replace(source, writing=Writing(self.tokenizer, source.padded))
        model, texts = source.model, source.texts(given)
        most = None if model.context is None else model.context + question.predicted
        found = [[float("nan")]] * len(texts)
        fitting = []
        for i, ids in enumerate(texts):
            if not ids:
                continue
            if most is None or len(ids) <= most:
                fitting.append(i)
                continue
            warn(
                f"a response to request {given.requests[i]} has no value: {model.name} would read "
                f"{len(ids)} tokens, and its context is {model.context}",
                RuntimeWarning,
            )
        firsts = [len(source.prompts[given.requests[i]]) for i in fitting]
        reader = Rereader(question, [model])
        (answers,) = reader.read(fitting, [[texts[i] for i in fitting]], [firsts])
        for i, answer in zip(fitting, answers, strict=True):
            found[i] = answer
        return found
