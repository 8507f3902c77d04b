"""`crossfade.correct`: answers to queries, edited toward objectives, round after round."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import elsewhere
from ...blends.algebra import Algebra
from ...blends.blend import as_blend
from ...blends.values import as_value
from ...bulk.records import seed_of
from ...checks import explained, warn
from ...decoding.call import Seed, blend_and_search, seeds_and_streams
from ...decoding.forms import Request, is_chat
from ...decoding.generation import Generation, check_running, generate
from ...decoding.inputs import Requests
from ...decoding.members import tokenizer_of
from ...decoding.output import Output
from ...decoding.search.finished import TextValuer
from ...decoding.settings import check_int
from ...decoding.stats import Stats
from ...search import Recipe
from .aligner import MetaAligner
from .corrections import Corrections, corrections_of
from .objectives import resolve_each

RUNNING = inspect.signature(check_running).parameters.keys()
OWN = inspect.signature(Generation).parameters.keys() - {"blend", "arguments"}
# Arguments of `generate` that a correction has no use for, and what to say of them.
REFUSED = {
    "tokenizer": "the texts are encoded by the aligner's: MetaAligner(model, tokenizer)",
    "attention_mask": "queries are texts or chats",
    "cache": "the prompts of each round are new",
    "return_cache": "the prompts of each round are new",
    "return_dict_in_generate": "corrections are an Output; Output.sequences has the tensor",
}


@explained(elsewhere.CORRECT)
def correct(
    aligner: MetaAligner,
    queries: Any,
    answers_or_policy: Any,
    objectives: Any,
    *,
    rounds: int = 1,
    search: Any = None,
    draft: Any = None,
    accept: Any = None,
    seed: Seed = None,
    policy_generation: Mapping[str, Any] | None = None,
    **generation: Any,
) -> Corrections:
    """Let an aligner edit answers toward objectives.

    Of a query q and its answer y, a round draws ``y' ~ aligner(prompt(q, y, objectives))``, up to
    EOS; the next one edits y'. All queries of a round are one batch, whatever their objectives. A
    search, `accept` and `kl_to` work as in `generate`: values read the query as their prompt and
    the correction as the response, never the aligner's prompt, and a reference of `kl_to` reads
    what the aligner reads.

    A row fails whose query or answer is empty, whose prompt is longer than a model's context, or
    for which the aligner writes nothing. A RuntimeWarning names it, its answer stands as it was,
    and the others are corrected.

    Args:
        aligner: a `MetaAligner`.
        queries: what was answered: n texts or chats, or one.
        answers_or_policy: n texts, from anywhere. Or a policy, which answers the queries first: a
            `Model`, a `Blend`, a `Recipe` or a bare causal LM. It reads them as `generate` does, so
            that a model that was tuned to chat needs chats. If it has no tokenizer, its tokens are
            those of the aligner's. White space around its answers is left out.
        objectives: one set for all queries: a name, ``{name: description}``, or a list of names,
            in which such mappings may stand. Or a list without a name in it: a set for each query.
            `MetaAligner.objectives` has the names that are known.
        rounds: how often each answer is edited. A round before the last goes on with one
            correction of each query, the best of a search.
        search: how rows are chosen by a value, as in `generate`.
        draft: not supported yet; it must be None.
        accept: a value, as searches take them: a correction stands only where its value is higher
            than that of the answer which it edits. Both are scored as texts that have ended.
        seed: as in `generate`, whose tokens the first round's are. Later rounds and the policy draw
            by seeds made of it.
        policy_generation: the arguments of `generate` by which a policy writes. Where it does not
            say `max_new_tokens` or `max_batch`, those of the corrections count.
        generation: the arguments of `generate` by which corrections are written.

    Returns:
        `Corrections`, an `Output` with the answers and the texts of each round. Its `stats` are of
        all rounds together, the policy's work included.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be, before any
            work.
        NotImplementedError: names what is not supported.

    Source: MetaAligner (Yang et al., arXiv:2403.17141).
    """
    if not isinstance(aligner, MetaAligner):
        raise TypeError(
            f"aligner is a {type(aligner).__name__}; it must be a MetaAligner: "
            "correct(MetaAligner(model, tokenizer), queries, answers, objectives)"
        )
    if draft is not None:
        raise NotImplementedError(
            f"draft is {draft!r:.80}, which is not supported yet; it must be None"
        )
    if rounds is None:
        raise TypeError("rounds is None; it must be an int")
    check_int("rounds", rounds, 1)
    _check_arguments(generation, rounds)
    work = _Work(aligner, _queries(queries), objectives)
    policy = answers_or_policy
    is_policy = isinstance(policy, (Algebra, nn.Module, Recipe))
    if policy_generation is not None and not is_policy:
        raise ValueError("policy_generation is given, and answers are given too, not a policy")
    given = [] if is_policy else _answers(policy, len(work.items))
    seeds_and_streams(seed, len(work.items), 1, False, torch.device("cpu"))
    if accept is not None:
        work.take_value(accept)
    if is_policy or rounds > 1:  # Else the only call checks all that there is.
        work.check_last(search, seed, generation)
    work.refuse_empty("query", [q if isinstance(q, str) else None for q in work.queries])
    if is_policy:
        work.write_answers(policy, seed, policy_generation, generation)
    else:
        work.take_answers(given)
    for number in range(1, rounds + 1):
        last = number == rounds
        out = work.round(number, search, seed, generation, last=last)
        if out.stats.interrupted:
            break
    return work.corrections(out)


class _Work:
    """Some answers while they are corrected.

    Attributes:
        queries: as the caller gave them.
        items: the queries as values read them. In the place of one without a word, which no model
            could read, there is another text.
        blanks: prompts to read in the place of those that are not corrected.
        texts: the answers that stand, one a query; in the last round, one a row.
        failed: which of them are not corrected any more.
    """

    def __init__(self, aligner: MetaAligner, queries: Sequence[Any], objectives: Any) -> None:
        self.aligner, self.queries = aligner, queries
        self.sets = resolve_each(objectives, len(queries), aligner.objectives)
        self.blanks = [self._prompt(i, "-") for i in range(len(queries))]
        self.items: list[Request] = [
            blank if _is_empty(query) else query
            for query, blank in zip(queries, self.blanks, strict=True)
        ]
        self.answers: list[str] = []
        self.texts: list[str] = []
        self.failed = [False] * len(queries)
        self.rounds: list[list[str]] = []
        self.stats: list[Stats] = []
        self.valuer: TextValuer | None = None
        self.scores: dict[tuple[int, str], float] = {}  # of each query's texts

    def _prompt(self, i: int, answer: str) -> str:
        """The prompt of a query with an answer to it."""
        try:
            return self.aligner.prompt(self.queries[i], answer, self.sets[i])
        except (TypeError, ValueError) as error:
            raise type(error)(f"queries[{i}]: {error}") from None

    @property
    def refused(self) -> list[int]:
        return [i for i, failed in enumerate(self.failed) if failed]

    def take_value(self, accept: Any) -> None:
        """Take the value of `accept`, and raise its errors."""
        value, requests = as_value(accept), Requests(self.items)
        self.valuer = TextValuer(value, requests, self.aligner.tokenizer, self.aligner.vocabulary)

    def check_last(self, search: Any, seed: Seed, generation: Mapping[str, Any]) -> None:
        """Raise the errors of the last round's arguments, which has them all."""
        asked = dict(generation)
        check_running(**{name: asked.pop(name, None) for name in RUNNING})
        own = {name: asked.pop(name) for name in OWN & asked.keys()}
        if own.get("kl_to") is not None:
            own["kl_to"] = self.aligner.reading(self.blanks, as_blend(own["kl_to"], "kl_to"))
        checked = Generation(
            self.aligner.reading(self.blanks),
            tokenizer=self.aligner.tokenizer,
            search=search,
            arguments=asked,
            **own,
        )
        # Without a seed none is taken from torch's generator here.
        checked.job(checked.read(Requests(self.items)), 0 if seed is None else seed)

    def refuse_empty(self, what: str, texts: Sequence[str | None]) -> None:
        """Let those fail that have no word, after a warning; None is not looked at."""
        for i, text in enumerate(texts):
            if text is not None and not text.strip() and not self.failed[i]:
                self._fail(i, f"its {what} is {text!r:.80}, without a word")

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
        if out.stats.interrupted:
            raise KeyboardInterrupt
        self.stats.append(out.stats)
        for i, failed in enumerate(out.failed.tolist()):
            self.failed[i] = self.failed[i] or failed  # A warning has said why.
        self.take_answers([text.strip() for text in out.text])

    def take_answers(self, answers: list[str]) -> None:
        self.answers, self.texts = answers, list(answers)
        self.refuse_empty("answer", answers)

    def round(
        self, number: int, search: Any, seed: Seed, generation: Mapping[str, Any], *, last: bool
    ) -> Output:
        """Correct what stands, and let the corrections stand that may.

        Returns:
            What was written: `num_return_sequences` rows of each query in the last round, and one
            in others.
        """
        asked = dict(generation) if last else {**generation, "num_return_sequences": 1}
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
            seed=seed if number == 1 else _seed_of(seed, number),
            **asked,
        )
        self.stats.append(out.stats)
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
            new.append(text if text.strip() and not failed[row] else old[row])
        self.texts = self._accepted(places, old, new, failed)
        self.failed = failed
        self.rounds.append(self.texts)
        return out

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

    def corrections(self, out: Output) -> Corrections:
        copies = len(self.texts) // len(self.answers)
        scores: Tensor | None = None
        if self.valuer is not None:
            each = [
                [
                    math.nan if self.failed[row] else self.scores[row // copies, x]
                    for x in (self.answers[row // copies], text)
                ]
                for row, text in enumerate(self.texts)
            ]
            scores = torch.tensor(each, dtype=torch.float64, device=out.lengths.device)
        return corrections_of(
            out, self.texts, self.answers, self.rounds, self.failed, self.stats, scores
        )


def _queries(queries: Any) -> list[Any]:
    if isinstance(queries, str) or is_chat(queries):
        return [queries]
    if not isinstance(queries, Sequence) or isinstance(queries, (bytes, bytearray)):
        raise TypeError(
            f"queries is a {type(queries).__name__}; it must be a list of texts or chats, or one"
        )
    if not queries:
        raise ValueError("queries is empty; it must have at least one")
    return list(queries)


def _answers(answers: Any, n: int) -> list[str]:
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, Sequence) or isinstance(answers, (bytes, bytearray)):
        raise TypeError(
            f"answers_or_policy is a {type(answers).__name__}; it must be a list of texts, one for "
            "each query, or a policy: a Model, a Blend or a causal LM"
        )
    for i, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise TypeError(f"answers_or_policy[{i}] is {answer!r:.80}; it must be a text")
    if len(answers) != n:
        raise ValueError(
            f"answers_or_policy has {len(answers)} answers; it must have {n}, one for each query"
        )
    return list(answers)


def _is_empty(query: Any) -> bool:
    return isinstance(query, str) and not query.strip()


def _check_arguments(generation: Mapping[str, Any], rounds: int) -> None:
    """Refuse arguments of `generate` that corrections do not take."""
    for name, says in REFUSED.items():
        if generation.get(name) is not None:
            raise NotImplementedError(f"{name} is not supported by crossfade.correct; {says}")
    if generation.get("streamer") is not None and rounds > 1:
        raise NotImplementedError(
            f"streamer is set and rounds is {rounds}; with it, rounds must be 1"
        )


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
