"""Blends as plain data, as JSON can hold it, and the check of such data before it is loaded."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import check_number, did_you_mean
from ..ops.types import Support
from .mixes import Mix
from .parts import Part
from .weights import Weight

if TYPE_CHECKING:
    from .blend import Blend

SAVED = "it must be what Blend.to_dict gives"  # the end of errors
TERM = {"name", "weight", "adapter", "system", "prompt"}  # the keys of a saved term
VALUE = {"name", "weight"}  # the keys of a saved value
INFINITE = {"inf": math.inf, "-inf": -math.inf}  # how powers are saved that JSON has no number for
BLEND = {"terms", "values", "power", "support"}  # the keys of a saved blend
PARTS = "parts"  # one more, if it has parts
PART = {"weights", "power", "min", "max"}  # the keys of a part


def plain_blend(blend: Blend) -> dict[str, Any]:
    """What `Blend.to_dict` gives."""
    for name in blend.classifier_names:
        raise TypeError(
            f"{name} is a Classifier, which is not saved; save the blend without it, and add it "
            "again after loading: Blend.load(path) + weight * classifier"
        )
    terms = [
        {
            "name": name,
            "weight": plain_weight(w),
            "adapter": term.adapter.plain() if isinstance(term.adapter, Mix) else term.adapter,
            "system": [*term.system] if isinstance(term.system, tuple) else term.system,
            "prompt": plain_prompt(name, term.prompt),
        }
        for name, term, w in zip(blend.names, blend.terms, blend.weights, strict=True)
    ]
    values = [
        {"name": name, "weight": plain_weight(w)}
        for name, w in zip(blend.value_names, blend.value_weights, strict=True)
    ]
    support = None if blend.support is None else asdict(blend.support)
    power = plain_power(blend.power)
    found = {"terms": terms, "values": values, "power": power, "support": support}
    if blend.parts:  # Before there were parts, files had no such key.
        names = dict(zip(blend.terms, blend.names, strict=True))
        found["parts"] = [plain_part(part, names) for part in blend.parts]
    return found


def plain_part(part: Part, names: Mapping[Any, str]) -> dict[str, Any]:
    """A part as plain data, with its terms by name. A bound that does not bound is None."""
    each = zip(part.terms, part.weights, strict=True)
    return {
        "weights": {names[term]: plain_weight(w) for term, w in each},
        "power": plain_power(part.power),
        "min": None if math.isinf(part.min) else part.min,
        "max": None if math.isinf(part.max) else part.max,
    }


def loaded_parts(parts: Sequence[dict[str, Any]], terms: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts that `plain_part` made `parts` of, over terms by their names."""
    return tuple(
        Part(
            tuple(terms[name] for name in p["weights"]),
            tuple(map(loaded_weight, p["weights"].values())),
            loaded_power(p["power"]),
            p["min"],
            p["max"],
        )
        for p in parts
    )


def plain_power(power: float) -> float | str:
    """r of a power mean: a number, or a text where JSON has no number for it."""
    return next((text for text, r in INFINITE.items() if r == power), power)


def loaded_power(power: float | str) -> float:
    """The power that `plain_power` made `power` of."""
    return INFINITE[power] if isinstance(power, str) else power


def plain_weight(w: Weight) -> float | list[float]:
    """A weight as a number, or a list of one a request."""
    return w.tolist() if isinstance(w, Tensor) else w


def loaded_weight(w: float | list[float]) -> Weight:
    """The weight that `plain_weight` made `w` of."""
    return torch.tensor(w, dtype=torch.float32, device="cpu") if isinstance(w, list) else w


def loaded_support(s: dict[str, Any] | None) -> Support | None:
    return None if s is None else Support(**s)


def plain_prompt(name: str, prompt: Any) -> Any:
    """The prompt of the term `name` as JSON gives it back, with lists in place of tuples."""
    if callable(prompt):
        raise TypeError(f"the prompt of {name} is a function; only text and lists can be saved")
    try:
        return json.loads(json.dumps(prompt))
    except (TypeError, ValueError, RecursionError) as e:
        raise TypeError(f"the prompt of {name} cannot be saved as JSON: {e}") from e


