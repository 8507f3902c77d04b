"""The models of a call: those of its blend, and those of what the blend is compared with."""

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
    """The models of a call: of the blend's terms, then of its values, then of its references.

    Each is there once: a reference adds only models that the blend does not run already.

    Attributes:
        all: the members, in this order.
        names: of the members.
        vocabulary: how many tokens all of them share. References count, as they read what is
            written.
        tokenizer: of the members that have none.

    Args:
        vocabulary: how many tokens the blend's own members share.
        tokenizer: for the members that have none.
        references: the blends to compare with, by the fields of `Output` that they fill.

    Raises:
        ValueError: the vocabulary of a reference differs from the blend's.
    """

    def __init__(
        self,
        blend: Blend,
        vocabulary: int,
        tokenizer: Any,
        references: Mapping[str, Blend] | None = None,
    ) -> None:
        self.all: list[Member] = [*blend.terms, *blend.values]
        self.names: list[str] = [*blend.names, *blend.value_names]
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer
        self.references: list[Reference] = []
        for output, reference in (references or {}).items():
            places = []
            members: list[Member] = [*reference.terms, *reference.values]
            names = (*reference.names, *reference.value_names)
            for member, name in zip(members, names, strict=True):
                self.vocabulary = min(self.vocabulary, self._common(blend, member))
                places.append(self._place(member, f"kl_to.{name}"))
            self.references.append(Reference(output, reference, tuple(places)))

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
