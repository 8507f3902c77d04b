"""What is drawn from the logits of a step, and what else is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import BlendSample
from .job import DRAW
from .mixer import Mixer, rows_of
from .rows import Slots
from .watch import Watch

Process = Callable[[Tensor], Tensor]


class Drawing:
    """Draws the next tokens of rows in slots.

    A step may have fed some of the slots alone, so that the others have no logits. What is given
    here has an entry for each slot all the same: a token of -1 and NaN where there were no logits.

    Args:
        watch: knows which logits processors the rows have.
    """

    def __init__(self, mixer: Mixer, slots: Slots, watch: Watch) -> None:
        self.mixer, self.slots, self.watch = mixer, slots, watch

    def sample(self, logits: Sequence[Tensor], fed: Tensor | None) -> BlendSample:
        """The next token of each slot: drawn by one kernel or, where logits processors run, from
        what they make of the blended scores.

        Args:
            logits: of the slots that were fed.
            fed: ``[n]``: which these are; None: all.
        """
        mixer, watch = self.mixer.of(fed), self.watch
        if watch.processors is not None:  # Rows are aligned then, and all of them are fed.
            return self._processed(mixer, logits, self._draw(fed), watch.process)
        kinds = self.slots.kinds
        wanted = {f"return_{n}": n in kinds for n in ("term_logprobs", "pushes")}
        sample = mixer.sample(logits, {**self._draw(fed), **wanted})
        if watch.own:
            sample = self._with_own(sample, logits, fed)
        if fed is None:
            return sample
        return BlendSample(*(self._spread(x, fed) for x in sample))

    def columns(self, logits: Sequence[Tensor], fed: Tensor | None) -> dict[str, Tensor]:
        """What else `Slots` keeps of a step, by name."""
        mixer, kinds = self.mixer.of(fed), self.slots.kinds
        found = {}
        if mixer.references:
            found["kl"] = mixer.divergences(logits)
        if "entropies" in kinds:
            found["entropies"] = mixer.entropies(logits)
        if "top_logprobs" in kinds:
            ((count,), _) = kinds["top_logprobs"]
            found["top_logprobs"], found["top_tokens"] = mixer.log_probs(logits).topk(count)
        if fed is None:
            return found
        return {name: self._spread(x, fed) for name, x in found.items()}

    def _draw(self, at: Tensor | None) -> dict[str, Any]:
        """The settings of the draws of some slots."""
        draw = {name: rows_of(self.slots.table[name], at) for name in DRAW}
        return {**draw, "step": rows_of(self.slots.new, at)}

    def _processed(
        self, mixer: Mixer, logits: Sequence[Tensor], draw: dict[str, Any], process: Process
    ) -> BlendSample:
        """What is drawn from scores that logits processors have changed. The log-probs are the
        blend's own, before them."""
        log_p = mixer.log_probs(logits)
        scores = process(mixer.scores(logits, log_p))
        sample = ops.blend_sample([scores.float().contiguous()], [1.0], **draw)
        at, kinds = sample.tokens.clamp(min=0)[:, None], self.slots.kinds
        each = pushes = None
        if "term_logprobs" in kinds:
            each = torch.cat([t.gather(1, at) for t in mixer.term_log_probs(logits)], dim=1)
        if "pushes" in kinds:
            pushes = mixer.pushes(logits, log_p, at[:, 0])
        logprobs = log_p.gather(1, at)[:, 0]
        return sample._replace(logprobs=logprobs, term_logprobs=each, pushes=pushes)

    def _with_own(
        self, sample: BlendSample, logits: Sequence[Tensor], fed: Tensor | None
    ) -> BlendSample:
        """A sample with other tokens for the rows that have logits processors of their own."""
        slots = self.slots.each.tolist() if fed is None else fed.tolist()
        places = [i for i, slot in enumerate(slots) if slot in self.watch.own]
        if not places:
            return sample
        its = [slots[i] for i in places]
        at, of_slots = (torch.tensor(x, device=self.slots.device) for x in (places, its))
        few = [z[at] for z in logits]
        found = self._processed(
            self.mixer.of(of_slots),
            few,
            self._draw(of_slots),
            lambda scores: self.watch.process_own(its, scores),
        )
        for old, new in zip(sample, found, strict=True):
            if old is not None and new is not None:
                old[at] = new.to(old.dtype)
        return sample

    def _spread(self, x: Any, fed: Tensor) -> Any:
        """An entry for each slot, of what has one for each that was fed."""
        if x is None:
            return None
        missing = float("nan") if x.is_floating_point() else -1
        spread = x.new_full((len(self.slots.each), *x.shape[1:]), missing)
        spread[fed] = x
        return spread
