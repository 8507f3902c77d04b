"""What is to be decoded: rows, what each of them reads, and what is known of each beforehand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as hf
from transformers.generation.stopping_criteria import StopStringCriteria

from .forms import Ids, Request
from .inputs import Prompts
from .members import Reference
from .runner import Shares

if TYPE_CHECKING:
    from ..blends.blend import Blend
    from .search.job import SearchJob
    from .simple.contexts import Room
    from .writing import Writing

# The names of what the kernel takes of every row. They are those of `crossfade.ops.Draw`.
DRAW = ("temperature", "top_k", "top_p", "min_p", "do_sample", "seed", "stream")

# Those of them that are whole numbers.
WHOLE = ("top_k", "seed", "stream")

# Logits processors of which each row has what it would have alone, and which keep nothing.
OF_EACH_ROW = {
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.LogitNormalization,
    hf.MinLengthLogitsProcessor,
    hf.MinNewTokensLengthLogitsProcessor,
    hf.MinPLogitsWarper,
    hf.NoBadWordsLogitsProcessor,
    hf.NoRepeatNGramLogitsProcessor,
    hf.RepetitionPenaltyLogitsProcessor,
    hf.SequenceBiasLogitsProcessor,
    hf.SuppressTokensAtBeginLogitsProcessor,
    hf.SuppressTokensLogitsProcessor,
    hf.TemperatureLogitsWarper,
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.TypicalLogitsWarper,
}


@dataclass(frozen=True, eq=False)
class Classified:
    """What the classifiers of a blend and of its references read of requests.

    Attributes:
        texts: the requests as texts and chats.
        writing: turns what rows write into texts.
        chat: what chat templates are given besides a chat.
    """

    texts: Sequence[Request]
    writing: Writing
    chat: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Drafted:
    """What guesses the tokens of some requests.

    Attributes:
        texts: of each request, the tokens that its responses may repeat; None: guesses are looked
            up in prompts and in what was written, or a blend makes them.
        blend: what makes them; None if they are looked up.
        places: of the blend's terms, then of its values, among the models of the call.
        first: the models from this place on do nothing but guess.
        length: guesses at a time; None: as many as pay.
    """

    texts: Sequence[Ids] | None = None
    blend: Blend | None = None
    places: tuple[int, ...] = ()
    first: int = 0
    length: int | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """Some requests, each with as many rows, and what is to be done with them.

    Attributes:
        prompts: what each model of the call reads: the terms', the values', the references'.
        copies: rows of each request, which stay neighbours.
        table: what is known of every row, by name: one value for all rows, or a tensor
            ``[rows, ...]``. The names are those of `DRAW`; ``limit``, the new tokens that are asked
            for; ``eos``, the tokens that end a row, filled up with -1 where a row has fewer;
            ``weights``, ``value_weights``, ``part_weights`` and ``classifier_weights`` of the
            blend; and the names that `weights_of` gives, for those of each reference and of the
            blend that guesses.
        context_room: what the contexts of the models leave of the limit.
        pad: the id that fills shorter rows of the output.
        deadline: the time, as ``time.time()`` counts it, at which the rows are cut.
        processors: makes Hugging Face's list of logits processors for a batch, from the indices of
            its rows. None: there are no processors.
        criteria: what ends rows besides EOS and the limit.
        streamer: is told every step's tokens.
        writing: what the rows write, as texts; None without a tokenizer.
        term_logprobs: whether the log-probs of every term are wanted.
        pushes: whether it is wanted what each term and value pushed.
        references: the blends that divergences are measured to.
        search: how rows are chosen by a value; None if they are not.
        numbers: the place of each request in the caller's list. None: the requests are the whole
            list.
        mixes: of each model, the weights ``[requests, adapters]`` of its mix of adapters; None for
            models without one. Empty: no model has one.
        classified: what classifiers read of the requests; None if there are none.
        draft: what guesses their tokens; None if nothing does.
        apart: whether logits processors look at each row alone, so that rows may come and go.
        tops: how many of the best tokens of each step are kept, with their log-probs.
        scope: whose the requests are. What caches hold of prompts serves rows of one scope alone.
    """

    prompts: Sequence[Prompts]
    copies: int
    table: Mapping[str, Any]
    context_room: Room
    pad: int
    deadline: float | None = None
    processors: Callable[[Sequence[int]], LogitsProcessorList] | None = None
    criteria: Sequence[Criteria] = ()
    streamer: Any = None
    writing: Writing | None = None
    term_logprobs: bool = False
    pushes: bool = False
    references: Sequence[Reference] = ()
    search: SearchJob | None = None
    numbers: Sequence[int] | None = None
    mixes: Sequence[Tensor | None] = ()
    classified: Classified | None = None
    draft: Drafted | None = None
    apart: bool = False
    tops: int = 0
    scope: str = ""

    @property
    def requests(self) -> int:
        return len(self.prompts[0].ids)

    def __len__(self) -> int:
        """How many rows there are."""
        return self.requests * self.copies

    def rows(self) -> list[Row]:
        """All rows. They are made anew at each call: rows refer to their job, and a job that kept
        them would be part of a circle, which memory is slow to give up."""
        return [Row(self, i) for i in range(len(self))]

    @cached_property
    def prompt_ids(self) -> list[tuple[Ids, ...]]:
        """Of each request, the ids that each model reads, without padding."""
        return list(zip(*(p.unpadded() for p in self.prompts), strict=True))

    @cached_property
    def request_mixes(self) -> list[tuple[Shares, ...]]:
        """Of each request, the weights of every model's mix of adapters."""
        each = [
            [None] * self.requests if x is None else list(map(tuple, x.tolist()))
            for x in self.mixes or [None] * len(self.prompts)
        ]
        return list(zip(*each, strict=True))

    @cached_property
    def limits(self) -> list[int]:
        """The new tokens that each row may have: what was asked for, as far as there is room."""
        room = self.context_room.new.repeat_interleave(self.copies)
        return torch.as_tensor(self.table["limit"], device="cpu").clamp(max=room).tolist()

    @property
    def why_each_term(self) -> str | None:
        """Why all logits of every term are needed at every step; None if they are not."""
        if self.term_logprobs:
            return "the log-probs of each term are asked for"
        if self.pushes:
            return "the pushes of each term are asked for"
        return "the divergence of each step is asked for" if self.references else None

    @property
    def why_whole(self) -> str | None:
        """Why whole rows of logits are needed at every step; None if parts of them will do."""
        if self.processors is not None:
            return "logits processors read whole rows"
        if self.references:
            return "the divergence of each step is asked for"
        if self.pushes:
            return "the pushes of each term are asked for"
        if self.classified is not None:
            return "classifiers say something of every token"
        most_entropy = self.search is not None and self.search.settings.most_entropy is not None
        return "chunks end by the entropy of whole rows" if most_entropy else None

    @property
    def why_aligned(self) -> str | None:
        """Why all rows of a batch must be at the same step; None if they need not be."""
        if self.processors is not None and not self.apart:
            return "logits processors read all rows at one step"
        if any(type(c.criterion) is not StopStringCriteria for c in self.criteria):
            return "stopping criteria read all rows at one step"
        return None if self.streamer is None else "a streamer takes all rows at one step"

    @property
    def why_in_step(self) -> str | None:
        """Why no row can wait for others, as rows do at the ends of chunks; None if they can.

        Processors of Hugging Face's that look at each row alone are asked about rows of one length
        at a time.
        """
        if self.processors is None or len(self) == 0:
            return self.why_aligned
        others = [p for p in self.processors([0]) if type(p) not in OF_EACH_ROW]
        if others:
            return f"{type(others[0]).__name__} reads all rows at one step"
        return replace(self, processors=None).why_aligned

    @property
    def watched(self) -> bool:
        """Whether the host has something to do after every step."""
        watched = self.search is not None and self.search.settings.text_end is not None
        watched |= self.classified is not None or self.draft is not None
        reads = self.processors is not None or bool(self.criteria) or self.streamer is not None
        return watched or reads


