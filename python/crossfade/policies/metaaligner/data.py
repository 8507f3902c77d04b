"""Training rows of an aligner: the dynamic multi-objective set, from pairs of answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...checks import check_number, did_you_mean, explained
from .objectives import OBJECTIVES, resolve
from .preferences import Answer, Pair, Reader
from .template import AlignerTemplate, encode_answers, encode_prompt, query_text

# The stages of training, in their order, and the parts of the data.
STAGES = ("warm-up", "equal", "better")
SPLITS = ("train", "validation")
# Why pairs are left out.
REASONS = {
    "empty": "have an empty answer",
    "same": "have the same answer twice",
    "unjudged": "are compared by no objective",
    "spare": "are more than their prompt may have",
}


def _zeros(keys: Iterable[str]) -> Counter[str]:
    return Counter(dict.fromkeys(keys, 0))


@dataclass
class Counts:
    """How many rows were made of how many pairs.

    Attributes:
        pairs: how many pairs there were.
        rows: of each split ("train", "validation"), how many rows each stage has ("warm-up",
            "equal", "better").
        compared: how many of the pairs that gave rows are compared by each objective.
        left_out: how many pairs are in no row, for each reason: "empty" (an answer is), "same"
            (both answers are the same text), "unjudged" (no objective compares them) and "spare"
            (their prompt had its `per_prompt` pairs).
    """

    pairs: int = 0
    rows: dict[str, Counter[str]] = field(
        default_factory=lambda: {s: _zeros(STAGES) for s in SPLITS}
    )
    compared: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=lambda: _zeros(REASONS))

    def summary(self) -> str:
        """The rows of each stage, what they compare by, and what is left out, as a sentence."""
        said = f"{self.pairs} pairs give {_listed(self.rows['train'])} rows"
        if self.rows["validation"].total():
            said += f", and {_listed(self.rows['validation'])} rows for validation"
        if self.compared:
            said += f"; compared by {', '.join(f'{x} {n}' for x, n in self.compared.items())}"
        parts = [f"{count} {REASONS[why]}" for why, count in self.left_out.items() if count]
        return f"{said}; of the pairs, {', '.join(parts)}" if parts else said


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {stage}" for stage, count in counts.items())


class AlignerRows(list[dict[str, Any]]):
    """Training rows of an aligner, and their `counts` (see `Counts`)."""

    def __init__(self, rows: Iterable[dict[str, Any]], counts: Counts) -> None:
        super().__init__(rows)
        self.counts = counts

    def of(self, stage: str, split: str = "train") -> list[dict[str, list[int]]]:
        """The rows of a stage and a split, as `SFTTrainer` takes them.

        Args:
            stage: "warm-up", "equal" or "better".
            split: "train" or "validation".

        Raises:
            ValueError: there is no such stage or split; names it.
        """
        for name, x, known in (("stage", stage, STAGES), ("split", split, SPLITS)):
            if x not in known:
                says = did_you_mean(x, known)
                raise ValueError(f"{name} is {x!r:.80}; it must be among {', '.join(known)}{says}")
        return [
            {key: row[key] for key in ("prompt_ids", "completion_ids")}
            for row in self
            if (row["stage"], row["split"]) == (stage, split)
        ]

    def summary(self) -> str:
        """See `Counts.summary`."""
        return self.counts.summary()


class AlignerStream(Iterator[dict[str, Any]]):
    """Training rows of an aligner as they are made, and the `counts` of those so far."""

    def __init__(self, rows: Iterator[dict[str, Any]], counts: Counts) -> None:
        self._rows, self.counts = rows, counts

    def __next__(self) -> dict[str, Any]:
        return next(self._rows)

    def summary(self) -> str:
        """See `Counts.summary`."""
        return self.counts.summary()


@explained()
def metaaligner_rows(
    pairs: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    objectives: Any = None,
    *,
    noun: str = "context",
    margins: float | Mapping[str, float] = 0.0,
    per_prompt: int | None = None,
    warm_up: float = 1.0,
    validation: float = 0.0,
    seed: int = 0,
) -> AlignerRows:
    """Rows that teach a model to correct answers: the dynamic multi-objective set.

    With ``T(q, y, O, goal)`` the prompt of `AlignerTemplate`, answers y1 and y2 to a query q give

    - ``T(q, y2, O, "better") -> y1``, with the objectives O by which y1 is the better answer;
    - ``T(q, y1, O, "better") -> y2``, with those by which y2 is;
    - ``T(q, y2, O, "equal") -> y1``, with those by which they are equal;
    - ``T(q, y2, O, "equal") -> y2``, with the same, to warm up.

    There is no row without objectives. A pair's objectives are shuffled. What is drawn for a pair
    depends on `seed` and on its place alone: that of its element among `pairs`, and its own in it.
    Rows stand in the order of `pairs`, whose elements are not changed.

    Args:
        pairs: each with ``prompt``, a text or a chat, and two answers, ``first`` and ``second``, or
            ``chosen`` and ``rejected`` as TRL has them. ``preferences`` says for each objective
            whether the first one (or the chosen one) is "better", "worse" or "equal"; one that it
            lacks does not compare them. ``first_finished`` False says that a limit cut this answer.
            Or an element is a row of `crossfade.training.rollouts`, or of rated responses: it has
            ``responses``, each with ``text`` and with numbers by objective, ``rewards`` or
            ``ratings``. Any two of them are a pair.
        tokenizer: the aligner's.
        objectives: one set of what to compare by, as in `crossfade.correct`: names of the registry,
            ``{name: description}``, or a list of both. All must be in rewards. Rewards and
            preferences by other names are left out. None: all that the elements have, which must be
            in the registry.
        noun: what prompts call the query, see `AlignerTemplate`.
        margins: rewards that differ by no more than this are equal; one number, or numbers by
            objective, 0 for those without.
        per_prompt: how many pairs are drawn of an element's responses, at most; None: all.
        warm_up: the share of equal rows that give a row to warm up, within [0, 1].
        validation: the share of prompts that are to validate on, within [0, 1). A prompt is drawn
            by `seed` and its text alone, before anything else: all its rows are in the same split,
            wherever and how often it is among `pairs`.
        seed: of all that is drawn.

    Returns:
        Rows with ``prompt_ids``, ``completion_ids``, ``stage`` ("warm-up", "equal" or "better") and
        ``split`` ("train" or "validation"). EOS ends a completion unless a limit cut the answer.
        `AlignerRows.of` gives the rows of one stage and split, and `AlignerRows.counts` how many
        there are and which pairs are left out: those with an empty answer, with the same answer
        twice, and without a preference.

    Raises:
        TypeError, ValueError: names the row or the argument, what it was and what it must be.

    Source: MetaAligner (Yang et al., arXiv:2403.17141), algorithm 1 and section 3.2.2.
    """
    stream = metaaligner_stream(
        pairs,
        tokenizer,
        objectives,
        noun=noun,
        margins=margins,
        per_prompt=per_prompt,
        warm_up=warm_up,
        validation=validation,
        seed=seed,
    )
    return AlignerRows(stream, stream.counts)


@explained()
def metaaligner_stream(
    pairs: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    objectives: Any = None,
    *,
    noun: str = "context",
    margins: float | Mapping[str, float] = 0.0,
    per_prompt: int | None = None,
    warm_up: float = 1.0,
    validation: float = 0.0,
    seed: int = 0,
) -> AlignerStream:
    """The rows of `metaaligner_rows`, one after another, in memory that does not grow with them.

    Arguments and errors are those of `metaaligner_rows`. Wrong arguments raise at once, and a wrong
    element of `pairs` raises when it is reached. `AlignerStream.counts` counts what was made so
    far.
    """
    chosen = resolve(dict(OBJECTIVES) if objectives is None else objectives)
    if isinstance(pairs, (str, Mapping)) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs is a {type(pairs).__name__}; it must be rows, in a list, say")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r:.80}; it must be an int")
    if per_prompt is not None and (
        isinstance(per_prompt, bool) or not isinstance(per_prompt, int) or per_prompt < 1
    ):
        raise ValueError(f"per_prompt is {per_prompt!r:.80}; it must be an int of at least 1")
    if not 0 <= check_number("warm_up", warm_up) <= 1:
        raise ValueError(f"warm_up is {warm_up}; it must be a share within [0, 1]")
    if not 0 <= check_number("validation", validation) < 1:
        raise ValueError(f"validation is {validation}; it must be a share within [0, 1)")
    builder = _Builder(
        Reader(chosen, objectives is not None, _margins(margins, chosen)),
        tokenizer,
        AlignerTemplate(noun),
        per_prompt,
        warm_up,
        validation,
        seed,
    )
    return AlignerStream(builder.rows(pairs), builder.counts)


@dataclass
class _Builder:
    """Makes rows of pairs. Attributes are the arguments of `metaaligner_rows`."""

    reader: Reader
    tokenizer: Any
    template: AlignerTemplate
    per_prompt: int | None
    warm_up: float
    validation: float
    seed: int
    counts: Counts = field(default_factory=Counts)

    def rows(self, pairs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        for i, element in enumerate(pairs):
            name = f"row {i} of pairs"
            found = self.reader.pairs(element, name)
            self.counts.pairs += len(found)
            kept = self._kept(found, i)
            if not kept:
                continue
            self.counts.compared.update(x for _, pair in kept for x in pair.signs)
            made = [x for k, pair in kept for x in self._of_pair(pair, self._source(i, k))]
            split = self._split(kept[0][1].prompt)
            for row in self._encoded(made, name):
                self.counts.rows[split][row["stage"]] += 1
                yield {**row, "split": split}

    def _source(self, *place: int) -> random.Random:
        # A text as the seed gives the same numbers in all versions of Python.
        return random.Random(" ".join(map(str, (self.seed, *place))))

    def _kept(self, found: list[Pair], i: int) -> list[tuple[int, Pair]]:
        """The pairs of element i that give rows, and the place of each in it."""
        kept = []
        for k, pair in enumerate(found):
            why = _unfit(pair)
            if why is None:
                kept.append((k, pair))
            else:
                self.counts.left_out[why] += 1
        if self.per_prompt is not None and len(kept) > self.per_prompt:
            self.counts.left_out["spare"] += len(kept) - self.per_prompt
            source = self._source(i)
            kept = sorted(sorted(kept, key=lambda _: source.random())[: self.per_prompt])
        return kept

    def _of_pair(self, pair: Pair, source: random.Random) -> Iterator[tuple[str, str, Answer]]:
        """The stage, the prompt and the target of each row of a pair."""
        warms_up = source.random() < self.warm_up
        order = sorted(pair.signs, key=lambda _: source.random())
        first, second = pair.first, pair.second
        for sign, goal, answer, target in (
            (1, "better", second, first),
            (-1, "better", first, second),
            (0, "equal", second, first),
        ):
            objectives = {x: self.reader.objectives[x] for x in order if pair.signs[x] == sign}
            if not objectives:
                continue
            prompt = self.template.prompt(pair.prompt, answer.text, objectives, goal)
            if goal == "equal" and warms_up:
                yield "warm-up", prompt, answer
            yield goal, prompt, target

    def _encoded(self, made: list[tuple[str, str, Answer]], name: str) -> Iterator[dict[str, Any]]:
        """The rows as token ids. An answer, which many may have, is encoded once."""
        targets = list(dict.fromkeys(target for *_, target in made))
        texts, finished = [x.text for x in targets], [x.finished for x in targets]
        try:
            answers = encode_answers(self.tokenizer, texts, finished)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        ids = dict(zip(targets, answers, strict=True))
        for stage, prompt, target in made:
            before = encode_prompt(self.tokenizer, prompt)
            yield {"prompt_ids": before, "completion_ids": [*ids[target]], "stage": stage}

    def _split(self, prompt: Any) -> str:
        text = json.dumps([self.seed, query_text(prompt).strip()])
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return "validation" if place < self.validation else "train"


def _unfit(pair: Pair) -> str | None:
    """Why a pair gives no rows, or None if it does."""
    texts = {pair.first.text.strip(), pair.second.text.strip()}
    if "" in texts:
        return "empty"
    if len(texts) == 1:
        return "same"
    return None if pair.signs else "unjudged"


def _margins(margins: Any, objectives: Mapping[str, str]) -> dict[str, float]:
    """The margin of each objective."""
    given = margins if isinstance(margins, Mapping) else dict.fromkeys(objectives, margins)
    for name, x in given.items():
        place = f"margins[{name!r}]" if isinstance(margins, Mapping) else "margins"
        if name not in objectives:
            raise ValueError(
                f"{place} is of no objective; these are {', '.join(objectives)}"
                f"{did_you_mean(name, objectives)}"
            )
        if check_number(place, x) < 0:
            raise ValueError(f"{place} is {x}; it must be 0 or more")
    return {name: float(given.get(name, 0.0)) for name in objectives}
