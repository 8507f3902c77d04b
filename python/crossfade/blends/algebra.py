"""The operators ``+ - * /`` of terms, which make blends, and of values, which make sums."""

from __future__ import annotations

import math
import numbers
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from ..checks import check_number, explained
from ..elsewhere import WITHIN
from ..models.hf import instead_of_model
from ..ops.types import Support
from .parts import Part, check_bound
from .printing import support_text
from .weights import Weight, check_weight, is_zero

if TYPE_CHECKING:
    from .blend import Blend

S = TypeVar("S")


class Sums(Generic[S]):
    """The operators ``+ - * /`` of objects whose sums are of the class `S`.

    A class that has them says in four methods what a sum is and how two are added and one scaled.
    """

    __array_ufunc__ = None  # or numpy would apply the operator to each element of an array

    def _sum(self) -> S:
        """This object as a sum: itself if it is one, else the sum of it alone."""
        raise NotImplementedError

    def _operand(self, x: Any) -> S | None:
        """`x`, the other operand, as a sum. None lets Python raise its own error for it."""
        raise NotImplementedError

    def _plus(self, a: S, b: S) -> S:
        """The sum of two sums."""
        raise NotImplementedError

    def _times(self, x: S, factor: Weight, *, divide: bool = False) -> S:
        """A sum with all its weights multiplied by a factor, or divided by it."""
        raise NotImplementedError

    def __add__(self, other: Any) -> S:
        x = self._operand(other)
        return NotImplemented if x is None else self._plus(self._sum(), x)

    def __radd__(self, other: Any) -> S:
        if type(other) is int and other == 0:  # Python's sum() starts with it
            return self._sum()
        x = self._operand(other)
        return NotImplemented if x is None else self._plus(x, self._sum())

    def __sub__(self, other: Any) -> S:
        x = self._operand(other)
        return NotImplemented if x is None else self._plus(self._sum(), self._times(x, -1.0))

    def __rsub__(self, other: Any) -> S:
        x = self._operand(other)
        return NotImplemented if x is None else self._plus(x, -self)

    def __mul__(self, weight: Any) -> S:
        if isinstance(weight, (Sums, nn.Module)):
            raise TypeError(
                f"weight is a {type(weight).__name__}; it must be a number: models and values are "
                "added, as in a + 0.8 * (b - c)"
            )
        return self._times(self._sum(), check_weight("weight", weight))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> S:
        if isinstance(divisor, (Sums, nn.Module)):
            kind = type(divisor).__name__
            raise TypeError(f"divisor is a {kind}; it must be a number: log-probs are subtracted")
        d = check_number("divisor", divisor)
        if d == 0:
            raise ValueError("divisor is 0; it must be another number")
        return self._times(self._sum(), d, divide=True)

    def __neg__(self) -> S:
        return self._times(self._sum(), -1.0)


def scaled(w: Weight, factor: Weight, what: Any, *, divide: bool = False) -> Weight:
    """A weight multiplied by a factor or divided by it; each is a number or one number a request.

    Args:
        what: the sum that has the weight, for errors.
    """
    if isinstance(w, Tensor) and isinstance(factor, Tensor) and len(w) != len(factor):
        raise ValueError(
            f"weight is [{len(factor)}]; it must be [{len(w)}], as the weights of {what} are"
        )
    return w / factor if divide else w * factor