def of_any_loop(job: Job, own: Collection[type] = ()) -> Job:
    """A job whose table has a value of each row's own, so that its rows can join any loop of their
    kind, beside rows of other jobs that are drawn in other ways.

    Args:
        own: logits processors that look at each row alone, besides those of `OF_EACH_ROW`.

    Raises:
        NotImplementedError: a logits processor reads all rows at one step.
    """
    rows, table = len(job), dict(job.table)
    if job.processors is not None:
        others = [p for p in job.processors([0]) if type(p) not in OF_EACH_ROW.union(own)]
        if others:
            raise NotImplementedError(
                f"{type(others[0]).__name__} reads all rows at one step, and rows of a session "
                "come and go"
            )
    greedy = not table["do_sample"]
    table["do_sample"] = True
    for name in DRAW:
        if name != "do_sample":
            dtype = torch.int64 if name in WHOLE else torch.float32
            table[name] = torch.as_tensor(table[name]).to(dtype).expand(rows).clone()
    if greedy:
        table["temperature"] = torch.zeros(rows)
    table["limit"] = torch.as_tensor(table["limit"]).expand(rows).clone()
    return replace(job, table=table, apart=True)


# The table's names for the weights of the blend.
WEIGHTS = ("weights", "value_weights", "part_weights", "classifier_weights")


