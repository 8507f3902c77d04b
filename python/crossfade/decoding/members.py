"""The models of a call: of its blend, of what that is compared with, and of what guesses tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..blends.blend import Blend, Model, ValueHead, as_blend
from ..blends.vocabulary import check_vocabularies

Member = Model | ValueHead


@dataclass(frozen=True)
class Reference:
    """A blend from which the decoded one's divergence is measured at every step.

    Attributes:
        output: the field of `Output` that gets the divergence.
        places: the places of its terms, then of its values, among the members of the call.
    """

    output: str
    blend: Blend
    places: tuple[int, ...]


class Members:
    """The models of a call: of the blend's terms, its values, its references, and of its draft.

    Each is there once: a reference adds only models that the blend does not run already.

    Attributes:
        all: the members, in this order.
        names: of the members.
        draft: the places of the members of what guesses tokens.
        judges: how many members do more than guess. They are the first ones.
        vocabulary: how many tokens all of them share. References count, as they read what is
            written.
        tokenizer: of the members that have none.

    Args:
        vocabulary: how many tokens the blend's own members share.
        tokenizer: for the members that have none.
        references: the blends to compare with, by the fields of `Output` that they fill.
        draft: the blend that guesses tokens; None if there is none.

    Raises:
        ValueError: the vocabulary of a reference or of the draft differs from the blend's.
    """

    def __init__(
        self,
        blend: Blend,
        vocabulary: int,
        tokenizer: Any,
        references: Mapping[str, Blend] | None = None,
        draft: Blend | None = None,
    ) -> None:
        self.all: list[Member] = [*blend.terms, *blend.values]
        self.names: list[str] = [*blend.names, *blend.value_names]
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.references: list[Reference] = []
        for output, reference in (references or {}).items():
            places = self._places(blend, reference, "kl_to")
            self.references.append(Reference(output, reference, places))
        self.judges, decided = len(self.all), self.vocabulary
        self.draft = () if draft is None else self._places(blend, draft, "draft")
        if self.vocabulary < decided:
            raise ValueError(
                f"draft has {self.vocabulary:,} tokens and the blend {decided:,}; what guesses "
                "must know all tokens that may be drawn"
            )

    def _places(self, blend: Blend, other: Blend, argument: str) -> tuple[int, ...]:
        """The places of another blend's members, which are added if need be."""
        places = []
        members: list[Member] = [*other.terms, *other.values]
        for member, name in zip(members, (*other.names, *other.value_names), strict=True):
            try:
                self.vocabulary = min(self.vocabulary, self._common(blend, member))
            except ValueError as error:
                raise ValueError(f"{argument}: {error}") from None
            places.append(self._place(member, f"{argument}.{name}"))
        return tuple(places)

    def _place(self, member: Member, name: str) -> int:
        """The place of a member among those of the call, to which it is added if need be."""
        known = [self._complete(m) for m in self.all]
        if (wanted := self._complete(member)) in known:
            return known.index(wanted)
        self.all.append(member)
        self.names.append(name)
        return len(known)

    def _complete(self, member: Member) -> Member:
        """A member with its tokenizer, or with the call's where it has none."""
        if member.tokenizer is not None:
            return member
        return replace(member, tokenizer=self.tokenizer)

    def _common(self, blend: Blend, member: Member) -> int:
        """How many tokens a member of a reference shares with the blend's first term."""
        terms, values = ((member,), ()) if isinstance(member, Model) else ((), (member,))
        pair = Blend(
            (blend.terms[0], *terms), (1.0,) * (1 + len(terms)), values, (1.0,) * len(values)
        )
        return check_vocabularies(pair, self.tokenizer)


def tokenizer_of(blend: Blend, given: Any = None) -> Any:
    """The tokenizer given, or the first that a term or value has; None if there is none."""
    members: tuple[Any, ...] = (*blend.terms, *blend.values)
    return next((t for t in (given, *(m.tokenizer for m in members)) if t is not None), None)


def references_of(blend: Blend, kl_to: Any, to_base: bool = False) -> dict[str, Blend]:
    """What a call's blend is compared with, by the fields of `Output`."""
    found = {} if kl_to is None else {"kl": as_blend(kl_to, "kl_to")}
    if to_base:
        found["kl_to_base"] = Blend(blend.terms[:1], (1.0,))
    return found
