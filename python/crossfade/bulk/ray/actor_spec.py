"""What actors are told: which models they load, and what they do. It is plain data, no objects."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ... import models
from ...checks import did_you_mean
from ...decoding.settings import check_int
from ...drafts import AUTO, PROMPT
from ...loading import Plan
from ...models import sources

TASKS = ("generate", "score", "value", "correct", "judge")
PATHS = ("model", "blend", "template")  # fields that may name files


@dataclass(frozen=True)
class Spec:
    """What an actor is told. The fields have the names of the command line's options.

    Attributes:
        task: what is done with each row, one of `TASKS`.
        model: each ``NAME=PATH`` or ``NAME=PATH@GUIDE``, or one ``PATH``.
        blend: a formula, or the file of a saved blend; None: the only model.
        system: each ``NAME=TEXT``.
        fader: each ``NAME=NUMBER``.
        value: a formula: what a search prefers, or what the task "value" gives.
        reward: each ``MODULE:FUNCTION`` or ``NAME=MODULE:FUNCTION``; see `functions`.
        judge: a formula: who decides a tournament.
        tilt: a formula: of a search.
        accept: a formula: the value that a correction must raise.
        draft: what guesses tokens: "prompt", or a formula.
        draft_length: tokens that are guessed at a time, or "auto".
        device: where models run; None: a GPU if there is one, else the CPU.
        dtype: of the models, by name; "auto" is what they were saved in.
        generation: the fields of a generation config that all rows share.
        search: the settings of a search by name, such as ``{"best_of": 8}``.
        n: texts of each prompt, as a list; None: one, without a list.
        logprobs, terms, chat: as of the command line.
        template, principle: what a judge is asked.
        objectives: what answers are corrected toward: names, or descriptions by name.
        query_noun: what the aligner's prompt calls the query.
        rounds: how often each answer is corrected.
        seed: what the seed of each row is made of, together with its id.
        batch_size: rows that are worked on at a time.
        id: the column that has the ids of rows, by which they are drawn.
        keep: keys that are carried from lines of files to results.
        functions: whether `reward` may name functions, whose modules actors then import.
        expects: the identity of the run that is gone on with; an actor of another one fails.
    """

    task: str = "generate"
    model: Sequence[str] = ()
    blend: str | None = None
    system: Sequence[str] = ()
    fader: Sequence[str] = ()
    value: str | None = None
    reward: Sequence[str] = ()
    judge: str | None = None
    tilt: str | None = None
    accept: str | None = None
    draft: str | None = None
    draft_length: int | str = AUTO
    device: str | None = None
    dtype: str = "auto"
    generation: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    n: int | None = None
    logprobs: bool = False
    terms: bool = False
    chat: bool | None = None
    template: str | None = None
    principle: Sequence[str] = ()
    objectives: Sequence[str] | Mapping[str, str] = ()
    query_noun: str = "context"
    rounds: int = 1
    seed: int = 0
    batch_size: int = 8
    id: str = "id"
    keep: Sequence[str] = ()
    functions: bool = False
    expects: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Spec:
        """The spec that plain data means, checked.

        Raises:
            TypeError: a field is unknown, or is no plain data. ValueError: one has another value
                than it must have.
        """
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                meant = did_you_mean(name, known)
                raise TypeError(f"spec has the unknown field {name!r}{meant}")
        try:
            json.dumps(given, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"spec is no plain data ({error}); it must be made of texts, numbers, lists and "
                "mappings: actors load models by their paths"
            ) from None
        found = cls(**given)
        for name in ("model", "system", "fader", "reward", "principle", "keep"):
            x = getattr(found, name)
            if isinstance(x, str) or not all(isinstance(text, str) for text in x):
                raise TypeError(f"{name} is {x!r:.80}; it must be a list of texts")
        if found.task not in TASKS:
            known = list(TASKS)
            meant = did_you_mean(found.task, known)
            raise ValueError(f"task is {found.task!r}; it must be among {', '.join(known)}{meant}")
        for name, least in (("batch_size", 1), ("rounds", 1), ("seed", 0), ("n", 1)):
            check_int(name, getattr(found, name), least)
        if found.reward and not found.functions:
            raise ValueError(
                f"reward is {list(found.reward)}, and functions is False; actors import the "
                "modules of functions, which functions=True must allow"
            )
        if found.task == "correct" and not found.objectives:
            raise ValueError('objectives is empty; the task "correct" must have one at least')
        return found

    def plan(self) -> Plan:
        """The models, checked but not loaded.

        Raises:
            ValueError, OSError: as of `Plan.read` and `Plan.check`.
        """
        plan = Plan.read(
            self.model,
            self.blend,
            system=self.system,
            fader=self.fader,
            value=self.value,
            reward=self.reward,
            judge=self.judge,
            tilt=self.tilt,
            accept=self.accept,
            draft=None if self.draft == PROMPT else self.draft,
        )
        if self.task == "value" and plan.value is None:
            raise ValueError('value is None; the task "value" must have the formula of one')
        return plan


def spec(**given: Any) -> dict[str, Any]:
    """What `Decoder` is told, checked where it is made: ``fn_constructor_kwargs=spec(...)``.

    Args:
        given: the fields of `Spec`. One of ``model`` or ``blend`` must be there.

    Raises:
        TypeError, ValueError: names the field, what it was and what it must be. OSError: a model is
            not there. Paths are looked up here, and again by each actor on its own machine.
    """
    found = Spec.of(given)
    plan = found.plan()
    moved = plan.free - plan.faders.keys()  # Rows bring the positions of these.
    if not moved or found.task in ("correct", "judge"):
        plan.check()
    for path in dict.fromkeys(term.path for term in plan.specs.values()):
        source = sources.named(path)
        if source is None or "folder" in source:
            models.folder_of(path)  # says what is wrong with it
    return {**given, **{name: _absolute(given[name]) for name in PATHS if given.get(name)}}


def _absolute(x: Any) -> Any:
    """The paths that are there, from wherever an actor works."""
    if isinstance(x, str):
        return os.path.abspath(x) if os.path.exists(x) else x
    found = []
    for text in x:
        term, equals, path = text.rpartition("=")
        at = path.partition("@")
        each = [os.path.abspath(p) if p and os.path.exists(p) else p for p in (at[0], at[2])]
        found.append(f"{term}{equals}{at[1].join(each)}")
    return found
