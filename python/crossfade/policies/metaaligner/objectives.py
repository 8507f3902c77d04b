"""Objectives, by name: what an answer should be, in words that an aligner reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import reading
from ...checks import did_you_mean

# Those of HH-RLHF and UltraFeedback come first, then those that rewards without a model measure.
OBJECTIVES: dict[str, str] = {
    "harmlessness": "The response should not insult, discriminate against or endanger anyone",
    "helpfulness": "The response should give the user advice and material that is of use",
    "humour": "The response should be funny and in good spirits",
    "instruction_following": "The response should do what the query asks, in the way it asks",
    "honesty": "The response should not claim what its author does not believe or know",
    "truthfulness": "The response should agree with the facts and leave out none that matter",
    "positivity": "The response should be warm and optimistic in tone",
    "brevity": "The response should say what it has to say in few words",
    "readability": "The response should have short sentences that are easy to read",
    "plain_words": "The response should use common words that everybody knows",
    "relevance": "The response should keep to the topic of the query",
    "diversity": "The response should vary its words and not repeat itself",
}
FORM = "it must be names, {name: description}, or a list of both"


def heading(name: str) -> str:
    """An objective's name as a prompt writes it: "plain_words" is "Plain words"."""
    spaced = name.replace("_", " ")
    return spaced[:1].upper() + spaced[1:]


def resolve(
    objectives: Any, known: Mapping[str, str] = OBJECTIVES, name: str = "objectives"
) -> dict[str, str]:
    """One set of objectives, as their descriptions by name, in the order given.

    Args:
        objectives: a name; a mapping of names to descriptions, which need not be known; or a list
            of names, in which such mappings may stand, too.
        known: the descriptions of names that stand alone.
        name: what errors call the set.

    Raises:
        TypeError, ValueError: there is no objective, one is unknown or there twice, or has no
            description; names it.
    """
    if isinstance(objectives, (str, Mapping)):
        objectives = [objectives]
    elif not isinstance(objectives, Sequence) or isinstance(objectives, (bytes, bytearray)):
        raise TypeError(f"{name} is {objectives!r:.80}; {FORM}")
    elif objectives and not any(isinstance(x, str) for x in objectives):
        raise TypeError(
            f"{name} is {objectives!r:.80}, a list without a name; it must be one set: a mapping "
            "{name: description, ...}, or a list with a name in it"
        )
    found: dict[str, str] = {}
    for item in objectives:
        if isinstance(item, Mapping):
            _add(found, item, name)
        elif isinstance(item, str):
            if item not in known:
                raise ValueError(
                    f"{name} has {item!r:.80}; known ones are {', '.join(known) or 'none'}: others "
                    f"are given with a description, as {{name: description}}"
                    f"{did_you_mean(item, known)}"
                )
            _add(found, {item: known[item]}, name)
        else:
            raise TypeError(f"{name} has {item!r:.80}; {FORM}")
    if not found:
        raise ValueError(f"{name} is empty; it must have one objective at least")
    return found


def resolve_each(
    objectives: Any, n: int, known: Mapping[str, str] = OBJECTIVES
) -> list[dict[str, str]]:
    """The set of objectives of each of n queries.

    A name, a mapping, and a list with a name in it are one set, which all queries have. A list
    without a name in it has a set for each query, each a mapping or a list: so ``["brevity",
    "humour"]`` are two objectives of all queries, and ``[["brevity"], ["humour"]]`` is one each of
    two queries.

    Raises:
        TypeError, ValueError: as `resolve`; or there is not one set for each query.
    """
    several = (
        isinstance(objectives, Sequence)
        and not isinstance(objectives, (str, bytes, bytearray))
        and len(objectives) > 0
        and not any(isinstance(x, str) for x in objectives)
    )
    if not several:
        return [resolve(objectives, known)] * n
    if len(objectives) != n:
        raise ValueError(
            f"objectives has {len(objectives)} sets; it must have {n}, one for each query, or be "
            "one set for all: a mapping {name: description, ...}, or a list with a name in it"
        )
    return [resolve(x, known, f"objectives[{i}]") for i, x in enumerate(objectives)]


def read_objectives(file: str | Path) -> dict[str, str]:
    """The objectives of a YAML or JSON file, which maps names to descriptions.

    ``{**OBJECTIVES, **read_objectives(file)}`` are all that are known: a name of the registry may
    get another description.

    Raises:
        ValueError: the file is neither YAML nor JSON, or has an entry that is no objective or is
            there twice; names the file and the entry. OSError: it cannot be read.
    """
    text = reading.read_text(file)
    if str(file).lower().endswith(".json"):
        entries = reading.parse_json(text, str(file), unique=True)
    else:
        entries = reading.parse_yaml(text, str(file))
    if not isinstance(entries, dict):
        raise ValueError(
            f"{file} holds a {type(entries).__name__}; it must map names to descriptions"
        )
    found: dict[str, str] = {}
    try:
        _add(found, entries, str(file))
    except TypeError as error:  # in a file, what has another type is a wrong value
        raise ValueError(str(error)) from None
    if not found:
        raise ValueError(f"{file} is empty; it must have one objective at least")
    return found


def _add(found: dict[str, str], entries: Mapping[Any, Any], where: str) -> None:
    """Add objectives to those found before, if they are some and none is there already."""
    for name, description in entries.items():
        _check_text(f"a name in {where}", name)
        _check_text(f"{where}[{name!r:.80}]", description)
        if any(heading(name).lower() == heading(other).lower() for other in found):
            raise ValueError(f"{where} has {name!r:.80} twice; each must be there once")
        found[name] = description


def _check_text(name: str, x: Any) -> None:
    if not isinstance(x, str):
        raise TypeError(f"{name} is {x!r:.80}; it must be a text")
    if not x.strip():
        raise ValueError(f"{name} is {x!r:.80}; it must not be empty")
    if x != x.strip():
        raise ValueError(f"{name} is {x!r:.80}; it must be without white space around it")
    reading.check_unicode(x, name)
