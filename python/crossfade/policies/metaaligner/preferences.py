"""Pairs of answers, with a preference by each objective, from the rows that users have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ... import reading
from ...checks import check_number, did_you_mean
from ...training.encoding import content_of
from .template import query_text

SIDES = (("first", "second"), ("chosen", "rejected"))
SIGNS = {"better": 1, "worse": -1, "equal": 0}


class Answer(NamedTuple):
    """An answer to a prompt; it is not finished if a limit cut it."""

    text: str
    finished: bool


class Pair(NamedTuple):
    """Two answers to a prompt.

    Attributes:
        signs: by the name of each objective that compares the answers, 1 if the first is better, -1
            if it is worse, 0 if they are equal.
    """

    prompt: Any
    first: Answer
    second: Answer
    signs: dict[str, int]


class Reader:
    """Reads pairs from rows.

    Args:
        objectives: what to compare by.
        only: whether preferences and rewards by other names are left out. If not, they are refused.
        margins: by objective, how much two rewards may differ and still be equal.
    """

    def __init__(
        self, objectives: Mapping[str, str], only: bool, margins: Mapping[str, float]
    ) -> None:
        self.objectives, self.only, self.margins = objectives, only, margins

    def pairs(self, row: Any, name: str) -> list[Pair]:
        """The pairs of a row, which errors call `name`.

        Raises:
            TypeError, ValueError: names the row, the key, what it was and what it must be.
        """
        if not isinstance(row, Mapping):
            raise TypeError(f"{name} is a {type(row).__name__}; it must be a mapping")
        if row.get("prompt") is None:
            raise ValueError(f"{name} has no prompt{_meant(row, 'prompt')}")
        reading.check_unicode(query_text(row["prompt"], f"prompt of {name}"), f"prompt of {name}")
        if row.get("responses") is not None:
            return list(self._of_responses(row, name))
        return [self._of_two(row, name)]

    # ---- rows with two answers

    def _of_two(self, row: Mapping[str, Any], name: str) -> Pair:
        sides = next((s for s in SIDES if any(row.get(x) is not None for x in s)), SIDES[0])
        for key in sides:
            if row.get(key) is None:
                raise ValueError(
                    f"{name} has no {key}; it must have first and second, chosen and rejected, or "
                    f"responses{_meant(row, *SIDES[0], *SIDES[1], 'responses')}"
                )
        first, second = (
            _answer(content_of(row[x], f"{x} of {name}"), row.get(f"{x}_finished"), x, name)
            for x in sides
        )
        wanted = f"it must be 'better', 'worse' or 'equal', as {sides[0]} is beside {sides[1]}"
        given = row.get("preferences")
        if given is None:
            raise ValueError(
                f"{name} has no preferences; it must have a mapping of objectives to 'better', "
                f"'worse' or 'equal'{_meant(row, 'preferences')}"
            )
        signs = {}
        for objective, preference in self._mapping(given, f"preferences of {name}").items():
            if preference is None:  # a table has None where a row has no value
                continue
            if not isinstance(preference, str) or preference not in SIGNS:
                raise ValueError(
                    f"preferences[{objective!r}] of {name} is {preference!r:.80}; {wanted}"
                )
            signs[objective] = SIGNS[preference]
        return Pair(row["prompt"], first, second, signs)

    # ---- rows with any number of responses

    def _of_responses(self, row: Mapping[str, Any], name: str) -> Iterator[Pair]:
        responses = row["responses"]
        if not isinstance(responses, (list, tuple)):
            raise TypeError(f"responses of {name} is {responses!r:.80}; it must be a list")
        found = []
        for k, response in enumerate(responses):
            place = f"responses[{k}] of {name}"
            if not isinstance(response, Mapping):
                raise TypeError(f"{place} is {response!r:.80}; it must be a mapping")
            key = "ratings" if response.get("ratings") is not None else "rewards"
            answer = _answer(response.get("text"), response.get("finished"), "text", place)
            found.append((answer, self._rewards(response.get(key), f"{key} of {place}")))
        for (first, a), (second, b) in itertools.combinations(found, 2):
            both = [x for x in a if x in b]
            yield Pair(row["prompt"], first, second, {x: self._sign(x, a[x] - b[x]) for x in both})

    def _rewards(self, given: Any, name: str) -> dict[str, float]:
        rewards = self._mapping(given, name)
        for objective in self.objectives if self.only else ():
            if objective not in rewards:
                raise ValueError(
                    f"{name} has no {objective!r}, which is among the objectives; it has "
                    f"{', '.join(map(str, given)) or 'none'}"
                    f"{did_you_mean(objective, map(str, given))}"
                )
        return {x: check_number(f"{name}: {x!r}", reward) for x, reward in rewards.items()}

    def _sign(self, objective: str, difference: float) -> int:
        if abs(difference) <= self.margins[objective]:
            return 0
        return 1 if difference > 0 else -1

    def _mapping(self, given: Any, name: str) -> dict[str, Any]:
        """What is given for the objectives. Raises an error that calls it `name`."""
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{name} is {given!r:.80}; it must be a mapping with objectives as keys"
            )
        for objective in () if self.only else given:
            if objective not in self.objectives:
                raise ValueError(
                    f"{name} has {objective!r:.80}, which is no objective of the registry; name "
                    "those to compare by, such as objectives={name: description}: others are then "
                    f"left out{did_you_mean(objective, self.objectives)}"
                )
        return {x: y for x, y in given.items() if x in self.objectives}


def _answer(text: Any, finished: Any, key: str, name: str) -> Answer:
    if not isinstance(text, str):
        raise TypeError(f"{key} of {name} is {text!r:.80}; it must be a text")
    reading.check_unicode(text, f"{key} of {name}")
    if finished is not None and not isinstance(finished, bool):
        flag = "finished" if key == "text" else f"{key}_finished"
        raise TypeError(f"{flag} of {name} is {finished!r:.80}; it must be a bool")
    return Answer(text, finished is not False)


def _meant(row: Mapping[str, Any], *wanted: str) -> str:
    """What was probably meant by a key of a row that nothing reads."""
    return next(
        (says for key in row if key not in KEYS and (says := did_you_mean(key, wanted))), ""
    )


KEYS = {"prompt", "prompt_ids", "responses", "preferences", *itertools.chain(*SIDES)}
