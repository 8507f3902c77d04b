"""Puts the models of a call into groups that share forwards."""

from __future__ import annotations

from collections.abc import Sequence

from ..simple.term_model import TermModel
from . import contract
from .drafting import Drafting, Guessers
from .group import Group
from .lanes import Lanes
from .modules import Unsupported
from .options import Engine


class Grouping:
    """Makes groups, and checks that the engine can run their models.

    Attributes:
        notes: what cannot share a forward, or cannot guess, and why.

    Args:
        members: the models of the call, then its value heads.
        longest: of each, the tokens of the longest prompt that it reads, as far as it is known.
        slots, limit, engine: as of `EngineRunner`.
        models: how many of the members are models.
    """

    def __init__(
        self,
        members: Sequence[TermModel],
        longest: Sequence[int],
        slots: int,
        limit: int,
        engine: Engine,
        models: int,
    ) -> None:
        self.members, self.longest = members, longest
        self.slots, self.limit, self.engine, self.models = slots, limit, engine, models
        self.notes: list[str] = []

    def groups(self, lanes: Lanes, places: Sequence[int] | None = None) -> list[Group]:
        """The groups of models that share forwards.

        Args:
            places: of the models of `lanes`, among the members; None: they are the first ones.
        """
        engine, found = self.engine, []
        for shared, deltas in lanes.together() if engine.share_weights else lanes.apart():
            if places is not None:
                shared = shared.at(places)
            group = Group(
                [self.members[k] for k in shared.places],
                shared.places,
                self.slots,
                longest=max(self.longest[k] for k in shared.places),
                limit=self.limit,
                deltas=deltas,
                own=shared.own,
                riders=shared.riders,
                kernels=engine.kernels,
                compile=engine.compile,
                tape=engine.tape,
            )
            contract.check(group, engine.kernels)
            found.append(group)
        self.notes += lanes.notes
        return found

    def drafting(self, groups: Sequence[Group], draft: Guessers) -> Drafting | None:
        """What guesses: a term's own group, if nothing else is in it; else groups beside `groups`.

        None if the engine cannot run it.
        """
        for group in groups:
            if draft.places == group.terms and group.own == 1 and not group.riders:
                return Drafting([group], draft.places, self.models, shared=True)
        models = [self.members[k] for k in draft.places]
        for k, model in zip(draft.places, models, strict=True):
            if model.context is not None and self.longest[k] > model.context:
                self.notes.append(
                    f"no draft: a prompt has {self.longest[k]} tokens for {model.name}, whose "
                    f"context is {model.context}"
                )
                return None
        backend = None if self.engine.kernels else "reference"
        try:
            own = self.groups(Lanes(models, (), backend), draft.places)
        except Unsupported as reason:
            self.notes.append(f"no draft: {reason}")
            return None
        return Drafting(own, draft.places, self.models)
