"""The sampling loop: places are filled with rows, all advance in step, and are filled again."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import StopStringCriteria

from .. import ops
from ..ops import BlendSample
from .graph import Stepper
from .inputs import Prompts
from .members import Reference
from .mixer import Mixer
from .rows import Slots
from .settings import Sampling
from .valuer import Search


@dataclass(frozen=True)
class Job:
    """One call's rows and what is to be done with them."""

    prompts: Sequence[Prompts]  # one a term, then one a value, then those of references
    copies: int  # rows of each request
    sampling: Sampling
    seeds: Tensor  # [rows] int64
    streams: Tensor  # [rows] int64
    pad: int
    limit: int  # new tokens of a row
    eos: Tensor  # [n] int64, on the device
    deadline: float | None  # by time.time()
    processors: Callable[[Sequence[int]], LogitsProcessorList] | None  # of a batch of rows
    criteria: Sequence[Any]  # that end rows, besides EOS
    streamer: Any = None
    term_logprobs: bool = False
    references: Sequence[Reference] = ()  # what divergences are measured to
    search: Search | None = None

    @property
    def returned(self) -> list[int]:
        """The rows that are given back: of a search, each request's best."""
        n = self.copies if self.search is None else self.search.returned
        return [r for r in range(self.rows) if r % self.copies < n]

    @property
    def rows(self) -> int:
        return len(self.seeds)

    def name(self, row: int) -> str:
        """What warnings and errors call a row."""
        copies = self.copies
        return f"request {row // copies}" + (f", sample {row % copies}" if copies > 1 else "")

    @property
    def aligned(self) -> str | None:
        """Why all rows of a batch must be at the same step; None if they need not be."""
        if self.processors is not None:
            return "logits processors read all rows at one step"
        if any(type(c) is not StopStringCriteria for c in self.criteria):
            return "stopping criteria read all rows at one step"
        return None if self.streamer is None else "a streamer takes all rows at one step"

    @property
    def watched(self) -> bool:
        """Whether the host has something to do after every step."""
        watched = self.search is not None and self.search.settings.chunk_end is not None
        reads = self.processors is not None or bool(self.criteria) or self.streamer is not None
        return watched or reads


