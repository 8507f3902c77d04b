"""What a loop needs of the models that it decodes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

from .forms import Ids
from .stats import ModelStats

if TYPE_CHECKING:
    from .simple.term_model import TermModel

Texts: TypeAlias = Sequence[Ids]  # what each model reads of a row before it writes


class Runner(Protocol):
    """All models of a call, with places for rows that come and go."""

    @property
    def models(self) -> Sequence[TermModel]:
        """The terms', the values', the references'."""

    @property
    def columns(self) -> Sequence[tuple[int, ...]]:
        """The models that each tensor of logits stands for; several come blended by one head."""

    @property
    def notes(self) -> list[str]:
        """What was left out, and why."""

    def join(self, slots: Sequence[int], texts: Sequence[Texts], limits: Sequence[int]) -> None:
        """Rows take slots; of each, the ids that every model reads and the most that it writes.

        Slots that have one and the same object of texts share its reading.
        """

    def read(self, *, each: bool = False) -> list[int]:
        """Read a piece of what the rows that joined have to read; the slots that are ready.

        `each`: a piece for each row, so that those with short prompts are ready together.
        """

    def leave(self, slots: Sequence[int]) -> None:
        """Rows give up their slots; of rows that share what is being read, all of them."""

    def fork(self, parents: Sequence[int], shared: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is.

        They are equal already in their prompts and in the first ``shared[i]`` new tokens.
        """

    def reserve(self) -> bool:
        """The host's part of a step; True if buffers moved, so that a captured step is void."""

    def step(self, tokens: Tensor, live: Tensor) -> list[Tensor]:
        """Logits ``[slots, V]`` of each of `columns` after one more token ``[slots]``.

        Rows that are not `live` are fed too, and do not keep what they were fed.
        """

    def stats(self, drawn: int, rows: int) -> list[ModelStats]:
        """What each model did for so many rows that drew so many tokens in all."""

    @property
    def cache_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...