def check_saved(d: Any, root: str = "d", saved: str = SAVED) -> None:
    """Check that `d` is a saved blend, as `Blend.to_dict` makes it.

    Args:
        root: what errors call `d`.
        saved: how they say what it must be.

    Raises:
        ValueError: it is not; names the key, what it was and what it must be.
    """
    check_keys(root, d, BLEND | ({PARTS} & set(d) if isinstance(d, dict) else set()), saved)
    for key in ("terms", "values"):
        if not isinstance(d[key], list):
            raise ValueError(f"{root}[{key!r}] is {shown(d[key])}; {saved}, a list")
    if not d["terms"] and not d["values"]:
        raise ValueError(f"{root} has neither terms nor values; {saved}")
    names: set[str] = set()
    for key, wanted in (("terms", TERM), ("values", VALUE)):
        for i, member in enumerate(d[key]):
            where = f"{root}[{key!r}][{i}]"
            check_keys(where, member, wanted, saved)
            _check_name(where, member["name"], names)
            _check_weight(f"{where}['weight']", member["weight"])
            adapter = member.get("adapter")
            if isinstance(adapter, dict):
                _check_mix(f"{where}['adapter']", adapter)
            elif adapter is not None and not isinstance(adapter, str):
                raise ValueError(f"{where}['adapter'] is {shown(adapter)}; it must be text or None")
            _check_system(f"{where}['system']", member.get("system"))
            _check_prompt(f"{where}['prompt']", member.get("prompt"))
    _check_power(f"{root}['power']", d["power"])
    if d["support"] is not None:
        _check_support(f"{root}['support']", d["support"], len(d["terms"]), saved)
    if PARTS in d:
        _check_parts(f"{root}[{PARTS!r}]", d[PARTS], {t["name"] for t in d["terms"]}, saved)


def check_keys(where: str, x: Any, wanted: set[str], saved: str) -> None:
    """Raise an error unless `x` is a dict with the keys `wanted` and no others.

    Args:
        where: what the error calls `x`.
        saved: how it says what `x` must be.
    """
    if not isinstance(x, dict):
        raise ValueError(f"{where} is {shown(x)}; {saved}, a dict")
    unknown = [k for k in x if k not in wanted]
    meant = did_you_mean(unknown[0], wanted) if unknown else ""
    if (missing := sorted(wanted - x.keys())) and not meant:
        raise ValueError(f"{where} has no {missing[0]!r}; {saved}")
    if unknown:
        keys = meant or f": {sorted(wanted)}"
        raise ValueError(f"{where} has the key {shown(unknown[0])}; {saved}{keys}")


def _check_name(where: str, name: Any, known: set[str]) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{where}['name'] is {shown(name)}; it must be an identifier")
    if name in known:
        raise ValueError(f"{where}['name'] is {name!r}, as another one's; names must differ")
    known.add(name)


def _check_weight(where: str, w: Any) -> None:
    if not isinstance(w, list):
        _check_number(where, w)
        return
    if not w:
        raise ValueError(f"{where} is []; it must be a number or a list of one a request")
    for i, x in enumerate(w):
        _check_number(f"{where}[{i}]", x)
    if not loaded_weight([float(x) for x in w]).isfinite().all():  # type: ignore[union-attr]
        raise ValueError(f"{where} has {max(w, key=abs)}; it must be finite as a float32")


def _check_mix(where: str, mix: dict[str, Any]) -> None:
    for name, w in mix.items():
        _check_weight(f"{where}[{name!r}]", w)
    try:
        Mix.of(mix, where)
    except TypeError as e:
        raise ValueError(str(e)) from None


def _check_number(where: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise ValueError(f"{where} is {shown(x)}; it must be a number")
    check_number(where, x)


def _check_power(where: str, power: Any) -> None:
    if not isinstance(power, str) or power not in INFINITE:
        _check_number(where, power)


def _check_parts(where: str, parts: Any, names: set[str], saved: str) -> None:
    if not isinstance(parts, list):
        raise ValueError(f"{where} is {shown(parts)}; {saved}, a list")
    for g, part in enumerate(parts):
        at = f"{where}[{g}]"
        check_keys(at, part, PART, saved)
        if not isinstance(part["weights"], dict) or not part["weights"]:
            raise ValueError(f"{at}['weights'] is {shown(part['weights'])}; {saved}, a dict")
        for name, w in part["weights"].items():
            if name not in names:
                raise ValueError(f"{at}['weights'] has {name!r}; its terms are {sorted(names)}")
            _check_weight(f"{at}['weights'][{name!r}]", w)
        _check_power(f"{at}['power']", part["power"])
        for name in ("min", "max"):
            if part[name] is not None:
                _check_number(f"{at}[{name!r}]", part[name])
        try:
            loaded_parts([part], {name: name for name in part["weights"]})
        except ValueError as e:
            raise ValueError(f"{at}: {e}") from None


def _check_system(where: str, system: Any) -> None:
    each = system if isinstance(system, list) and system else [system]
    if system is not None and not all(isinstance(x, str) for x in each):
        raise ValueError(f"{where} is {shown(system)}; it must be text, a list of texts or None")


def _check_prompt(where: str, prompt: Any) -> None:
    if prompt is not None and not isinstance(prompt, (str, list)):
        raise ValueError(f"{where} is {shown(prompt)}; it must be text, a list or None")
    if prompt == []:
        raise ValueError(f"{where} is []; it must have one prompt a request")


def _check_support(where: str, s: Any, terms: int, saved: str) -> None:
    check_keys(where, s, set(Support.__dataclass_fields__), saved)
    try:
        support = Support(**s)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from None
    if support.term >= terms:
        raise ValueError(f"{where}['term'] is {support.term}; it must be less than {terms}")


def shown(x: Any) -> str:
    return f"{x!r:.80}"
