"""The operators that make sums of terms: blends, and values that guide a search."""

from __future__ import annotations

import numbers
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from .ops.types import Support
from .printing import support_text
from .weights import Weight, check_number, check_weight

if TYPE_CHECKING:
    from .blend import Blend

S = TypeVar("S")


class Sums(Generic[S]):
    """``+ - * /`` of what can be added to its like and scaled, in terms of four methods."""

    __array_ufunc__ = None  # numpy would multiply an array's elements one by one: leave it to us

    def _sum(self) -> S:
        """This as a sum, of itself alone."""
        raise NotImplementedError

    def _operand(self, x: Any) -> S | None:
        """The other side of ``+`` as a sum, or None to let Python say that it cannot be one."""
        raise NotImplementedError

    def _plus(self, a: S, b: S) -> S:
        raise NotImplementedError

    def _times(self, x: S, factor: Weight, *, divide: bool = False) -> S:
        raise NotImplementedError

    def __add__(self, other: Any) -> S:
        x = self._operand(other)
        return NotImplemented if x is None else self._plus(self._sum(), x)

    def __radd__(self, other: Any) -> S:
        if type(other) is int and other == 0:  # where sum() starts
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
        return self._times(self._sum(), check_weight("weight", weight))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> S:
        d = check_number("divisor", divisor)
        if d == 0:
            raise ValueError("divisor is 0; it must be another number")
        return self._times(self._sum(), d, divide=True)

    def __neg__(self) -> S:
        return self._times(self._sum(), -1.0)


def scaled(w: Weight, factor: Weight, what: Any, *, divide: bool = False) -> Weight:
    """A weight times (or over) a factor, each a number or one a request."""
    if isinstance(w, Tensor) and isinstance(factor, Tensor) and len(w) != len(factor):
        raise ValueError(
            f"weight is [{len(factor)}]; it must be [{len(w)}], as the weights of {what} are"
        )
    return w / factor if divide else w * factor


class Algebra(Sums["Blend"]):
    """The operators of terms and blends. Every result is a `Blend`."""

    def _blend(self) -> Blend:
        """This as a blend, of values alone too."""
        raise NotImplementedError

    def _sum(self) -> Blend:
        return self._blend()

    def _operand(self, x: Any) -> Blend | None:
        if isinstance(x, Algebra):
            return x._blend()
        if isinstance(x, (numbers.Real, Tensor)):
            raise TypeError(
                f"a {type(x).__name__} cannot be added to a blend; terms, values and blends can"
            )
        if isinstance(x, nn.Module):
            raise TypeError(
                f"a bare {type(x).__name__} cannot be added to a blend; wrap it in Model"
            )
        return None

    def _plus(self, a: Blend, b: Blend) -> Blend:
        for x, other in ((a, b), (b, a)):
            why = _fixed(x)
            if why and other.terms:
                raise ValueError(f"log-probs of {other} cannot be added to {why}; only values can")
        whole = a if a.terms else b  # has the power and the support, if any
        return replace(
            whole,
            terms=a.terms + b.terms,
            weights=a.weights + b.weights,
            values=a.values + b.values,
            value_weights=a.value_weights + b.value_weights,
        )

    def _times(self, x: Blend, factor: Weight, *, divide: bool = False) -> Blend:
        if not isinstance(factor, Tensor) and factor == 1:
            return x
        why = _fixed(x)
        if why:
            raise ValueError(f"{x} cannot be scaled: it is {why}")
        return replace(
            x,
            weights=tuple(scaled(w, factor, x, divide=divide) for w in x.weights),
            value_weights=tuple(scaled(w, factor, x, divide=divide) for w in x.value_weights),
        )

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


def _fixed(x: Blend) -> str | None:
    """Why no log-probs can be added to a blend and no factor applied, or None."""
    if x.power != 0:
        return f"a power mean with r = {x.power:g}, whose weights sum to 1"
    return None if x.support is None else "a blend within a support, which is set last"
