"""Which cases of a long table CI runs: a part that shows what all show. A sweep runs the others."""

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def every(n: int, cases: Iterable[Any], keep: Collection[Any] = ()) -> list[Any]:
    """The cases of one parameter. CI runs the first, each n-th after it, and those of `keep`."""
    return [_case(i % n == 0 or case in keep, case) for i, case in enumerate(cases)]


def product(*axes: Sequence[Any], together: int = 2) -> list[Any]:
    """All combinations of the values of several parameters, as of `itertools.product`.

    CI runs as few as have any two values of different parameters in one case; with `together` = 1,
    as have each value.
    """
    cases = list(itertools.product(*(range(len(axis)) for axis in axes)))
    covers = {case: {*itertools.combinations(enumerate(case), together)} for case in cases}
    missing, chosen, used = set().union(*covers.values()), set(), Counter()

    def worth(case: tuple[int, ...]) -> tuple[int, int]:
        return len(covers[case] & missing), -sum(used[x] for x in enumerate(case))

    while missing:
        best = max(cases, key=worth)
        chosen.add(best)
        missing -= covers[best]
        used.update(enumerate(best))
    return [
        _case(case in chosen, *(axis[i] for axis, i in zip(axes, case, strict=True)))
        for case in cases
    ]


def _case(in_ci: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if in_ci else pytest.mark.sweep)
