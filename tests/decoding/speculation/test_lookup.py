"""Guesses from texts, against a search that looks everywhere."""

from __future__ import annotations

from typing import Any

import pytest
from crossfade.decoding.speculation.lookup import BREAK, LONGEST, PLACES, SURE, Lookup
from hypothesis import given
from hypothesis import strategies as st

FEW = st.lists(st.integers(0, 3), max_size=30)  # Few words repeat often.
MANY = st.lists(st.integers(0, 12), max_size=40)


def wrote(lookup: Lookup, ids: list[int]) -> list[bool | None]:
    return [lookup.write(token) for token in ids]


def suffix(text: list[int], place: int, last: list[int]) -> int:
    """How many of the last tokens stand before a place; a break is like nothing."""
    n = 0
    while n < min(len(last), LONGEST) and place - n > 0 and text[place - 1 - n] == last[-1 - n]:
        n += 1
    return n


@given(st.lists(MANY, max_size=2), st.lists(st.integers(0, 12), min_size=1, max_size=30), MANY)
def test_the_longest_suffix_is_found(
    others: list[list[int]], prompt: list[int], ids: list[int]
) -> None:
    """As long as none is followed for longer, the place has as many of the last tokens before it as
    any that is among the last `PLACES`; it never has fewer than it says."""
    lookup = Lookup(others, prompt)
    for token in [None, *ids]:
        if token is not None:
            lookup.write(token)
        own = lookup.text[lookup.first :]
        text = lookup.text
        places = [p for p in range(1, len(text)) if text[p - 1] != BREAK]
        best = max((suffix(text, p, own) for p in places), default=0)
        if lookup.at is None:
            assert best == 0
            continue
        really = suffix(text, lookup.at, own)
        assert min(lookup.matched, LONGEST) <= really
        assert lookup.matched >= min(best, SURE) or len(places) > PLACES


@given(st.lists(FEW, max_size=3), st.lists(st.integers(0, 3), min_size=1, max_size=20), FEW)
def test_guesses_are_what_stands_there(
    others: list[list[int]], prompt: list[int], ids: list[int]
) -> None:
    lookup = Lookup(others, prompt)
    for token in ids:
        guess = lookup.guesses(1)
        said = lookup.write(token)
        assert said == (None if not guess else guess[0] == token)
        for most in (0, 1, 5, 100):
            found = lookup.guesses(most)
            assert len(found) <= most
            assert BREAK not in found
            if found:
                assert lookup.at is not None
                assert found == lookup.text[lookup.at : lookup.at + len(found)]


@given(FEW, FEW)
def test_guesses_of_a_given_text_come_from_it_alone(given_text: list[int], ids: list[int]) -> None:
    lookup = Lookup([given_text])
    assert lookup.guesses(100) == given_text
    for token in ids:
        lookup.write(token)
        found = lookup.guesses(100)
        assert len(found) <= len(given_text)
        if found:
            assert found == given_text[-len(found) :], "to the end of the text"


@given(MANY)
def test_a_text_that_is_repeated_is_guessed(text: list[int]) -> None:
    assert wrote(Lookup([text]), text) == [True] * len(text)
    assert Lookup([text]).guesses(len(text)) == text


TEXT = [*range(100, 160)]


@pytest.mark.parametrize("at", [0, 1, 20, 57])
@pytest.mark.parametrize(
    ("written", "expected"),
    [("another token", 2), ("two tokens more", 3), ("three tokens less", 1)],
)
def test_a_change_does_not_end_a_draft(at: int, written: str, expected: int) -> None:
    """Texts of distinct tokens: after what is changed, the next token shows where it goes on. So a
    change costs its own tokens and that one."""
    ids = {
        "another token": [*TEXT[:at], 7, *TEXT[at + 1 :]],
        "two tokens more": [*TEXT[:at], 7, 8, *TEXT[at:]],
        "three tokens less": [*TEXT[:at], *TEXT[at + 3 :]],
    }[written]
    lookup = Lookup([TEXT])
    told = wrote(lookup, ids)
    wrong = [i for i, hit in enumerate(told) if hit is not True]
    assert len(wrong) <= expected
    assert all(at <= i <= at + expected for i in wrong)


def test_the_nearest_of_several_places_is_taken() -> None:
    """A word that is everywhere: the text goes on where the change was, not at its end."""
    text = [t for i in range(40) for t in (5, 100 + i)]
    ids = [*text[:21], 99, *text[22:40]]  # One of the others is another word.
    told = wrote(Lookup([text]), ids)
    assert told[21] is False
    assert told[22:].count(True) >= len(told[22:]) - 1
    assert all(told[24:])


def test_texts_with_a_period() -> None:
    lookup = Lookup([], [1, 2, 3] * 4)
    assert lookup.guesses(3) == [1, 2, 3][: len(lookup.guesses(3))]
    told = wrote(lookup, [1, 2, 3] * 5)
    assert told == [True] * 15
    told = wrote(lookup, [9, *[1, 2, 3] * 3])
    assert told[0] is False
    assert told.count(True) >= 6, "it follows the nearest place, up to where that ended"
    same = Lookup([], [4])
    told = wrote(same, [4] * 10)
    assert told[1:] == [True] * 9


@given(FEW, FEW, FEW)
def test_copies_are_independent(prompt: list[int], one: list[int], other: list[int]) -> None:
    for begin in (lambda: Lookup([[1, 2]], [0, *prompt]), lambda: Lookup([prompt])):
        lookup = begin()
        wrote(lookup, one)
        copy = lookup.copy()
        before = vars_of(lookup)
        told = wrote(copy, other)
        assert vars_of(lookup) == before
        alone = begin()
        wrote(alone, one)
        assert wrote(alone, other) == told
        assert wrote(lookup, other) == told
        assert vars_of(lookup) == vars_of(copy) == vars_of(alone)


def vars_of(lookup: Lookup) -> dict[str, Any]:
    found = dict(vars(lookup))
    found["text"] = list(lookup.text)
    found["after"] = {key: list(places) for key, places in lookup.after.items()}
    return found


def test_guesses_never_cross_a_break() -> None:
    lookup = Lookup([[5, 6, 7], [8, 9]], [1, 5, 6])
    assert lookup.guesses(10) == [7]
    lookup.write(7)
    assert BREAK not in lookup.guesses(10)
    assert lookup.write(8) is None, "there was no guess after the end of a text"
    assert lookup.guesses(10) == [9]


def test_nothing_is_guessed_of_nothing() -> None:
    for lookup in (Lookup([[]]), Lookup([]), Lookup([], [3])):
        assert lookup.guesses(5) == []
        assert lookup.write(3) is None


def test_few_places_are_compared() -> None:
    """A text of one word takes no longer the longer it is."""
    lookup = Lookup([], [1, 2] * 2000)
    compared: list[int] = []
    alike = lookup._alike
    lookup._alike = lambda *given: compared.append(1) or alike(*given)  # type: ignore[method-assign]
    lookup.at, lookup.matched = None, 0
    lookup._find()
    assert len(compared) <= PLACES
