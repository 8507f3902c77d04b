"""Trainings that were watched: what their files say, and the order in which they learnt."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import reading

# Those that a report draws, and those that the order in which behaviours were learnt rests on.
FIGURES = ("loss", "accuracy", "chosen", "rejected", "argmax", "growth", "growth_error")


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of a `Watch` holds; the path is its own, or the `output_dir` of the training.

    Raises:
        ValueError: it is none. OSError: it is not there.
    """
    file = Path(path) / "watch.json" if Path(path).is_dir() else Path(path)
    return checked(reading.parse_json(reading.read_text(file), str(file)), repr(str(file)))


def checked(watch: Any, name: str) -> dict[str, Any]:
    """The parts of a watch that a report shows, with None for each figure that is no finite number.

    Args:
        watch: a `Watch`, or what its file holds.
        name: what errors call it.

    Raises:
        ValueError: it is no such thing.
    """
    found: Any = watch if isinstance(watch, Mapping) else getattr(watch, "record", None)
    try:
        history = [
            {
                "step": int(record["step"]),
                "behaviours": {
                    behaviour: {figure: _number(of.get(figure)) for figure in FIGURES}
                    for behaviour, of in record["behaviours"].items()
                },
            }
            for record in found["history"]
        ]
        warned = [
            {"step": int(w["step"]), "behaviour": w.get("behaviour"), "text": str(w["text"])}
            for w in found["warnings"]
        ]
        if not history:
            raise ValueError
        return {
            "every": found.get("every"),
            "beta": _number(found.get("beta")),
            "kind": found.get("kind"),
            "head": found.get("head"),
            "behaviours": {name: int(n) for name, n in found["behaviours"].items()},
            "history": sorted(history, key=lambda record: record["step"]),
            "warnings": warned,
            "notes": [str(note) for note in found.get("notes", ())],
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"{name} is not a watch of a training with at least one step; dynamics.Watch saves one"
        ) from None


def points(watch: Mapping[str, Any], behaviour: str, figure: str) -> list[tuple[int, float]]:
    """The steps at which a figure of a behaviour is known, and what it was."""
    each = (
        (record["step"], record["behaviours"].get(behaviour, {}).get(figure))
        for record in watch["history"]
    )
    return [(step, x) for step, x in each if x is not None]


def fall(watch: Mapping[str, Any], behaviour: str) -> float | None:
    """How far the loss of a behaviour lay below its start, on average over the steps of a run.

    It is larger for what is learnt sooner; None where the loss is known at one step at most.
    """
    known = points(watch, behaviour, "loss")
    if len(known) < 2 or known[0][0] == known[-1][0]:
        return None
    area = math.fsum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(known))
    return known[0][1] - area / (known[-1][0] - known[0][0])


def growth(watch: Mapping[str, Any], behaviour: str) -> tuple[float, float] | None:
    """By how much the margin of a behaviour had grown at the last step, and the reach of its 95 %.

    None where one of both is unknown there, as it is of one pair alone.
    """
    last = watch["history"][-1]["behaviours"].get(behaviour, {})
    mean, error = last.get("growth"), last.get("growth_error")
    return None if mean is None or error is None else (mean, error)


def _number(x: Any) -> float | None:
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not math.isfinite(x):
        return None
    return float(x)
