"""What a call has recorded of a model, kept for the next one, so that short calls begin at once."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .program import Program

KEPT = 4  # sets of programs of a model: of calls that run at the same time, or of other adapters
MOST = 12  # programs of a set


@dataclass(eq=False)
class Programs:
    """The programs of one group at a time, and the memory that they refer to besides weights.

    Attributes:
        stacks: as of `Deltas`.
        of: by what they depend on.
        now: what the model and its adapters were when they were made.
    """

    stacks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    of: dict[Hashable, Program] = field(default_factory=dict)
    now: object = None

    def settle(self, now: object) -> None:
        """Drop all programs if they were made for something that is no longer as it was."""
        if self.now != now:
            self.of.clear()
        self.now = now

    def keep(self, key: Hashable, program: Program) -> None:
        self.of[key] = program
        while len(self.of) > MOST:
            del self.of[next(iter(self.of))]


# Of each model that runs, those that nobody uses, each with how many lanes of rows they are for.
_shelf: weakref.WeakKeyDictionary[nn.Module, list[tuple[int, Programs]]]
_shelf = weakref.WeakKeyDictionary()


def lend(borrower: object, model: nn.Module, lanes: int) -> Programs:
    """Programs of earlier calls, for the borrower alone as long as it lives."""
    free, found = _shelf.setdefault(model, []), Programs()
    for entry in reversed(free):
        if entry[0] == lanes:
            try:
                free.remove(entry)
            except ValueError:  # Another thread has just taken it.
                continue
            found = entry[1]
            break
    weakref.finalize(borrower, _give_back, weakref.ref(model), lanes, found).atexit = False
    return found


def _give_back(model: weakref.ref[nn.Module], lanes: int, programs: Programs) -> None:
    alive = model()
    if alive is not None and (programs.of or programs.stacks):
        free = _shelf.setdefault(alive, [])
        free.append((lanes, programs))
        del free[:-KEPT]


def places(weights: Sequence[Tensor]) -> list[Any]:
    """Where weights are, and how they lie there."""
    return [(x.data_ptr(), x.shape, x.stride()) for x in weights]
