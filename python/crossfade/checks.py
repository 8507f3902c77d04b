"""Checks of arguments that all parts of the package use."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

MANY = 8  # arguments that an error does not list
F = TypeVar("F", bound=Callable[..., Any])


def check_number(name: str, x: Any) -> float:
    """`x` as a float. Raises an error that calls it `name` unless it is a finite number.

    An array or a tensor without dimensions is a number.
    """
    x = plain_number(x)
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        raise TypeError(f"{name} is {x!r:.80}; it must be a number")
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; it must be finite")
    return number


def plain_number(x: Any) -> Any:
    """What an array or a tensor without dimensions holds; anything else as it is."""
    if getattr(x, "shape", None) == () and hasattr(x, "item") and not getattr(x, "is_meta", False):
        return x.item()
    return x


def check_called(how: str, function: Any, count: int) -> None:
    """Require that a function of the caller takes so many arguments, by position.

    What is not written in Python may not tell what it takes, and passes.

    Args:
        how: begins the error: "fn is called as fn(prompts, responses), with two lists".

    Raises:
        TypeError: it takes others.
    """
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError as error:
        raise TypeError(f"{how}, and cannot be: {error}") from None
    except ValueError:
        pass


def did_you_mean(name: Any, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """The end of an error about an unknown name: what was probably meant, or nothing.

    Args:
        known: the names that there are.
        meant: for names of other libraries, which no spelling leads to, what to say in their place.
    """
    if meant is not None and name in meant:
        return f"; {meant[name]}"
    lower = {k.lower(): k for k in known}
    near = difflib.get_close_matches(str(name).lower(), list(lower), n=1)
    return f"; did you mean {lower[near[0]]!r}?" if near else ""


def explained(meant: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Let a function or a dataclass say more of wrong arguments than Python does.

    An unknown one is answered by `did_you_mean`, and one too many by position or one that is
    missing with the names of those that there are. The function itself is called with what it was
    given.

    Args:
        meant: as in `did_you_mean`.
    """

    def explain(f: F) -> F:
        inner: Any = vars(f)["__init__"] if isinstance(f, type) else f
        first = next(iter(inspect.signature(f).parameters))
        skipped = int(isinstance(f, type) or first in ("self", "cls"))
        each = list(inspect.signature(inner).parameters.values())[skipped:]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in each)
        named = [p.name for p in each if p.kind is not p.VAR_KEYWORD]
        places = [p.name for p in each if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        needed = [p.name for p in each if p.name in places and p.default is p.empty]
        known, name = frozenset(named), f.__name__
        if name in ("__init__", "__call__"):  # People know it by its class.
            name = ("a " if name == "__call__" else "") + f.__qualname__.split(".")[-2]

        @functools.wraps(inner)
        def checked(*args: Any, **options: Any) -> Any:
            count = len(args) - skipped
            missing = [n for n in needed[count:] if n not in options]
            for x in options:
                # A function that takes any leaves those to others, while it has all that it needs.
                if x not in known and (not takes_any or (missing and x in (meant or ()))):
                    says = did_you_mean(x, named, meant) or f"; it has {', '.join(named)}"
                    raise TypeError(f"{name} got an unknown argument {x!r}{says}")
            if count > len(places):
                others = [f"{n}=" for n in named if n not in places]
                few = f": {', '.join(others)}" if len(others) <= MANY else ""
                says = f"; the others go by name{few}" if others else ""
                raise TypeError(
                    f"{name} got {count} arguments by position; it takes {len(places)}, "
                    f"{' and '.join(places)}{says}"
                )
            if missing:
                raise TypeError(
                    f"{name} lacks {' and '.join(missing)}; it takes {', '.join(places)}"
                )
            return inner(*args, **options)

        if not isinstance(f, type):
            return checked  # type: ignore[return-value]
        f.__init__ = checked  # type: ignore[misc]
        return f

    return explain


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called crossfade, or Hugging Face's generate, so that its author sees
    which it is."""
    inside = {__name__.partition(".")[0], "torch", "transformers", "contextlib"}
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] in inside:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
