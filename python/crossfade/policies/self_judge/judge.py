"""A judge of pairs of answers: a model reads both orders, and its next token is a label."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import elsewhere
from ...blends.blend import Blend, as_blend
from ...checks import explained, warn
from ...decoding.forms import Ids, is_chat, is_ids, request
from ...decoding.members import tokenizer_of
from ...decoding.scoring import Scorer
from ...decoding.settings import check_int
from ...decoding.simple.contexts import context_of
from ...decoding.stats import ModelStats, Stats, summed
from ...reading import check_unicode
from .judgments import Judgments
from .template import as_template, check_chats, encode_prompt


class Judge:
    """A model that says which of two answers is better, by the probabilities of two labels.

    Of answers a and b it reads both orders, and the softmax over the whole vocabulary at the
    label's place gives ``s_a = (p(A | a, b) + p(B | b, a)) / 2`` and ``s_b = (p(B | a, b) + p(A |
    b, a)) / 2``. Nothing is generated, and no saved setting of generation plays a part. In torch
    code, with ``prompt(a, b)`` the ids of `Judge.prompt`::

        p_ab = model(prompt(a, b)).logits[0, -1].float().softmax(-1)
        p_ba = model(prompt(b, a)).logits[0, -1].float().softmax(-1)
        s_a, s_b = (p_ab[A] + p_ba[B]) / 2, (p_ab[B] + p_ba[A]) / 2

    Several principles vote. What prompts begin with alike, such as their context, is read once. A
    pair and the same pair swapped read the same rows in the same order, so that their scores mirror
    each other to the last bit.

    Args:
        model: a causal LM, a `Model` (with an adapter, say) or a `Blend`.
        tokenizer: the one of the model; by default the first that a term has. It has a chat
            template.
        template: "hh", "ultrafeedback", a `JudgeTemplate`, or a mapping of its fields.
        principles: names of principles that the template has, or a mapping of names to phrases.
            None asks the template's own question.
        max_batch: how many prompts share a forward, at most; None: as many as memory is meant for.

    Attributes:
        labels: the two labels with the space before them, each one token where it stands.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: SELF-JUDGE (Lee et al., arXiv:2402.11253).
    """

    @explained(elsewhere.JUDGE)
    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        template: Any = "hh",
        principles: Any = None,
        max_batch: int | None = None,
    ) -> None:
        self.blend = as_blend(model)
        _check_blend(self.blend)
        self.tokenizer = tokenizer_of(self.blend, tokenizer)
        check_chats(self.tokenizer)
        check_int("max_batch", max_batch, 1)
        self.max_batch = max_batch
        self.template = as_template(template)
        self._phrases = self.template.phrases(principles)
        self.principles = tuple(self._phrases)
        members: Any = (*self.blend.terms, *self.blend.values)
        names = (*self.blend.names, *self.blend.value_names)
        self._contexts = [
            (name, context_of(t.model)) for name, t in zip(names, members, strict=True)
        ]
        self._label_ids = {
            name: self.template.label_ids(self.tokenizer, self.prompt("a", "a", "b", name))
            for name in self.principles
        }

    @property
    def labels(self) -> tuple[str, str]:
        a, b = self.template.labels
        return f" {a}", f" {b}"

    def __repr__(self) -> str:
        asked = "" if self.principles == (None,) else f", principles={[*self.principles]}"
        return f"Judge({self.blend}{asked})"

    def prompt(self, context: Any, first: str, second: str, principle: str | None = None) -> str:
        """The very text that is read, special tokens and all; a label would follow it.

        Args:
            context: the text or chat that was answered.
            first, second: the answers, in the order of the labels.
            principle: one of the judge's; None is its first.
        """
        if principle is None and None not in self._phrases:
            principle = self.principles[0]
        if principle not in self.principles:
            known = ", ".join(map(str, self.principles))
            raise ValueError(f"principle is {principle!r:.80}; it must be among {known}")
        return self.template.render(
            self.tokenizer, context, first, second, self._phrases[principle]
        )

    @explained(elsewhere.JUDGED)
    def __call__(
        self, contexts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Judgments:
        """Judge n pairs of answers.

        Args:
            contexts: n texts or chats that were answered.
            firsts, seconds: n texts each, the answers a and b.

        Returns:
            `Judgments`. A pair with an empty answer, or one that is longer than a model's context,
            is `failed`; a RuntimeWarning names it, and the others are judged.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        with self.keeping() as reading:
            return reading(contexts, firsts, seconds)

    @explained(elsewhere.JUDGED)
    def prefer(
        self, contexts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Tensor:
        """``[n]`` float64: how probable it is that each first answer is the better one, as
        `Judgments.preference`; NaN where a pair has failed."""
        return self(contexts, firsts, seconds).preference

    def _too_long(self, prompts: Iterable[Ids]) -> str | None:
        """Why one of some prompts cannot be read, or None if all can."""
        tokens = max(map(len, prompts))
        for name, context in self._contexts:
            if context is not None and tokens > context:
                return f"its prompt has {tokens} tokens, and the context of {name} is {context}"
        return None

    @contextmanager
    def keeping(self) -> Iterator[Reading]:
        """Judge several times within a ``with`` block, as the rounds of a tournament do.

        The object that it gives is called as the judge is. What a prompt begins with as one did
        before is not read again until the block ends.
        """
        with Scorer(self.blend, max_batch=self.max_batch) as scorer:
            yield Reading(self, scorer)


class Reading:
    """A judge at work, from its first pair to its last.

    Attributes:
        stats: what its models have read so far.
    """

    def __init__(self, judge: Judge, scorer: Scorer) -> None:
        self.judge, self._scorer = judge, scorer
        self.stats: tuple[ModelStats, ...] = ()

    def prefer(
        self, contexts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Tensor:
        """As `Judge.prefer`."""
        return self(contexts, firsts, seconds).preference

    def __call__(
        self, contexts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str]
    ) -> Judgments:
        """As `Judge.__call__`."""
        start, principles = time.perf_counter(), self.judge.principles
        pairs = _pairs(contexts, firsts, seconds)
        prompts = [self._prompts(pair) for pair in pairs]
        reasons = [_wordless(pair) for pair in pairs]
        ids = {
            text: encode_prompt(self.judge.tokenizer, text)
            for each, why in zip(prompts, reasons, strict=True)
            if why is None
            for both in each
            for text in both
        }
        for i, each in enumerate(prompts):
            if reasons[i] is None:
                reasons[i] = self.judge._too_long(ids[text] for both in each for text in both)
        # What is read and its order depend on the two answers, not on which of them came first.
        asked = {
            text: name
            for pair, each, why in zip(pairs, prompts, reasons, strict=True)
            if why is None
            for name, (ab, ba) in zip(principles, each, strict=True)
            for text in ((ab, ba) if pair.first <= pair.second else (ba, ab))
        }
        found, stats = self._read(asked, ids)
        for i, each in enumerate(prompts):
            read = [p for both in each for text in both for p in found.get(text, ())]
            if reasons[i] is None and any(map(math.isnan, read)):
                reasons[i] = "the probability of a label is not a number"
            if reasons[i] is not None:
                warn(f"pair {i} was not judged: {reasons[i]}", RuntimeWarning)
        nothing = (math.nan, math.nan)
        orders = [
            [[nothing if why else found[text] for text in both] for both in each]
            for each, why in zip(prompts, reasons, strict=True)
        ]
        return Judgments(
            torch.tensor(orders, dtype=torch.float64, device="cpu").view(-1, len(principles), 2, 2),
            principles,
            tuple(reasons),
            replace(stats, seconds=time.perf_counter() - start),
        )

    def _prompts(self, pair: _Pair) -> list[tuple[str, str]]:
        """The two texts that are read for each principle, one for each order."""
        context, a, b = pair
        return [
            (self.judge.prompt(context, a, b, p), self.judge.prompt(context, b, a, p))
            for p in self.judge.principles
        ]

    def _read(
        self, asked: Mapping[str, str | None], ids: Mapping[str, Ids]
    ) -> tuple[dict[str, tuple[float, float]], Stats]:
        """The probabilities of both labels after each text, and what reading them cost.

        Args:
            asked: texts, each with the principle that it asks about.
            ids: of each text, its tokens.
        """
        labels = [[label] for name in asked.values() for label in self.judge._label_ids[name]]
        if not asked:
            return {}, Stats(0, 0.0, (), 0, 0)
        scores = self._scorer.score([ids[text] for text in asked for _ in range(2)], labels)
        self.stats = summed([*self.stats, *scores.stats.models])
        probs = scores.logprobs[:, 0].double().exp().view(-1, 2).tolist()
        return dict(zip(asked, map(tuple, probs), strict=True)), scores.stats


def _check_blend(blend: Blend) -> None:
    """Refuse a blend whose prompts or weights are not the same for whatever is judged.

    Raises:
        ValueError: names the term.
    """
    for term in blend.terms:
        for name in ("system", "prompt"):
            if getattr(term, name) is not None:
                raise ValueError(
                    f"model has the term {term} with a {name} of its own; a judge's must have "
                    "none, as its template is the prompt: JudgeTemplate(system=...)"
                )
    names = [*blend.names, *blend.value_names]
    weights = [*blend.weights, *blend.value_weights]
    for part in blend.parts:
        names += [blend.names[blend.terms.index(t)] for t in part.terms]
        weights += part.weights
    for name, weight in zip(names, weights, strict=True):
        if isinstance(weight, Tensor) and weight.dim():
            raise ValueError(
                f"model has the weight {list(weight.shape)} of {name}; a judge's must be numbers"
            )


class _Pair(NamedTuple):
    """A text or a chat, and two answers to it."""

    context: Any
    first: str
    second: str


def _wordless(pair: _Pair) -> str | None:
    """Why a pair is not read, where an answer has no word; or None."""
    for name, answer in (("first", pair.first), ("second", pair.second)):
        if not answer.strip():
            return f"its {name} answer is {answer!r:.80}, without a word"
    return None


def _pairs(contexts: Any, firsts: Any, seconds: Any) -> list[_Pair]:
    """The pairs that are to be judged, checked.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    given = {"contexts": contexts, "firsts": firsts, "seconds": seconds}
    for name, x in given.items():
        if isinstance(x, str) or not isinstance(x, Sequence):
            raise TypeError(
                f"{name} is {x!r:.80}; it must be a list with an entry a pair"
                if isinstance(x, str)
                else f"{name} is a {type(x).__name__}; it must be a list with an entry a pair"
            )
    if is_chat(contexts) and not is_chat(contexts[0]):
        raise TypeError("contexts is one chat; it must be a list of texts or chats, one a pair")
    for name in ("firsts", "seconds"):
        if len(given[name]) != len(contexts):
            raise ValueError(
                f"{name} has {len(given[name])} entries; it must have {len(contexts)}, one for "
                "each of contexts"
            )
        for i, answer in enumerate(given[name]):
            if not isinstance(answer, str):
                raise TypeError(f"{name}[{i}] is {answer!r:.80}; it must be a text")
            check_unicode(answer, f"{name}[{i}]")
    found = []
    for i, context in enumerate(contexts):
        read = request(f"contexts[{i}]", context)
        if is_ids(read):
            raise TypeError(f"contexts[{i}] is token ids; it must be a text or a chat")
        check_unicode(read, f"contexts[{i}]")
        found.append(_Pair(read, firsts[i], seconds[i]))
    return found
