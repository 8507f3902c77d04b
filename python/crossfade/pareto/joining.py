"""Several weightings of a method as one blend, whose requests each have weights of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blends.algebra import Algebra
from ..blends.blend import Blend, Model, as_blend
from ..blends.values import ValueSum
from ..blends.weights import Weight
from ..decoding.inputs import Requests, term_prompts
from ..search import Recipe, Search, check_search

FORMS = (
    "it must give a Model, a Blend, a Recipe, the arguments of generate as a dict with a 'blend', "
    "or a function of prompts that writes the texts"
)


@dataclass(frozen=True)
class Asked:
    """What a method gives for one weighting, or for several that go in one call.

    Attributes:
        blend: what is decoded; None where `writer` writes the texts.
        search: how it is searched, if at all.
        options: arguments of `generate` that this one has of its own.
        writer: a function ``(prompts, seed=, **generation)`` that gives an `Output` or texts.
    """

    blend: Blend | None
    search: Search | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    writer: Callable[..., Any] | None = None


def asked(made: Any) -> Asked:
    """What a method gave, in one form.

    Raises:
        TypeError, ValueError: it is none of the forms that there are.
    """
    if isinstance(made, Recipe):
        return Asked(made.blend, made.search)
    if isinstance(made, (Algebra, nn.Module)):
        return Asked(as_blend(made))
    if isinstance(made, Mapping):
        options = dict(made)
        if "blend" not in options:
            raise ValueError(f"it gives a dict with the keys {sorted(options)!r:.80}; {FORMS}")
        if "seed" in options:
            raise ValueError("it gives a seed; the seed is an argument of the sweep")
        own = asked(options.pop("blend"))
        if own.blend is None:
            raise TypeError(f"it gives a dict whose 'blend' is a function; {FORMS}")
        search = options.pop("search", None)
        if search is not None:
            check_search(search)
            if own.search is not None:
                raise ValueError("it gives a Recipe and a search, which is one too many")
        return Asked(own.blend, own.search or search, options)
    if callable(made) and not isinstance(made, type):
        return Asked(None, writer=made)
    raise TypeError(f"it gives a {type(made).__name__}; {FORMS}")


def joined(parts: Sequence[Asked], prompts: Sequence[Any]) -> Asked | None:
    """One call for several weightings, or None where they have to be apart.

    Its requests are the prompts once for each of `parts`, in their order. Every request is decoded
    as by its own part: the same models, with weights, mixes of adapters, prompts and weights of
    values that are tensors ``[requests]`` where parts differ. Parts that would run models which
    not all of them need stay apart, but for those that leave out models of another's.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    blends = [part.blend for part in parts if part.blend is not None]
    if len(blends) < len(parts) or not all(_same(first.options, p.options) for p in parts):
        return None
    search = _search([part.search for part in parts], len(prompts))
    blend = _blend(blends, prompts)
    return None if search is None or blend is None else Asked(blend, search[0], first.options)


def _same(a: Any, b: Any) -> bool:
    """Whether two values are surely the same: one object, or equal plain data."""
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b


def _columns(each: Sequence[Weight], n: int) -> Weight:
    """The weight of a term in all parts: a number, or ``[parts * n]``."""
    if all(not isinstance(w, Tensor) and w == each[0] for w in each):
        return each[0]
    rows = [w if isinstance(w, (Tensor, tuple)) else (w,) * n for w in each]
    return torch.cat([torch.as_tensor(w, dtype=torch.float32, device="cpu") for w in rows])


def _aligned(keys: Sequence[Sequence[Any]]) -> list[list[int | None]] | None:
    """The place that each key of the longest list has in every list, or None.

    All lists must be parts of that one.
    """
    longest = max(keys, key=len)
    if any(len(set(own)) < len(own) or not set(own) <= set(longest) for own in keys):
        return None
    return [[own.index(k) if k in own else None for own in keys] for k in longest]


