"""What blends and their terms print: formulas that `formula.parse` reads back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..ops.types import Support
from .weights import is_zero

if TYPE_CHECKING:
    from .blend import Blend
    from .parts import Part


def short(n: float) -> str:
    """A count with three digits and the prefix of a unit: ``135 M``, ``8.19 k``, ``7 ``."""
    for unit in ("", " k", " M", " G"):
        if n < 1000:
            return f"{n:.3g}{unit or ' '}" if unit else f"{n:.0f} "
        n /= 1000
    return f"{n:.3g} T"


def cut(text: str, most: int = 60) -> str:
    """A text as Python writes it, in quotes, with no more than its first characters."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."


def weight_text(w: float | Tensor) -> str:
    """A weight as text: a number with twelve digits, a tensor by its first four numbers.

    Twelve digits hide the rounding of floats: 1 - 0.8 prints as 0.2.
    """
    if isinstance(w, Tensor):
        shown = [f"{x:.6g}" for x in w[:4].tolist()]
        more = [f"{len(w)} requests"] if len(w) > 4 else []
        return f"[{', '.join(shown + more)}]"
    return f"{w:.12g}"


def sum_text(names: Sequence[str], weights: Sequence[float | Tensor]) -> str:
    """A weighted sum as text, such as ``base + 0.8*tuned - 0.8*ref``."""
    text = ""
    for name, w in zip(names, weights, strict=True):
        minus = not isinstance(w, Tensor) and w < 0
        size = weight_text(w if isinstance(w, Tensor) else abs(w))
        term = name if size == "1" else f"{size}*{name}"
        if text:
            text += f" {'-' if minus else '+'} {term}"
        else:
            text = f"-{term}" if minus else term
    return text


def settings_text(x: Any, skip: Sequence[str] = ()) -> list[str]:
    """The fields of a dataclass that differ from their defaults, as keyword arguments."""
    return [
        f"{f.name}={getattr(x, f.name)!r}"
        for f in fields(x)
        if f.name not in skip and getattr(x, f.name) != f.default
    ]


def support_text(s: Support) -> str:
    """A support as Python would make it, such as ``Support(term=0, top_k=5)``."""
    return f"Support({', '.join([f'term={s.term}', *settings_text(s, skip=['term'])])})"


def term_text(term: Any) -> str:
    """A term as text, with its model's class alone: what a model prints would fill pages."""
    settings = settings_text(term, skip=["model", "tokenizer"])
    return f"{type(term).__name__}({', '.join([type(term.model).__name__, *settings])})"


def mean_text(names: Sequence[str], weights: Sequence[float | Tensor], power: float) -> str:
    """A power mean as the function that makes it: `union`, `intersection` or `power_mean`."""
    terms = ", ".join(names)
    alike = not any(isinstance(w, Tensor) for w in weights) and len(set(weights)) == 1
    if math.isinf(power) and alike:
        return f"{'union' if power > 0 else 'intersection'}({terms})"
    each = ", ".join(map(weight_text, weights))
    return f"power_mean([{terms}], weights=[{each}], r={weight_text(power)})"


def part_text(names: Sequence[str], part: Part) -> str:
    """A part as it is added to others: ``0.95*union(a, b)`` or ``(a - b).clamp(max=2)``."""
    scale = 1.0
    numbers = [w for w in part.weights if not isinstance(w, Tensor)]
    if part.power == 0:
        text = f"({sum_text(names, part.weights)})"
    elif len(numbers) == len(names):
        scale = sum(numbers)
        text = mean_text(names, [w / scale for w in numbers], part.power)
    else:
        text = mean_text(names, part.weights, part.power)
    if not part.is_clamped:
        return sum_text([text], [scale])
    if scale != 1:
        text = f"({sum_text([text], [scale])})"
    bounds = [("min", part.min), ("max", part.max)]
    given = ", ".join(f"{name}={weight_text(x)}" for name, x in bounds if not math.isinf(x))
    return f"{text}.clamp({given})"


def blend_text(blend: Blend) -> str:
    """A blend as the formula that it was, or could have been, written as."""
    if blend.power != 0:
        text = mean_text(blend.names, blend.weights, blend.power)
    else:
        text = _sum_and_parts(blend)
    if blend.support is not None:
        bare = blend.power != 0 or text.isidentifier()
        text = f"{text if bare else f'({text})'}.within({support_text(blend.support)})"
    values = sum_text(blend.value_names, blend.value_weights)
    classifiers = sum_text(blend.classifier_names, blend.classifier_weights)
    return _joined([text, values, classifiers])


def _sum_and_parts(blend: Blend) -> str:
    """The terms that are added by themselves, then the parts: read back, they have this order."""
    names = dict(zip(blend.terms, blend.names, strict=True))
    of_parts = {t for part in blend.parts for t in part.terms}
    weights = dict(zip(blend.terms, blend.weights, strict=True))
    alone = [t for t, w in weights.items() if t not in of_parts or not is_zero(w)]
    if blend.terms[:1] != tuple([*alone, *blend.parts[0].terms] if blend.parts else alone)[:1]:
        alone = [blend.terms[0], *alone]  # It is the base, though its weight is 0.
    of_terms = sum_text([names[t] for t in alone], [weights[t] for t in alone])
    return _joined([of_terms, *(part_text([names[t] for t in p.terms], p) for p in blend.parts)])


def _joined(texts: Sequence[str]) -> str:
    """Sums as one; an empty one is left out."""
    first, *others = [text for text in texts if text] or [""]
    return first + "".join(f" - {x[1:]}" if x.startswith("-") else f" + {x}" for x in others)