class Loop:
    """Decodes rows of a job in the slots of a runner.

    Args:
        rows: of the job, that are to be decoded: first come, first seated.
        aligned: whether all of them start at once, so that step i is every row's step i.
    """

    def __init__(
        self, job: Job, runner: Any, mixer: Mixer, slots: Slots, rows: Sequence[int], aligned: bool
    ) -> None:
        self.job, self.runner, self.mixer, self.slots = job, runner, mixer, slots
        self.waiting = deque(rows)
        self.seated: dict[int, int] = {}  # slot: row
        # where every row of the job has a slot, it is the slot of its number
        whole = len(slots.row) == job.rows
        self.free = list(rows) if whole else list(range(len(slots.row)))
        self.rows = list(rows)
        self.warned: set[int] = set()  # rows that failed
        self.steps = 0
        each = range(job.rows) if whole else rows
        self.processors = None if job.processors is None else job.processors(each)
        first = job.prompts[0]
        self.ids: Tensor | None = None  # [rows, prompt + steps], where the rows are aligned
        if aligned:
            self.ids = first.ids[[r // job.copies for r in each]].to(slots.row.device)
        elif job.criteria:
            window = max(c.maximum_token_len for c in job.criteria)
            nothing = 2**40  # no tokenizer's id: padding spells nothing
            ids = first.ids.masked_fill(first.mask == 0, nothing)
            tail = torch.nn.functional.pad(ids, (window, 0), value=nothing)[:, -window:]
            self.tails = tail.repeat_interleave(job.copies, 0).to(slots.row.device)

    def run(self, stepper: Stepper, sync_every: int, on_end: Any) -> None:
        """Decode until every row has ended or time is up; `on_end` gets the rows that ended."""
        while self._seat():
            for _ in range(sync_every):
                logits = stepper(self.step, self.runner.reserve())
                self.steps += 1
            on_end(self._look(logits))
            if self.job.deadline is not None and time.time() > self.job.deadline:
                return

    def drawn(self) -> int:
        """Tokens drawn so far."""
        return int(self.slots.results.lengths[self.rows].sum())

    def step(self) -> list[Tensor]:
        """Every model reads a token; the next one is drawn and written down; the logits."""
        slots = self.slots
        logits = self.runner.step(slots.tokens, slots.live)
        sample = self._draw(logits)
        kl = self.mixer.divergences(logits) if self.job.references else None
        slots.write(sample, kl, self.job.eos)
        return logits

    def _seat(self) -> bool:
        """Give free slots to waiting rows; False if no row is left."""
        slots, self.free = self.free[: len(self.waiting)], self.free[len(self.waiting) :]
        if slots:
            rows = [self.waiting.popleft() for _ in slots]
            self._begin(slots, rows)
        return bool(self.seated)

    def _begin(self, slots: Sequence[int], rows: Sequence[int]) -> None:
        self.seated.update(zip(slots, rows, strict=True))
        self.slots.seat(slots, rows)
        self.runner.join(slots, rows)

    def _look(self, logits: list[Tensor]) -> list[int]:
        """Wait for the device, and free the slots of rows that have ended; these rows."""
        self._watch()
        slots = self.slots
        live, failed = torch.stack([slots.live, slots.results.failed[slots.row]]).tolist()
        stopped = [s for s in self.seated if not live[s]]
        for slot in stopped:
            if failed[slot] and self.seated[slot] not in self.warned:
                self.warned.add(self.seated[slot])
                self._warn(slot, logits)
        ended = self._end(stopped)
        self.free += ended
        return [self.seated.pop(s) for s in ended]

    def _end(self, stopped: list[int]) -> list[int]:
        """Which of the slots whose rows have stopped are free."""
        return stopped

    def _watch(self) -> None:
        """What the host does after every step."""
        slots, job = self.slots, self.job
        if self.ids is not None and job.watched:
            new = slots.tokens.masked_fill(~slots.wrote, job.pad)
            self.ids = torch.cat([self.ids, new[:, None]], dim=1)
            if job.streamer is not None:
                job.streamer.put(self.steps, new)
        if job.criteria:
            slots.end(self._ended() & slots.wrote)

    def _ended(self) -> Tensor:
        ids = self._window() if self.ids is None else self.ids
        ended = torch.zeros_like(self.slots.live)
        for criterion in self.job.criteria:
            ended |= torch.as_tensor(criterion(ids, None), device=ids.device)
        return ended

    def _window(self) -> Tensor:
        """The last tokens of every slot, as many as any stop string may need."""
        slots = self.slots
        width = self.tails.shape[1]
        back = slots.new[:, None] - width + torch.arange(width, device=slots.new.device)
        row = slots.row.clamp(max=slots.results.rows - 1)[:, None]
        written = slots.results.tokens[row, back.clamp(min=0)]
        return torch.where(back < 0, self.tails[row, (back + width).clamp(max=width - 1)], written)

    def _draw(self, logits: list[Tensor]) -> BlendSample:
        s, job, slots = self.job.sampling, self.job, self.slots
        draw: dict[str, Any] = {
            "temperature": s.temperature,
            "top_k": s.top_k,
            "top_p": s.top_p,
            "min_p": s.min_p,
            "do_sample": s.do_sample,
            "seed": slots.seeds,
            "stream": slots.streams,
            "step": slots.new,
        }
        if self.processors is None:
            return self.mixer.sample(logits, {**draw, "return_term_logprobs": job.term_logprobs})
        log_p = self.mixer.log_probs(logits)
        scores = self._process(self.mixer.scores(logits, log_p))
        sample = ops.blend_sample([scores.float().contiguous()], [1.0], **draw)
        at = sample.tokens.clamp(min=0)[:, None]
        terms = None
        if job.term_logprobs:
            each = self.mixer.term_log_probs(logits)
            terms = torch.cat([t.gather(1, at) for t in each], dim=1)
        return sample._replace(logprobs=log_p.gather(1, at)[:, 0], term_logprobs=terms)

    def _process(self, scores: Tensor) -> Tensor:
        """What the logits processors make of the scores; an error of theirs names the request."""
        processed: Any = scores
        for processor in self.processors or ():
            before = processed
            try:
                processed = processor(self.ids, before)
            except Exception as error:
                where = self._culprit(processor, before)
                raise RuntimeError(
                    f"logits_processor {type(processor).__name__} raised {type(error).__name__} at "
                    f"token {self.steps} of {where}: {error}"
                ) from error
        if not isinstance(processed, Tensor) or processed.shape != scores.shape:
            found = list(processed.shape) if isinstance(processed, Tensor) else processed
            kind = found if isinstance(found, list) else type(found).__name__
            raise ValueError(
                f"logits_processor returned {kind}; it must return scores {list(scores.shape)}"
            )
        return processed

    def _culprit(self, processor: Any, scores: Tensor) -> str:
        """Which request a processor fails at, as far as calling it for each row alone tells."""
        ids: Any = self.ids
        for slot, row in sorted(self.seated.items()):
            with suppress(Exception):
                processor(ids[slot : slot + 1], scores[slot : slot + 1])
                continue
            return self.job.name(row)
        return f"the requests {sorted({r // self.job.copies for r in self.seated.values()})}"

    def _warn(self, slot: int, logits: list[Tensor]) -> None:
        """Say why a row had to end: it still reads its last token, so its logits are the bad."""
        row = self.seated[slot]
        why = self.mixer.why_bad(slot, logits, [m.name for m in self.runner.models])
        token = int(self.slots.results.lengths[row])
        warnings.warn(
            f"{self.job.name(row)} was ended at its token {token}: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
