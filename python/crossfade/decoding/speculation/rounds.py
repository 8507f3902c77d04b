"""Steps in which models check what was guessed: draft, verify, keep."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .drafter import Drafter, Guesses

if TYPE_CHECKING:
    from ..loop import Loop


class Rounds:
    """The steps of a loop where something guesses tokens.

    Attributes:
        drafted: what `Stats` says of guesses: how many steps checked some, how many tokens were
            guessed, and how many of these were drawn.
        unkept: tokens of guesses that models read and rows did not keep.
        doubts: whether the next step is a plain one, as guesses may have spoilt the last.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.drafted: Counter[str] = Counter()
        self.unkept, self.doubts = 0, False

    def step(self, loop: Loop) -> list[Tensor]:
        """A step in which guesses are checked, or a plain one where there are none that pay.

        Returns:
            Of each row, the logits that its last token was drawn from.
        """
        going = loop.slots.live.tolist()
        live = [s for s in loop.seated if going[s]]
        guesses = None
        if live and not self.doubts:
            guesses = self.drafter.guess(live, refilled=loop.refilled)
        self.doubts = False
        begin = time.perf_counter()
        if guesses is None:
            size, logits = 1, loop.stepper(loop.step, loop.reserve())
            loop.see(logits)
        else:
            size, logits = 1 + guesses.tokens.shape[1], self._check(loop, guesses)
        self.drafter.costs.measured(size, time.perf_counter() - begin)
        self.drafter.learn(live)
        return logits

    def _check(self, loop: Loop, guesses: Guesses) -> list[Tensor]:
        """Let every model read the last tokens and the guesses, and draw as plain steps would, as
        long as what is drawn is what was guessed.

        Rows that are to stay at one step end where the first of them draws something else. And all
        end where one of them has nothing to draw from. A plain step then shows whether that is so:
        a model may only say so because of a guess that comes later, as attention multiplies by 0
        what a token is not to see.
        """
        slots, tokens = loop.slots, guesses.tokens
        runner: Any = loop.runner  # The simple path is given no guesses.
        n = 1 + tokens.shape[1]
        loop.reserve(n)
        read = torch.cat([slots.tokens[:, None], tokens], dim=1)
        logits = runner.verify(read, guesses.logits)
        counts = torch.tensor(guesses.counts, device=slots.device)
        kept, last = torch.zeros_like(slots.new), torch.zeros_like(slots.new)
        began, aside = slots.live.clone(), torch.zeros_like(slots.live)
        before, waited = int(slots.guessed.sum()), int(slots.waited)
        for i in range(n):
            going, each = slots.live.clone(), [z[:, i] for z in logits]
            sample = loop.sample(each)
            self.doubts = bool((going & (sample.tokens < 0)).any())
            if self.doubts:
                break
            waits = loop.write(each, sample)
            kept += going if waits is None else going & ~waits
            last = torch.where(going, i, last)
            right = slots.wrote & (slots.tokens == tokens[:, i]) if i < n - 1 else ~slots.wrote
            slots.guessed += right & slots.wrote & (i < counts)
            loop.see(each if i == 0 else None)
            away = slots.live & ~right
            if not bool((slots.live & right).any()) or (loop.watch.in_step and bool(away.any())):
                break
            aside |= away
            slots.live &= right
        slots.live |= aside
        runner.keep(kept)
        drawn = int(slots.guessed.sum()) - before
        self.drafted.update(rounds=1, guessed=sum(guesses.counts), right=drawn)
        waited = int(slots.waited) - waited  # These rows' tokens are counted already.
        self.unkept += n * int(began.sum()) - int(kept.sum()) - waited
        return [z[slots.each.to(z.device), last.to(z.device)] for z in logits]
