"""What a loop needs of the models that it decodes with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from torch import Tensor

from .forms import Ids
from .stats import ModelStats

if TYPE_CHECKING:
    from .simple.term_model import TermModel

PromptIds: TypeAlias = Sequence[Ids]  # of a row: the ids that each model reads before it writes
# Of a row of one model: the weights of its mix of adapters; None: the model's own, if it has any.
Shares: TypeAlias = tuple[float, ...] | None


class Runner(Protocol):
    """All models of a call, with places for rows that come and go: the slots."""

    @property
    def models(self) -> Sequence[TermModel]:
        """The terms', the values', the references'."""

    @property
    def models_of_logits(self) -> Sequence[tuple[int, ...]]:
        """The models that each tensor of logits stands for: one, or several that share a head."""

    @property
    def notes(self) -> list[str]:
        """What is not done as the engine's options say, and why."""

    def join(
        self,
        slots: Sequence[int],
        prompts: Sequence[PromptIds],
        limits: Sequence[int],
        mixes: Sequence[Sequence[Shares]] | None = None,
    ) -> None:
        """Let rows take slots. `read` reads their prompts.

        Args:
            prompts: of each row, the ids that each model reads. Rows that have one and the same
                object read it together, once.
            limits: the most that each row writes.
            mixes: of each row and model, the weights of the mix of adapters that the row has, the
                same for rows that share their prompt. None: those of the models themselves.
        """

    def read(self, *, each: bool = False) -> list[int]:
        """Read a piece of the prompts of rows that joined.

        Args:
            each: whether a piece of every prompt is read, so that short prompts are ready together.

        Returns:
            The slots whose prompts have been read by now, so that steps feed these rows.
        """

    def leave(self, slots: Sequence[int]) -> None:
        """Let rows give up their slots. Rows that share a prompt which is still being read must
        leave together."""

    def fork(self, parents: Sequence[int], shared: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is.

        The two are equal already in their prompts and in their first ``shared[i]`` new tokens.
        """

    def reserve(self, tokens: int = 1) -> bool:
        """The host's part of a step that feeds so many tokens of each row; True if buffers moved,
        so that a captured step is void."""

    @property
    def feeds_some(self) -> bool:
        """Whether a step may feed some slots alone, which takes less time than all."""

    def step(self, tokens: Tensor, live: Tensor, slots: Tensor | None = None) -> list[Tensor]:
        """Logits ``[slots, V]`` of each of `models_of_logits` after one more token ``[slots]``.

        Rows that are not `live` are fed as well, but do not keep what they were fed.

        Args:
            slots: ``[n]``: those that are fed, among them all that are live, and whose logits are
                given; None: all.
        """

    def held(self, slot: int, prompt_ids: PromptIds, mixes: Sequence[Shares]) -> int:
        """How many tokens of a prompt all models together need not read if it joins in a slot that
        is free, as the slot's caches hold them.

        Args:
            mixes: of each model, as in `join`; or none at all.
        """

    def holds(self, slot: int, prompt_ids: PromptIds, new: Ids) -> None:
        """Let the caches of a slot know what its row has written, which leaves it."""

    def forget(self, slot: int) -> None:
        """Let a free slot's caches hold nothing that a prompt could be read on from."""

    @property
    def heads(self) -> Sequence[TermModel]:
        """The value models that are asked by `values`, without a forward of their own."""

    def values(self, tokens: Tensor, source: Tensor | None = None) -> Tensor | None:
        """``[slots, heads]`` float32: what each of `heads` says after the last step.

        A Q-head gives its number for each slot's token, drawn after this step. A scalar head gives
        its number for the text that the step fed, which is the one before that token. None where
        there are no heads.

        Args:
            tokens: ``[slots]``; those below 0 were not drawn, and their numbers mean nothing.
            source: the slot whose state each slot goes by; None: its own.
        """

    def keep(self, counts: Tensor) -> None:
        """Let rows keep so many ``[slots]`` of the tokens that they were last fed and did not keep:
        by a step while they were not live, or by `EngineRunner.verify`. The next step must feed the
        one after these. The simple path is never asked."""

    def take_back(self, which: Tensor) -> None:
        """Let rows forget the token that the last step fed them: ``which`` is ``[slots]`` bool.

        They kept it, and it was not the last token of their prompt. It is fed to them again when
        they go on.
        """

    def apart(self, logits: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The logits of each model alone, ``[slots, V]``, of the step that gave `logits`.

        None where they cannot be told from what the step gave.
        """

    def stats(self, drawn: int, rows: int) -> list[ModelStats]:
        """What each model did for so many rows that drew so many tokens in all."""

    @property
    def cache_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...
