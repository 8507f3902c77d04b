"""Python functions as rewards, by their place: ``--reward module:function``."""

from __future__ import annotations

import importlib
import inspect
import keyword
import os
import sys
from collections.abc import Callable
from typing import Any

from .blends.values import Reward
from .checks import did_you_mean

FORM = "it must be MODULE:FUNCTION or NAME=MODULE:FUNCTION, such as rewards:brevity"


def reward(text: str) -> Reward:
    """The reward that an option names: a function ``fn(prompts, responses) -> scores`` of a module.

    The module is looked for in the working directory too. What the function raises becomes a
    ValueError that names it.

    Raises:
        ValueError: the text has another form, the module cannot be imported, or it has no such
            function; says so.
    """
    name, equals, place = text.rpartition("=")
    module, colon, function = place.partition(":")
    said = f"--reward is {text!r}"
    if module.endswith(".py"):
        raise ValueError(f"{said}; a module has no .py: {module.removesuffix('.py')}:{function}")
    if not (colon and module and function.isidentifier()):
        raise ValueError(f"{said}; {FORM}")
    name = name if equals else function
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{said}; the name before = must be an identifier")
    found = _imported(module, said)
    fn = getattr(found, function, None)
    if not callable(fn):
        known = [key for key, x in vars(found).items() if inspect.isfunction(x)]
        what = "has no" if fn is None else "has no function"
        raise ValueError(f"{said}; {module} {what} {function!r}{did_you_mean(function, known)}")
    try:
        Reward(fn)
    except TypeError as error:
        raise ValueError(f"{said}; {error}") from None
    return Reward(_named(fn, name), name=name)


def _imported(module: str, said: str) -> Any:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{said}; there is no module {error.name!r} in {here!r} or among those installed"
            ) from None
        raise ValueError(f"{said}; {module} cannot be imported: {error}") from error
    except Exception as error:  # The module is a program, which may raise whatever it likes.
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{said}; {module} cannot be imported: {what}") from error


def _named(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, whose errors say that it was the one of that name."""

    def called(prompts: list[Any], responses: list[str]) -> Any:
        try:
            return fn(prompts, responses)
        except Exception as error:  # It may raise whatever it likes.
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"the reward {name} failed ({what}); see --traceback") from error

    return called