def weights_of(reference: int | None) -> list[str]:
    """The table's names for the weights of a reference; None: of the blend that guesses."""
    which = "the draft" if reference is None else f"reference {reference}"
    return [f"{name} of {which}" for name in WEIGHTS]


@dataclass(frozen=True)
class Criteria:
    """A stopping criterion, and the requests of a job whose rows it ends; None: all of them."""

    criterion: Any
    requests: frozenset[int] | None = None


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a job. Two rows are equal only if they are one object."""

    job: Job
    index: int

    @property
    def request(self) -> int:
        """Which request of the job it belongs to."""
        return self.index // self.job.copies

    @property
    def sample(self) -> int:
        """Which of its request's rows it is."""
        return self.index % self.job.copies

    @property
    def prompt_ids(self) -> tuple[Ids, ...]:
        """The ids that each model reads before the row writes. The rows of a request share them,
        as one object."""
        return self.job.prompt_ids[self.request]

    @property
    def mixes(self) -> tuple[Shares, ...]:
        """The weights of every model's mix of adapters, as `Runner.join` takes them."""
        return self.job.request_mixes[self.request]

    @property
    def classified(self) -> Classified | None:
        """What classifiers read of its request."""
        return self.job.classified

    def value(self, name: str) -> Any:
        """What the job's table has of this row."""
        found = self.job.table[name]
        return found[self.index] if isinstance(found, Tensor) else found

    @property
    def limit(self) -> int:
        """How many new tokens it may have: what was asked for, as far as there is room."""
        return self.job.limits[self.index]

    @property
    def asked_limit(self) -> int:
        """How many new tokens were asked for."""
        return int(self.value("limit"))

    @property
    def is_returned(self) -> bool:
        """Whether it is given back. Of the rows of a search, only the best of each request are: a
        search puts these first."""
        return self.job.search is None or self.sample < self.job.search.returned

    @property
    def request_name(self) -> str:
        """What warnings and errors call its request."""
        numbers = self.job.numbers
        return f"request {self.request if numbers is None else numbers[self.request]}"

    def __str__(self) -> str:
        """What warnings and errors call the row."""
        return self.request_name + (f", sample {self.sample}" if self.job.copies > 1 else "")
