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

    def parts(case: tuple[int, ...], size: int) -> set[Any]:
        return {*itertools.combinations(enumerate(case), size)}

    def worth(case: tuple[int, ...]) -> tuple[int, int]:
        """What a case adds and, where several add as much, how seldom its parts were chosen."""
        seen = sum(used[part] for size in (1, 2) for part in parts(case, size))
        return len(parts(case, together) & missing), -seen

    cases = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing, chosen, used = {p for case in cases for p in parts(case, together)}, set(), Counter()
    while missing:
        best = max(cases, key=worth)
        chosen.add(best)
        missing -= parts(best, together)
        used.update(parts(best, 1) | parts(best, 2))
    return [
        _case(case in chosen, *(axis[i] for axis, i in zip(axes, case, strict=True)))
        for case in cases
    ]


def _case(in_ci: bool, *values: Any) -> Any:
    return pytest.param(*values, marks=() if in_ci else pytest.mark.sweep)
