"""Pairs for preference training from responses that somebody has rated."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..checks import check_number
from .data import Rows, check_keys, message
from .processes import get_logger

logger = get_logger(__name__)
FORM = '{"text": "...", "ratings": {"helpful": 4}}'  # of a response
# What other programs call ratings.
MEANT = ("rating", "score", "scores", "reward", "overall_score", "grade", "points", "value")


def rated_pairs(
    rows: Sequence[Mapping[str, Any]], ratings: Sequence[str] | str | None = None, *, seed: int = 0
) -> Rows:
    """A pair for each prompt: the response that is rated best, and one that is strictly worse.

    The best response has the highest mean of its ratings; of equal ones it is the longest, in
    tokens, or in characters where there are no ids, and of those the first. The rejected response
    is drawn from all that have a lower mean. The draw depends on `seed` and on the row's place
    among `rows` alone. Nothing is drawn for a prompt whose responses all have the same mean; how
    many responses these are is in `Rows.left_out`, and is logged.

    Responses that a limit cut are not left out. Their ids have no EOS at their end, and
    ``chosen_finished`` and ``rejected_finished`` say which they are.

    Args:
        rows: as `rollouts` gives them, or with ``prompt`` and ``responses``, each of which has
            ``text`` and ``ratings``, numbers by name, and may have ``finished``. They are not
            changed.
        ratings: the names of the ratings to take the mean of, or one name; by default all.
        seed: of the draws.

    Returns:
        A list of rows with ``prompt, chosen, rejected`` in TRL's format (lists of messages if the
        prompt is a chat), ``chosen_reward, rejected_reward``, the means of their ratings,
        ``chosen_finished, rejected_finished``, and ``prompt_ids, chosen_ids, rejected_ids`` where
        there are ids.

    Raises:
        ValueError: a response lacks a rating, or has others than the first response.
        TypeError: a row is of another form; a rating is not a number.

    Source: Cui et al., arXiv:2310.01377; Lee et al., arXiv:2402.11253, section 4.1.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; it must be an int")
    names = [ratings] if isinstance(ratings, str) else ratings if ratings is None else [*ratings]
    if names is not None and not names:
        raise ValueError("ratings is empty; it must have at least one name, or be None for all")
    found: list[dict[str, Any]] = []
    count, left_out = 0, Counter(failed=0, equal=0, spare=0)
    for i, row in enumerate(rows):
        with_ids = _check_row(row, f"row {i} of rows")
        rated = []
        for k, response in enumerate(row["responses"]):
            place = f"responses[{k}] of row {i} of rows"
            _check_response(response, place, with_ids)
            given = response["ratings" if "ratings" in response else "rewards"]
            names = names or list(given)
            rated.append((_mean(given, names, ratings is None, place), response))
        count += len(rated)
        there = [(mean, r) for mean, r in rated if not with_ids or r["ids"]]
        left_out["failed"] += len(rated) - len(there)
        best = max(there, key=lambda x: (x[0], _length(x[1], with_ids)), default=None)
        worse = [(mean, r) for mean, r in there if best is not None and mean < best[0]]
        if best is None or not worse:
            left_out["equal"] += len(there)
            continue
        left_out["spare"] += len(there) - 2
        # a text as seed makes the same numbers in all versions of Python
        drawn = worse[int(random.Random(f"{seed} {i}").random() * len(worse))]
        found.append(_pair(row, best, drawn, with_ids))
    made = Rows(found, count, left_out)
    if left_out["failed"] or left_out["equal"]:
        logger.warning("rated pairs: %s", made.summary())
    return made


def _pair(
    row: Mapping[str, Any],
    best: tuple[float, Mapping[str, Any]],
    drawn: tuple[float, Mapping[str, Any]],
    with_ids: bool,
) -> dict[str, Any]:
    sides = {"chosen": best, "rejected": drawn}
    pair = {"prompt": row["prompt"]}
    pair |= {side: message(row["prompt"], r["text"]) for side, (_, r) in sides.items()}
    if with_ids:
        pair["prompt_ids"] = list(row["prompt_ids"])
        pair |= {f"{side}_ids": list(r["ids"]) for side, (_, r) in sides.items()}
    pair |= {f"{side}_reward": mean for side, (mean, _) in sides.items()}
    return pair | {f"{side}_finished": r.get("finished", True) for side, (_, r) in sides.items()}


def _check_row(row: Any, name: str) -> bool:
    """Check a row but for its responses; whether it has ids."""
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{name} is {row!r:.80}; it must be a mapping, as rollouts gives, or "
            f'{{"prompt": "...", "responses": [{FORM}, ...]}}'
        )
    check_keys(row, name, {"prompt": (str, list), "responses": (list,)})
    if "prompt_ids" in row:
        check_keys(row, name, {"prompt_ids": (list,)})
    return "prompt_ids" in row


def _check_response(response: Any, name: str, with_ids: bool) -> None:
    if not isinstance(response, Mapping):
        raise TypeError(f"{name} is {response!r:.80}; it must be a mapping, as {FORM}")
    check_keys(response, name, {"text": (str,)})
    if response.keys().isdisjoint(("ratings", "rewards")):
        other = next((key for key in MEANT if key in response), None)
        own = response.get(other)
        shown = own if isinstance(own, Mapping) else {other: own}
        says = "" if other is None else f'; did you mean "ratings": {shown!r:.80}?'
        raise TypeError(
            f"ratings of {name} is missing; it must be a dict of numbers by name, as {FORM}{says}"
        )
    given = "rewards" if "rewards" in response and "ratings" not in response else "ratings"
    check_keys(response, name, {given: (dict,), **({"ids": (list,)} if with_ids else {})})
    if "finished" in response or with_ids:
        check_keys(response, name, {"finished": (bool,)})


def _mean(given: Mapping[str, Any], names: Sequence[str], all_of_them: bool, place: str) -> float:
    if not names:
        raise ValueError(f"ratings of {place} is empty; it must have one at least")
    for name in names:
        if name not in given:
            raise ValueError(f"{place} has no rating {name!r}; it has {sorted(given)}")
    if all_of_them and len(given) != len(names):
        raise ValueError(
            f"{place} has the ratings {sorted(given)}; it must have {sorted(names)}, as the first "
            "response, or ratings must name those to compare by"
        )
    values = [check_number(f"rating {name!r} of {place}", given[name]) for name in names]
    return math.fsum(values) / len(values)  # whatever the order of the names


def _length(response: Mapping[str, Any], with_ids: bool) -> int:
    return len(response["ids"] if with_ids else response["text"])