def _blend(blends: Sequence[Blend], prompts: Sequence[Any]) -> Blend | None:
    if len({blend.power for blend in blends}) > 1 or any(b.parts or b.classifiers for b in blends):
        return None
    whole = [[_whole_key(t) for t in blend.terms] for blend in blends]
    loose = [[_key(t) for t in blend.terms] for blend in blends]
    same_first = all(own[:1] == whole[0][:1] for own in whole)
    places = _aligned(whole) if same_first else None
    if places is None:  # perhaps they differ in prompts alone
        if any(own != loose[0] for own in loose):
            return None
        places = [[i] * len(blends) for i in range(len(loose[0]))]
    supports: list[Any] = []
    for blend in blends:
        s = blend.support
        at = [k for k, place in enumerate(places) if s and place[len(supports)] == s.term]
        supports.append(s and replace(s, term=at[0]))
    values = _aligned([[(id(v.model), id(v.tokenizer)) for v in blend.values] for blend in blends])
    if values is None or any(s != supports[0] for s in supports):
        return None
    terms, n = [], len(prompts)
    for place in places:
        of = [None if i is None else b.terms[i] for b, i in zip(blends, place, strict=True)]
        term = _term(of, prompts)
        if term is None:
            return None
        terms.append(term)
    longest = max(blends, key=lambda blend: len(blend.values))
    return Blend(
        tuple(terms),
        tuple(_weights([b.weights for b in blends], place, n) for place in places),
        longest.values,
        tuple(_weights([b.value_weights for b in blends], place, n) for place in values),
        blends[0].power,
        supports[0],
    )


def _weights(each: Sequence[Sequence[Weight]], place: Sequence[int | None], n: int) -> Weight:
    return _columns([0.0 if i is None else w[i] for w, i in zip(each, place, strict=True)], n)


def _key(term: Model) -> tuple[Any, ...]:
    """What two terms must have in common to be one with weights and prompts a request."""
    adapter = (term.adapter,) if _mix(term) is None else "a mix"
    return id(term.model), id(term.tokenizer), adapter


def _mix(term: Model) -> dict[str, Any] | None:
    """The weights of the adapters that a term mixes, by name: numbers, or one a request."""
    mix: Any = term.adapter
    if isinstance(mix, Mapping):
        return dict(mix)
    names = getattr(mix, "names", None)
    return None if names is None else dict(zip(names, mix.weights, strict=True))


def _whole_key(term: Model) -> tuple[Any, ...]:
    prompt = term.prompt if isinstance(term.prompt, str) else id(term.prompt)
    return *_key(term), term.system, prompt


def _term(each: Sequence[Model | None], prompts: Sequence[Any]) -> Model | None:
    """One term in place of those that the parts have, None in parts that do not have it."""
    there = [term for term in each if term is not None]
    first = there[0]
    changed: dict[str, Any] = {}
    if _mix(first) is not None:
        mixes = [{} if term is None else _mix(term) or {} for term in each]
        names = dict.fromkeys(name for own in mixes for name in own)
        changed["adapter"] = {
            name: _columns([own.get(name, 0.0) for own in mixes], len(prompts)) for name in names
        }
    if any(_whole_key(term) != _whole_key(first) for term in there):
        if first.tokenizer is None or len(there) < len(each):
            return None
        changed |= {"system": None, "prompt": [x for t in there for x in _own_prompts(t, prompts)]}
    elif isinstance(first.prompt, (list, tuple)):
        changed["prompt"] = [*first.prompt] * len(each)
    return replace(first, **changed) if changed else first


def _own_prompts(term: Model, prompts: Sequence[Any]) -> list[Any]:
    """What a term reads of each prompt, its system prompt in it."""
    read = term_prompts(
        Requests(list(prompts)),
        term=str(term),
        tokenizer=term.tokenizer,
        system=term.system,
        prompt=term.prompt,
    )
    assert read.items is not None
    return list(read.items)


def _search(each: Sequence[Search | None], n: int) -> tuple[Search | None] | None:
    """The search of all parts, in a tuple, or None if they differ in more than weights."""
    first: Any = each[0]
    if any(type(search) is not type(first) for search in each):
        return None
    if first is None:
        return (None,)
    changed: dict[str, Any] = {}
    for f in fields(first):
        own = [getattr(search, f.name) for search in each]
        if all(isinstance(x, ValueSum) for x in own):
            places = _aligned([x.values for x in own])
            if places is None:
                return None
            longest = max(own, key=lambda x: len(x.values))
            weights = tuple(_weights([x.weights for x in own], place, n) for place in places)
            changed[f.name] = ValueSum(longest.values, weights)
        elif not all(_same(x, own[0]) for x in own):
            return None
    return (replace(first, **changed),)
