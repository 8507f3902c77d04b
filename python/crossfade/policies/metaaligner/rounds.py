"""Answers while an aligner corrects them, round after round."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...blends.blend import as_blend
from ...blends.values import as_value
from ...bulk.records import seed_of
from ...checks import warn
from ...decoding.call import Seed, blend_and_search
from ...decoding.forms import Request
from ...decoding.generation import Generation, check_running, check_together, generate
from ...decoding.inputs import Requests
from ...decoding.members import tokenizer_of
from ...decoding.output import Output
from ...decoding.search.finished import TextValuer
from ...decoding.stats import Stats
from ...drafts import ANSWER, Draft, check_draft
from ..turns import turns
from .aligner import MetaAligner
from .corrections import Corrections, corrections_of
from .objectives import resolve_each

RUNNING = inspect.signature(check_running).parameters.keys()
OWN = inspect.signature(Generation).parameters.keys() - {"blend", "draft", "arguments"}


class Rounds:
    """Some answers while they are corrected.

    Args:
        draft: what guesses the tokens of corrections, maybe the answers themselves.

    Attributes:
        queries: as the caller gave them.
        items: the queries as values read them. In the place of one without a word, which no model
            could read, there is another text.
        blanks: prompts to read in the place of those that are not corrected.
        texts: the answers that stand, one a query; in the last round, one a row.
        failed: which of them are not corrected any more.
        interrupted: whether Ctrl-C has ended the work. What stood before it stands.
    """

    def __init__(
        self,
        aligner: MetaAligner,
        queries: Sequence[Any],
        objectives: Any,
        draft: Draft | None = None,
    ) -> None:
        self.aligner, self.queries, self.draft = aligner, queries, draft
        self.sets = resolve_each(objectives, len(queries), aligner.objectives)
        self.blanks = [self._prompt(i, "-") for i in range(len(queries))]
        self.items: list[Request] = [
            query if _has_words(query) else blank
            for query, blank in zip(queries, self.blanks, strict=True)
        ]
        self.answers: list[str] = []
        self.texts: list[str] = []
        self.failed = [False] * len(queries)
        self.rounds: list[list[str]] = []
        self.stats: list[Stats] = []
        self.out: Any = None  # of the last call
        self.interrupted = False
        self.valuer: TextValuer | None = None
        self.scores: dict[tuple[int, str], float] = {}  # of each query's texts

    def _prompt(self, i: int, answer: str) -> str:
        """The prompt of a query with an answer to it."""
        try:
            return self.aligner.prompt(self.queries[i], answer, self.sets[i])
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"queries[{i}]: {error}") from None

    @property
    def refused(self) -> list[int]:
        return [i for i, failed in enumerate(self.failed) if failed]

    def take_value(self, accept: Any) -> None:
        """Take the value of `accept`, and raise its errors."""
        value, requests = as_value(accept, "accept"), Requests(self.items)
        self.valuer = TextValuer(value, requests, self.aligner.tokenizer, self.aligner.vocabulary)

    def check_last(self, search: Any, seed: Seed, generation: Mapping[str, Any]) -> None:
        """Raise the errors of the last round's arguments, which has them all."""
        asked = dict(generation)
        running = {name: asked.pop(name, None) for name in RUNNING}
        check_running(**running)
        engine, draft = running["engine"], self._drafted_by(self.blanks, [None] * len(self.items))
        check_draft(draft, simple=engine is not None and engine.simple)
        own = {name: asked.pop(name) for name in OWN & asked.keys()}
        if own.get("kl_to") is not None:
            own["kl_to"] = self.aligner.reading(self.blanks, as_blend(own["kl_to"], "kl_to"))
        checked = Generation(
            self.aligner.reading(self.blanks),
            tokenizer=self.aligner.tokenizer,
            search=search,
            draft=draft,
            arguments=asked,
            **own,
        )
        # Without a seed none is taken from torch's generator here.
        job = checked.job(checked.read(Requests(self.items)), 0 if seed is None else seed)
        check_together(len(job), running["max_batch"], own.get("streamer"))

    def _drafted_by(self, prompts: Sequence[str], answers: Sequence[str | None]) -> Draft | None:
        """What guesses the corrections of these answers, for which the aligner reads prompts."""
        draft = self.draft
        if draft is None or draft.texts is not None:
            return draft
        if draft.source == ANSWER:
            return Draft(texts=answers, length=draft.length)
        if draft.blend is not None:
            return replace(draft, source=self.aligner.reading(prompts, draft.blend))
        return draft

    def refuse_empty(self, what: str, found: Sequence[Any]) -> None:
        """Let those fail whose text or chat has no word, after a warning."""
        for i, x in enumerate(found):
            if not self.failed[i] and not _has_words(x):
                self._fail(i, f"its {what} is {x!r:.80}, without a word")

    def _fail(self, i: int, why: str) -> None:
        warn(f"query {i} was not corrected: {why}", RuntimeWarning)
        self.failed[i] = True

    def write_answers(
        self,
        policy: Any,
        seed: Seed,
        own: Mapping[str, Any] | None,
        generation: Mapping[str, Any],
    ) -> None:
        """Let the policy answer the queries."""
        asked = {
            **{n: generation[n] for n in ("max_new_tokens", "max_batch") if n in generation},
            **_policy_arguments(own),
        }
        if "tokenizer" not in asked:
            blend, _ = blend_and_search(policy, None)
            asked["tokenizer"] = tokenizer_of(blend) or self.aligner.tokenizer
        asked.setdefault("seed", _seed_of(seed, 0))
        out: Any = generate(policy, Requests(self.items, refused=self.refused), **asked)
        self._take(out)
        for i, failed in enumerate(out.failed.tolist()):
            self.failed[i] = self.failed[i] or failed  # A warning has said why.
        self.take_answers([text.strip() for text in out.text])

    def take_answers(self, answers: list[str]) -> None:
        self.answers, self.texts = answers, list(answers)
        if not self.interrupted:  # Else a policy has not come to all of them.
            self.refuse_empty("answer", answers)

    def _take(self, out: Output) -> None:
        self.out, self.interrupted = out, out.stats.interrupted
        self.stats.append(out.stats)

    def run(self, count: int, search: Any, seed: Seed, generation: Mapping[str, Any]) -> None:
        """Correct what stands in so many rounds, or until Ctrl-C."""
        for number in range(1, count + 1):
            if self.interrupted:
                break
            try:
                self._round(number, search, seed, generation, last=number == count)
            except KeyboardInterrupt:
                if self.out is None:  # There is nothing yet to give back.
                    raise
                self.interrupted = True
                warn(f"interrupted in round {number} of {count}", RuntimeWarning)

    def _round(
        self, number: int, search: Any, seed: Seed, generation: Mapping[str, Any], *, last: bool
    ) -> None:
        """Correct what stands, and let the corrections stand that may.

        There are `num_return_sequences` rows of each query in the last round, and one in others.
        A streamer is told of the last round alone.
        """
        asked = dict(generation)
        if not last:
            asked |= {"num_return_sequences": 1, "streamer": None}
        prompts = [
            blank if failed else self._prompt(i, text)
            for i, (blank, failed, text) in enumerate(
                zip(self.blanks, self.failed, self.texts, strict=True)
            )
        ]
        if asked.get("kl_to") is not None:
            asked["kl_to"] = self.aligner.reading(prompts, as_blend(asked["kl_to"], "kl_to"))
        out: Any = generate(
            self.aligner.reading(prompts),
            Requests(self.items, refused=self.refused),
            tokenizer=self.aligner.tokenizer,
            search=search,
            draft=self._drafted_by(prompts, self.texts),
            seed=seed if number == 1 else _seed_of(seed, number),
            **asked,
        )
        self._take(out)
        copies = len(out.text) // len(self.items)
        places = [row // copies for row in range(len(out.text))]
        old = [self.texts[i] for i in places]
        failed, ended = out.failed.tolist(), out.ended.tolist()
        new = []
        for row, text in enumerate(out.text):
            if not text.strip() and ended[row] and not failed[row]:
                sample = f", sample {row % copies}," if copies > 1 else ""
                says = f"the aligner wrote {text!r:.80}, without a word"
                warn(f"query {places[row]}{sample} was not corrected: {says}", RuntimeWarning)
                failed[row] = True
            stands = text.strip() and not failed[row] and (ended[row] or not self.interrupted)
            new.append(text if stands else old[row])
        self.texts, self.failed = old, failed  # which stand if an interrupt ends the last line
        self.rounds.append(old)
        self.texts = self.rounds[-1] = self._accepted(places, old, new, failed)

    def _accepted(
        self, places: Sequence[int], old: list[str], new: list[str], failed: Sequence[bool]
    ) -> list[str]:
        """Of each row the new text where its value is higher, and else the old one."""
        if self.valuer is None:
            return new
        rows = [r for r, bad in enumerate(failed) if not bad]
        asked = dict.fromkeys((places[r], texts[r]) for texts in (old, new) for r in rows)
        todo = [key for key in asked if key not in self.scores]
        if todo:
            found = self.valuer([i for i, _ in todo], [text for _, text in todo])
            self.scores |= dict(zip(todo, found.tolist(), strict=True))
        kept = list(new)
        for r in rows:
            before, after = (self.scores[places[r], texts[r]] for texts in (old, new))
            if not _or_worst(after) > _or_worst(before):
                kept[r] = old[r]
        return kept

    def corrections(self) -> Corrections:
        """What stands, and what it is made of."""
        copies = len(self.texts) // len(self.answers)
        scores: Tensor | None = None
        if self.valuer is not None:
            each = [
                [
                    math.nan if self.failed[row] else self.scores.get((row // copies, x), math.nan)
                    for x in (self.answers[row // copies], text)
                ]
                for row, text in enumerate(self.texts)
            ]
            scores = torch.tensor(each, dtype=torch.float64, device=self.out.lengths.device)
        return corrections_of(
            self.out,
            self.texts,
            self.answers,
            self.rounds,
            self.failed,
            self.stats,
            scores,
            interrupted=self.interrupted,
        )


def _has_words(x: Any) -> bool:
    """Whether anything is said in a text or a chat."""
    return any(said.strip() for _, said in turns("query", x))


def _policy_arguments(given: Any) -> dict[str, Any]:
    """The arguments by which a policy writes one answer to each query."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(
            f"policy_generation is a {type(given).__name__}; it must be a mapping of arguments of "
            "crossfade.generate, such as {'max_new_tokens': 128}"
        )
    if given.get("num_return_sequences") not in (None, 1):
        raise ValueError(
            f"policy_generation has num_return_sequences={given['num_return_sequences']}; it must "
            "be left out, as one answer to each query is corrected"
        )
    if given.get("return_dict_in_generate") is False:
        raise ValueError("policy_generation has return_dict_in_generate; it must be left out")
    return dict(given)


def _seed_of(seed: Seed, number: int) -> Seed:
    """The seed of a round, or of the policy as round 0; None stays None."""
    if isinstance(seed, Tensor):
        seed = seed.tolist()
    if isinstance(seed, Sequence):
        return [seed_of(s, number) for s in seed]
    return None if seed is None else seed_of(seed, number)


def _or_worst(score: float) -> float:
    """A score, of which NaN is the worst."""
    return -math.inf if math.isnan(score) else score