class Algebra(Sums["Blend"]):
    """The operators of terms and blends. Every result is a `Blend`."""

    def _blend(self) -> Blend:
        """This object as a blend. That of a `ValueHead` has a value and no model yet."""
        raise NotImplementedError

    def _sum(self) -> Blend:
        return self._blend()

    def _operand(self, x: Any) -> Blend | None:
        if isinstance(x, Algebra):
            return x._blend()
        if isinstance(x, Sums):  # A value, whose own operator says why the two cannot be added.
            return None
        kind = type(x).__name__
        if isinstance(x, nn.Module):
            raise TypeError(f"a bare {kind} cannot be added to a blend; wrap it in Model")
        instead = "terms, values and blends can"
        if isinstance(x, (numbers.Real, Tensor)):
            instead = "terms, values and blends can, multiplied by numbers: a + 0.5 * b"
        elif isinstance(x, (list, tuple)):
            instead = "its members can, one by one, as in sum([a, b])"
        elif isinstance(x, str):
            instead = "a model can, once it is loaded: Model(model)"
        elif is_callable(x):
            instead = (
                "a search chooses by it: generate(blend, inputs, search=BestOfN(16, function))"
            )
        raise TypeError(f"a {kind} cannot be added to a blend; {instead}")

    def _plus(self, a: Blend, b: Blend) -> Blend:
        for x, other in ((a, b), (b, a)):
            why = _fixed(x)
            if why and other.terms:
                raise ValueError(f"log-probs of {other} cannot be added to {why}; only values can")
        if a.terms and b.terms:
            a, b = _as_sum(a), _as_sum(b)
        whole = a if a.terms else b  # The other one has values alone: no power, no support.
        return replace(
            whole,
            parts=a.parts + b.parts,
            terms=a.terms + b.terms,
            weights=a.weights + b.weights,
            values=a.values + b.values,
            value_weights=a.value_weights + b.value_weights,
            classifiers=a.classifiers + b.classifiers,
            classifier_weights=a.classifier_weights + b.classifier_weights,
        )

    def _times(self, x: Blend, factor: Weight, *, divide: bool = False) -> Blend:
        if not isinstance(factor, Tensor) and factor == 1:
            return x
        why = _fixed(x)
        if why:
            raise ValueError(f"{x} cannot be scaled: it is {why}")
        x = _as_sum(x)

        def times(part: Part) -> Part:
            own = [scaled(w, factor, x, divide=divide) for w in part.weights]
            return part.times(own, factor, divide=divide)

        return replace(
            x,
            parts=tuple(map(times, x.parts)),
            weights=tuple(scaled(w, factor, x, divide=divide) for w in x.weights),
            value_weights=tuple(scaled(w, factor, x, divide=divide) for w in x.value_weights),
            classifier_weights=tuple(
                scaled(w, factor, x, divide=divide) for w in x.classifier_weights
            ),
        )

    @explained()
    def clamp(self, min: float | None = None, max: float | None = None) -> Blend:
        """This sum of log-probs, bounded for each token, in nats, before it is added to others.

        With ``push = sum_k w_k log p_k`` of its terms, each normalised, it is
        ``push.clamp(min, max)``. ``base + (0.8 * (tuned - ref)).clamp(-2, 2)`` makes no token more
        than e^2 times as likely or as unlikely by its guide, where the guide's tail is not to be
        trusted, and ``(tuned - ref).clamp(min=0)`` has a guide raise tokens alone. A union or an
        intersection can be clamped too. A token that a term excludes (-inf) gets the bound; where
        there is none on that side, or two exclude it with weights of different signs, it is
        removed.

        Args:
            min, max: nats; None does not bound. They are one for all requests.

        Raises:
            TypeError, ValueError: a bound is no finite number, both are None, or `min` is above
                `max`; or this has a clamp, a union or an intersection among other terms, has
                values, is a power mean with another r, or is within a support.

        Cost: as of a power mean, the logits are read twice.
        """
        x = self._blend()
        if min is None and max is None:
            raise ValueError("min and max are None; one of them must be given")
        values = "a sum with values, which are added after it"
        why = _fixed(x) or (values if x.values or x.classifiers else None)
        y = x if why else _as_sum(x)
        alone = len(y.parts) == 1 and not y.parts[0].is_clamped and all(map(is_zero, y.weights))
        if y.parts and not alone:
            why = "a sum with a clamp, a union or an intersection in it; clamp what is beside it"
        if why:
            raise ValueError(f"{x} cannot be clamped: it is {why}")
        part = y.parts[0] if alone else Part(y.terms, y.weights)
        part = replace(
            part, min=check_bound("min", min, -math.inf), max=check_bound("max", max, math.inf)
        )
        return replace(y, weights=(0.0,) * len(y.terms), parts=(part,))

    @explained(WITHIN)
    def within(self, support: Support | None) -> Blend:
        """This blend with the tokens outside `support` removed before blending; None lifts it.

        ``Support.term`` counts the blend's `terms` as they are now. Set it last: afterwards only
        values can be added, since what another term or factor would mean to the set is unclear.

        Raises:
            TypeError: `support` is not a `Support`.
            ValueError: it names a term that the blend lacks, or the blend has another one already.
        """
        x = self._blend()
        if support is not None and x.support not in (None, support):
            raise ValueError(
                f"support is {support_text(support)}; the blend is within "
                f"{support_text(x.support)} already, and one set is all it can have"
            )
        return replace(x, support=support)


class TextValue(Algebra):
    """A value of next tokens that is asked of texts and not of a row's state: a `Classifier`."""


def _fixed(x: Blend) -> str | None:
    """Why a blend can neither be scaled nor take more log-probs; None if it can."""
    if x.power != 0 and not math.isinf(x.power):
        return f"a power mean with r = {x.power:g}, whose weights sum to 1"
    return None if x.support is None else "a blend within a support, which is set last"


def _as_sum(x: Blend) -> Blend:
    """A blend as a sum. A union or an intersection becomes a part, to which others can be added."""
    if x.power == 0:
        return x
    part = Part(x.terms, x.weights, x.power)
    return replace(x, weights=(0.0,) * len(x.terms), power=0.0, parts=(part,))


def is_callable(x: Any) -> bool:
    """Whether a value may be made of `x`: a function, or an object that is called like one.

    What holds a blend, as a judge does, is called with something else.
    """
    return callable(x) and not hasattr(x, "blend")


def instead_of_blend(x: Any) -> str:
    """The end of an error about `x`, where a blend must be: what to do with it."""
    instead = instead_of_model(x)
    if isinstance(x, Sums) or (is_callable(x) and not instead):
        return "; a search chooses by a value: generate(blend, inputs, search=BestOfN(16, x))"
    if isinstance(getattr(x, "blend", None), Algebra) and hasattr(x, "search"):  # a `Recipe`
        return "; its blend is recipe.blend"
    if isinstance(x, (list, tuple)) and not instead:
        return "; several are added with weights: 0.5 * a + 0.5 * b"
    return instead
