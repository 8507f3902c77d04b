"""Checks that all parts of the package use."""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade.checks import check_number, did_you_mean, explained, warn
from tiny_models import make


def test_a_near_name_is_suggested() -> None:
    assert did_you_mean("temprature", ["temperature", "top_k"]) == "; did you mean 'temperature'?"


def test_a_name_that_is_near_to_none_has_no_suggestion() -> None:
    assert did_you_mean("colour", ["temperature", "top_k"]) == ""


def test_a_name_of_another_library_has_its_own_words() -> None:
    meant = {"max_tokens": "max_new_tokens is the limit here"}
    found = did_you_mean("max_tokens", ["max_time"], meant)
    assert found == "; max_new_tokens is the limit here"


def test_capitals_do_not_matter() -> None:
    assert did_you_mean("User", ["system", "user"]) == "; did you mean 'user'?"


@explained({"colour": "here it is color"})
def paint(color: str, size: int = 1, *, name: str | None = None) -> tuple[Any, ...]:
    """Paints."""
    return color, size, name


@explained({"colour": "here it is color"})
@dataclass(frozen=True)
class Painted:
    """Is painted."""

    color: str
    size: int = 1


class Painter:
    @explained()
    def __call__(self, color: str, size: int = 1) -> tuple[Any, ...]:
        return color, size


@explained({"colour": "here it is color"})
def anything(color: str, **options: Any) -> dict[str, Any]:
    return options


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: paint("red", sise=2),
            "paint got an unknown argument 'sise'; did you mean 'size'?",
        ),
        (
            lambda: paint(colour="red"),
            "paint got an unknown argument 'colour'; here it is color",
        ),
        (
            lambda: paint("red", x=2),
            "paint got an unknown argument 'x'; it has color, size, name",
        ),
        (
            lambda: paint("red", 1, "me"),
            "paint got 3 arguments by position; it takes 2, color and size; the others go by name: "
            "name=",
        ),
        (
            lambda: Painted("red", sise=2),
            "Painted got an unknown argument 'sise'; did you mean 'size'?",
        ),
        (
            lambda: Painted("red", 1, 2),
            "Painted got 3 arguments by position; it takes 2, color and size",
        ),
        (lambda: paint(), "paint lacks color; it takes color, size"),
        (lambda: paint(size=2), "paint lacks color; it takes color, size"),
        (lambda: Painted(), "Painted lacks color; it takes color, size"),
        (
            lambda: Painter()("red", 1, sice=2),
            "a Painter got an unknown argument 'sice'; did you mean 'size'?",
        ),
        (
            lambda: Painter()("red", 1, 2),
            "a Painter got 3 arguments by position; it takes 2, color and size",
        ),
        (lambda: Painter()(size=1), "a Painter lacks color; it takes color, size"),
        (
            lambda: anything(colour="red"),
            "anything got an unknown argument 'colour'; here it is color",
        ),
    ],
)
def test_wrong_arguments_are_explained(call: Any, says: str) -> None:
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value) == says


def test_explained_functions_are_what_they_were() -> None:
    assert paint("red", 2, name="me") == ("red", 2, "me")
    assert anything("red", colour=1) == {"colour": 1}
    assert Painted("red", size=2) == Painted("red", 2)
    assert Painter()("red", size=2) == ("red", 2)
    assert [*signature(paint).parameters] == ["color", "size", "name"]
    assert [*signature(Painted).parameters] == ["color", "size"]
    assert (paint.__name__, paint.__doc__) == ("paint", "Paints.")


@pytest.mark.parametrize("x", [np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5])
def test_arrays_without_dimensions_are_numbers(x: Any) -> None:
    assert check_number("x", x) == 0.5


def test_attributes_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Modle'; did you mean 'Model'\\?"):
        _ = cf.Modle  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no attribute 'smolm2'; did you mean 'smollm2'\\?"):
        _ = cf.models.smolm2  # type: ignore[attr-defined]
    assert not hasattr(cf, "__wrapped__")


def test_a_warning_is_of_the_line_outside_of_crossfade() -> None:
    names: dict[str, Any] = {"__name__": "crossfade.somewhere", "warn": warn}
    code = "def f():\n    warn('far')\ndef g():\n    f()\n"
    exec(compile(code, "somewhere.py", "exec"), names)
    with pytest.warns(UserWarning, match="far") as caught:
        names["g"]()
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("default")
def test_a_call_warns_at_its_own_line() -> None:
    with pytest.warns(UserWarning, match="temperature is 0.7 and changes nothing") as caught:
        cf.generate(make(), [[5, 6]], max_new_tokens=1, temperature=0.7)
    assert caught[0].filename == __file__
