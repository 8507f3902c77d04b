"""What the host does with the rows of a loop at every step: processors, criteria, a streamer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .job import Row
from .rows import Slots

NO_TOKEN = 2**40  # No tokenizer has this id, so that it spells nothing.


class Watch:
    """Runs Hugging Face's processors, criteria and streamers over the rows in slots.

    Rows are aligned if all of them start at once, so that each is at the same step. Processors,
    streamers and most criteria need that; stop strings do not, as they look at the ends of rows.
    Where chunks end at places of their own, rows start at once and then wait for each other: those
    that have as many tokens are processed together.

    Args:
        aligned: the row of each slot, where rows are aligned; None where they come and go.

    Attributes:
        rows: the row in each slot.
        own: the processors of each row that has some, where rows come and go.
        criteria: each with the slots, as ``[slots]`` bool, whose rows it may end.
        ids: ``[slots, prompt + steps]``, where rows are aligned.
        prompts: ``[slots, prompt]``, where rows that started at once wait for each other.
        tails: ``[slots, width]``, where they are not: the ends of the prompts, as far as stop
            strings may need them.
    """

    def __init__(self, slots: Slots, aligned: Sequence[Row] | None) -> None:
        self.slots = slots
        self.steps = 0
        self.rows: dict[int, Row] = {}
        self.criteria: list[tuple[Any, Tensor]] = []
        self.ids: Tensor | None = None
        self.prompts: Tensor | None = None
        self.processors: Any = None
        self.streamer: Any = None
        self.own: dict[int, Any] = {}
        if aligned is not None:
            job = aligned[0].job
            self.ids = job.prompts[0].ids[[row.request for row in aligned]].to(slots.device)
            self.pad, self.streamer = job.pad, job.streamer
            if job.processors is not None:
                self.processors = job.processors([row.index for row in aligned])
            if job.search is not None and job.search.settings.chunk_end is not None:
                self.ids, self.prompts = None, self.ids
        self.tails = torch.zeros(len(slots.each), 0, dtype=torch.int64, device=slots.device)

    @property
    def in_step(self) -> bool:
        """Whether all rows stay at one step."""
        return self.ids is not None

    def seat(self, seated: Mapping[int, Row]) -> None:
        """Watch these rows instead of those that their slots had before."""
        self.rows.update(seated)
        if self.ids is None and self.prompts is None:
            for slot, row in seated.items():
                if row.job.processors is not None:
                    self.own[slot] = row.job.processors([row.index])
        slots_of: dict[int, tuple[Any, list[int]]] = {}
        for slot, row in self.rows.items():
            for c in row.job.criteria:
                if c.requests is None or row.request in c.requests:
                    slots_of.setdefault(id(c.criterion), (c.criterion, []))[1].append(slot)
        self.criteria = []
        for criterion, slots in slots_of.values():
            which = torch.zeros_like(self.slots.live)
            which[torch.tensor(slots, device=which.device)] = True
            self.criteria.append((criterion, which))
        if self.criteria and self.ids is None:
            self._keep_tails(seated)

    def _keep_tails(self, seated: Mapping[int, Row]) -> None:
        """Keep the ends of new rows' prompts; those of all rows, where criteria now read more."""
        width = max(c.maximum_token_len for c, _ in self.criteria)
        if width > self.tails.shape[1]:
            self.tails = self.tails.new_full((len(self.slots.each), width), NO_TOKEN)
            seated = self.rows
        width = self.tails.shape[1]
        tails = [[NO_TOKEN] * width + list(row.prompt_ids[0][-width:]) for row in seated.values()]
        at = torch.tensor([*seated], device=self.tails.device)
        self.tails[at] = torch.tensor([t[-width:] for t in tails], device=self.tails.device)

    def look(self) -> None:
        """After a step: tell the streamer, and end the rows that a criterion ends."""
        slots = self.slots
        self.steps += 1
        if self.ids is not None:
            new = slots.tokens.masked_fill(~slots.wrote, self.pad)
            self.ids = torch.cat([self.ids, new[:, None]], dim=1)
            if self.streamer is not None:
                self.streamer.put(self.steps, new)
        if self.criteria:
            ids = self._window() if self.ids is None else self.ids
            ended = torch.zeros_like(slots.live)
            for criterion, which in self.criteria:
                ended |= torch.as_tensor(criterion(ids, None), device=ids.device) & which
            slots.finish(ended & slots.wrote)

    def leave(self, slots: Sequence[int]) -> None:
        """Look no more at the rows in these slots."""
        for slot in slots:
            del self.rows[slot]
            self.own.pop(slot, None)

    def fork(self, slots: Sequence[int], parents: Sequence[int]) -> None:
        """Slot ``slots[i]`` gets what slot ``parents[i]`` has."""
        if self.ids is not None:
            self.ids[slots] = self.ids[parents]

    def _window(self) -> Tensor:
        """The last tokens of every slot, prompt included: as many as any stop string may need."""
        slots, width = self.slots, self.tails.shape[1]
        back = slots.new[:, None] - width + torch.arange(width, device=slots.device)
        written = slots.written["tokens"].gather(1, back.clamp(min=0))
        tails = self.tails.gather(1, (back + width).clamp(max=width - 1))
        return torch.where(back < 0, tails, written)

    def process(self, scores: Tensor) -> Tensor:
        """What the logits processors make of the scores; an error of theirs names the request."""
        if self.prompts is None:
            return self._process(self.processors, self.ids, scores, range(len(scores)))
        new, processed = self.slots.new.tolist(), scores.clone()
        for length in {new[slot] for slot in self.rows}:
            its = [slot for slot in self.rows if new[slot] == length]
            written = self.slots.written["tokens"][its, :length]
            ids = torch.cat([self.prompts[its], written], dim=1)
            job = self.rows[its[0]].job
            assert job.processors is not None
            processors = job.processors([self.rows[slot].index for slot in its])
            processed[its] = self._process(processors, ids, scores[its], its)
        return processed

    def process_own(self, slots: Sequence[int], scores: Tensor) -> Tensor:
        """What the processors of the rows in these slots make of their scores ``[n, V]``."""
        new, tokens = self.slots.new.tolist(), self.slots.written["tokens"]
        found = []
        for slot, score in zip(slots, scores.split(1), strict=True):
            prompt = torch.tensor(self.rows[slot].prompt_ids[0], device=tokens.device)
            ids = torch.cat([prompt, tokens[slot, : new[slot]]])[None]
            found.append(self._process(self.own[slot], ids, score, [slot]))
        return torch.cat(found)

    def _process(self, processors: Any, ids: Any, scores: Tensor, slots: Sequence[int]) -> Tensor:
        """What some processors make of the scores of the rows in some slots."""
        processed: Any = scores
        for processor in processors:
            before = processed
            try:
                processed = processor(ids, before)
            except Exception as error:
                where = self._culprit(processor, ids, before, slots)
                token = int(self.slots.new[slots[0]]) if self.own else self.steps
                raise RuntimeError(
                    f"logits_processor {type(processor).__name__} raised {type(error).__name__} at "
                    f"token {token} of {where}: {error}"
                ) from error
        if not isinstance(processed, Tensor) or processed.shape != scores.shape:
            found = list(processed.shape) if isinstance(processed, Tensor) else processed
            kind = found if isinstance(found, list) else type(found).__name__
            raise ValueError(
                f"logits_processor returned {kind}; it must return scores {list(scores.shape)}"
            )
        return processed

    def _culprit(self, processor: Any, ids: Any, scores: Tensor, slots: Sequence[int]) -> str:
        """Which request a processor fails at, as far as calling it for each row alone tells."""
        for i, slot in enumerate(slots):
            if slot not in self.rows:
                continue
            with suppress(Exception):
                processor(ids[i : i + 1], scores[i : i + 1])
                continue
            return str(self.rows[slot])
        return f"the requests {sorted({row.request for row in self.rows.values()})}"
