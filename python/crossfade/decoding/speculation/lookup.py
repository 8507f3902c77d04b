"""Guesses from texts: what followed the last tokens elsewhere follows them again."""

from __future__ import annotations

from collections.abc import Sequence

from ..forms import Ids

BREAK = -1  # stands between texts; no token has this id
LONGEST = 16  # tokens up to which places are compared
SURE = 4  # A place that has so many of the last tokens is not looked for again.
PLACES = 8  # that are compared with each other, the last ones or the nearest


class Lookup:
    """Where one row's text goes on in texts that are at hand.

    It follows a place for as long as the row writes what stands there. Otherwise it looks for the
    place that has most of the row's last tokens before it: of several, the one nearest to where the
    text was followed before, so that a changed word does not end a draft; else the last one.

    Attributes:
        at: the place in `text` where the row goes on; None if none is known.
        matched: how many of the row's last tokens stand before that place. At the beginning of
            a given text there are none, and it counts as found.

    Args:
        texts: what is looked up, apart from each other.
        prompt: what the row's own text begins with, if that is looked up too; None: the row is
            likely to write the first of the texts.
    """

    def __init__(self, texts: Sequence[Ids], prompt: Ids | None = None) -> None:
        self.own = prompt is not None
        self.text: list[int] = []
        self.after: dict[tuple[int, ...], list[int]] = {}  # the places after one or three tokens
        for ids in texts:
            self._read(ids)
            self.text.append(BREAK)
        self.first = len(self.text)  # where the row's own text begins
        self.near: int | None = None  # where the row would go on if it were changed there alone
        self.at: int | None = None
        self.matched = 0
        if prompt is not None:
            self._read(prompt[:-1])
            self.text += prompt[-1:]
            self._find()
        elif texts and texts[0]:
            self.at, self.matched = 0, SURE

    def copy(self) -> Lookup:
        """The same for another row, which has written the same so far."""
        other = object.__new__(Lookup)
        vars(other).update(vars(self))
        other.text = list(self.text)
        if self.own:
            other.after = {key: list(places) for key, places in self.after.items()}
        return other

    def guesses(self, most: int) -> list[int]:
        """Up to so many tokens that may come next."""
        if self.at is None:
            return []
        end = len(self.text) if self.own else self.first
        found = self.text[self.at : min(self.at + most, end)]
        return found[: found.index(BREAK)] if BREAK in found else found

    def write(self, token: int) -> bool | None:
        """The row has written a token: whether that was the guess; None if there was none."""
        guess = next(iter(self.guesses(1)), None)
        if self.own:
            self._index(len(self.text))
        self.text.append(token)
        if guess == token and self.at is not None:
            self.at, self.matched = self.at + 1, self.matched + 1
        else:
            self.near = self.near if self.at is None else self.at
            self.at, self.matched = None, 0
        if self.near is not None:
            self.near += 1
        if self.at is None and not self.own and self.near is not None:
            self.at = min(self.near, self.first - 1)  # One token may have been changed.
        if self.matched < SURE:
            self._find()
        return None if guess is None else guess == token

    def _read(self, ids: Ids) -> None:
        for token in ids:
            self.text.append(token)
            self._index(len(self.text))

    def _index(self, place: int) -> None:
        """Note what stands before a place."""
        for n in (1, 3):
            key = tuple(self.text[max(place - n, 0) : place])
            if len(key) == n and BREAK not in key:
                self.after.setdefault(key, []).append(place)

    def _find(self) -> None:
        """Look for the place that has most of the row's last tokens before it."""
        last = self.text[max(self.first, len(self.text) - LONGEST) :]
        places = self.after.get(tuple(last[-3:])) or self.after.get(tuple(last[-1:])) or []
        if self.near is not None and len(places) > PLACES:
            places = sorted(places, key=self._nearness)
        each = ((self._alike(p, last), self._nearness(p), p) for p in places[-PLACES:])
        alike, _, place = max(each, default=(0, 0, 0))
        if alike > self.matched:
            self.at, self.matched = place, alike

    def _nearness(self, place: int) -> int:
        return place if self.near is None else -abs(place - self.near)

    def _alike(self, place: int, last: Ids) -> int:
        """How many of the row's last tokens stand before a place, as far as is compared."""
        before = self.text[max(place - len(last), 0) : place]
        pairs = zip(reversed(before), reversed(last), strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(last)))
