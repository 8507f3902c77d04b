"""The points of a sweep: what is measured of the texts of a method at one weighting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .. import metrics
from ..blends.blend import Blend
from ..blends.values import ValueSum
from ..bulk.records import number
from ..checks import warn
from ..decoding.inputs import Requests
from ..decoding.scoring import score
from ..decoding.search.finished import TextValuer
from .ledger import Ledger
from .weightings import KL, key, said

PERPLEXITY = "perplexity"  # the name of that measure in the file
SCORING = ("tokenizer", "max_batch", "tools", "chat_template_kwargs")  # what `score` takes too

Scores = list[list[Any]]  # of each prompt's texts; None where there is none


class Points:
    """Scores points whose texts are there, as a `Ledger` has them or anew.

    Args:
        values: what scores texts, by the names of the rewards.
        names: of all objectives: the rewards, and perhaps "kl".
        reference: `kl_to`, or None.
        generation: the arguments of `generate`.

    Attributes:
        ledger: where scores are kept.
        ids: the hash of each measure, by which the ledger knows whether it has changed.
        found: of each point, by its method and weighting, the figures, the texts and the scores.
    """

    ledger: Ledger

    def __init__(
        self,
        prompts: Sequence[Any],
        values: Mapping[str, ValueSum],
        names: Sequence[str],
        reference: Blend | None,
        generation: Mapping[str, Any],
    ) -> None:
        self.prompts, self.values, self.names = prompts, values, names
        self.reference, self.generation = reference, generation
        requests, given = Requests(list(prompts)), generation.get("tokenizer")
        self.valuers = {
            name: TextValuer.of(value, requests, given) for name, value in values.items()
        }
        self.scored: set[str] = set()  # rewards that have scored a point
        self.ids: dict[str, str | None] = dict.fromkeys((*values, PERPLEXITY))
        self.found: dict[Any, tuple[dict[str, Any], list[list[str]], dict[str, Scores]]] = {}

    def finish(self, name: str, weights: dict[str, float], lines: Mapping[int, Any]) -> None:
        """Score a point whose texts are all there."""
        each = [lines[i] for i in range(len(self.prompts))]
        where = f"{name!r} at {said(weights)}"
        lost = [i for i, line in enumerate(each) if any(line["failed"])]
        if lost:
            warn(f"{where} has no text to prompt {lost[0]}, which failed", RuntimeWarning)
        scores: dict[str, Scores] = {}
        for reward in self.values:
            find = functools.partial(self._scores, reward, each, where)
            scores[reward] = self._measured(name, weights, reward, each, find)
        point: dict[str, Any] = {"method": name, "weights": dict(weights)}
        kl = None
        if self.reference is not None and all(line["kl"] is not None for line in each):
            kl = [line["kl"] for line in each]
        if KL in self.names and KL not in self.values:
            negative = [[None if x is None else -x for x in own] for own in kl or []]
            scores[KL] = negative or [[None] * len(line["texts"]) for line in each]
        found = {r: _mean(scores[r]) for r in self.names}
        point["rewards"] = {r: mean for r, (mean, _) in found.items()}
        point["intervals"] = {r: half for r, (_, half) in found.items()}
        point["kl"], point["kl_interval"] = _mean(kl) if kl else (None, None)
        point |= self._perplexity(name, weights, each)
        self.found[name, key(weights)] = (point, [line["texts"] for line in each], scores)

    def _measured(
        self,
        name: str,
        weights: dict[str, float],
        measure: str,
        lines: Sequence[Any],
        find: Callable[[], Scores | None],
    ) -> Scores:
        """The scores of a point, from the file if it has them; None where there are none."""
        of = self.ids[measure]
        found = self.ledger.measure(name, weights, measure, of)
        if found is None:
            found = find()
            if found is None or any(x is None for own in found for x in own):
                return found or [[None] * len(line["texts"]) for line in lines]
            record = {"method": name, "weights": weights, "measure": measure, "of": of}
            self.ledger.write({**record, "scores": found})
        self.scored.add(measure)
        return found

    def _scores(self, reward: str, lines: Sequence[Any], where: str) -> Any:
        """What a reward says of each text of a point; None if it raises."""
        pairs = [
            (i, text)
            for i, line in enumerate(lines)
            for text, bad in zip(line["texts"], line["failed"], strict=True)
            if not bad
        ]
        try:
            flat = self.valuers[reward](*([*x] for x in zip(*pairs, strict=True))).tolist()
        except Exception as error:  # It may raise whatever it likes.
            if reward not in self.scored:
                raise failed(error, f"rewards[{reward!r}], of {where},") from error
            what = f"{type(error).__name__}: {error}"
            warn(f"the reward {reward!r} of {where} failed ({what})", RuntimeWarning)
            return None
        for (i, text), x in zip(pairs, flat, strict=True):
            if not math.isfinite(x):
                warn(
                    f"the reward {reward!r} of {where} is {x} for prompt {i}, whose text is "
                    f"{text!r:.60}; the point has no mean of it",
                    RuntimeWarning,
                )
                break
        left = iter(flat)
        return [[None if bad else number(next(left)) for bad in line["failed"]] for line in lines]

    def _perplexity(
        self, name: str, weights: dict[str, float], lines: Sequence[Any]
    ) -> dict[str, Any]:
        """The perplexity of a point's texts under the reference, with its interval."""
        none = {"perplexity": None, "perplexity_interval": None}
        if self.reference is None:
            return none
        find = functools.partial(self._reference_logprobs, lines)
        found = self._measured(name, weights, PERPLEXITY, lines, find)
        pairs = [pair for own in found for pair in own if pair is not None]
        log_p = [sum(x[0] for x in own if x is not None) for own in found]
        tokens = [sum(x[1] for x in own if x is not None) for own in found]
        if not pairs:
            return none
        each = metrics.perplexity_interval(log_p, tokens)
        return dict(zip(none, map(number, each), strict=True))

    def _reference_logprobs(self, lines: Sequence[Any]) -> Any:
        """For each text the log-prob under the reference and the number of its tokens."""
        places, responses = [], []
        for i, line in enumerate(lines):
            for j, text in enumerate(line["texts"]):
                response = text if line["ids"] is None else line["ids"][j]
                if response and not line["failed"][j]:
                    places.append((i, j))
                    responses.append(response)
        found: list[list[Any]] = [[[0.0, 0] for _ in line["texts"]] for line in lines]
        if places:
            own = {n: self.generation[n] for n in SCORING if n in self.generation}
            scores = score(self.reference, [self.prompts[i] for i, _ in places], responses, **own)
            pairs = zip(scores.totals.double().tolist(), scores.lengths.tolist(), strict=True)
            for (i, j), (log_p, tokens) in zip(places, pairs, strict=True):
                found[i][j] = [log_p, tokens] if math.isfinite(log_p) else None
        return found


def _mean(scores: Sequence[Sequence[float | None]]) -> tuple[float | None, float | None]:
    """The mean over prompts of the mean over each one's texts, and half of its 95 % interval.

    None where a score is, and of the interval where there is a single prompt.
    """
    each = []
    for own in scores:
        known = [x for x in own if x is not None]
        if len(known) < len(own):
            return None, None
        each.append(math.fsum(known) / len(known))
    mean, half = metrics.mean_interval(each)
    return mean, number(half)


def failed(error: Exception, where: str) -> Exception:
    """The same error, which says where it was."""
    kinds = (TypeError, ValueError, NotImplementedError)
    if type(error) in kinds:
        return type(error)(f"{where}: {error}")
    return ValueError(f"{where} failed ({type(error).__name__}: {error})")
