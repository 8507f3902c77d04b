"""A call of a blend: the models that it runs, what they read, and the rows that are decoded."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from ..blends.blend import Blend, Model, ValueHead, as_blend
from ..blends.mixes import Mix
from ..blends.vocabulary import check_vocabularies
from ..drafts import AUTO, Draft
from ..models.value_heads import check_width
from ..search import Recipe, Search, check_search
from . import settings
from .chats import check_read
from .each import Each
from .inputs import Prompts, Requests, term_prompts
from .job import WEIGHTS, Classified, Criteria, Drafted, Job, weights_of
from .members import Members, tokenizer_of
from .mixer import row_weights
from .ranks import Ranks, ranks_of
from .search.job import SearchJob
from .simple.contexts import ModelPrompts, Room
from .simple.term_model import TermModel, term_models
from .writing import Writing, as_texts, given_tokens

Seed = int | Sequence[int] | Tensor | None


class Call:
    """A blend with its references, ready to read any number of requests.

    Args:
        tokenizer: for the members that have none.
        references: the blends that divergences are measured to, by the fields of `Output` that
            they fill.
        draft: what guesses tokens; None if nothing does.
        known: as of `term_models`.

    Attributes:
        vocabulary: how many tokens all models share.
        tokenizer: the one of what is written; None if there is none.
        models: the terms', the values', the references'.
        ranks: those that have shards of models; None where all models are whole.
    """

    def __init__(
        self,
        blend: Blend,
        tokenizer: Any = None,
        references: Mapping[str, Blend] | None = None,
        draft: Draft | None = None,
        known: dict[Hashable, TermModel] | None = None,
    ) -> None:
        self.blend, self.draft = blend, draft
        vocabulary = check_vocabularies(blend, tokenizer)
        self.tokenizer = tokenizer_of(blend, tokenizer)
        guessing = None if draft is None else draft.blend
        self.members = Members(blend, vocabulary, self.tokenizer, references, guessing)
        self.vocabulary = self.members.vocabulary
        self.models = term_models(self.members, known)
        for member, name in zip(self.members.all, self.members.names, strict=True):
            if isinstance(member, ValueHead):
                check_width(member.model, name, self.vocabulary)
        self.device = self.models[0].device
        self.ranks = ranks_of(self.models)
        self._value_models: dict[Any, TermModel] = {}

    def prompts(self, requests: Requests, pad: int = 0) -> list[Prompts]:
        """What each model reads of the requests. Values read the requests as they are.

        Raises:
            ValueError: a model has no embedding for an id.
        """
        found = []
        for member, name, model in zip(
            self.members.all, self.members.names, self.models, strict=True
        ):
            prompts = term_prompts(
                requests,
                term=name,
                tokenizer=self.tokenizer if member.tokenizer is None else member.tokenizer,
                system=member.system if isinstance(member, Model) else None,
                prompt=member.prompt if isinstance(member, Model) else None,
                pad=pad,
            )
            model.check(prompts)
            found.append(prompts)
        if requests.chat:
            tokenizers = [m.tokenizer or self.tokenizer for m in self.members.all]
            items = [p.items for p in found]
            read = list(zip(self.members.names, tokenizers, items, strict=True))
            check_read(requests.chat, read, list(map(requests.number, range(len(requests)))))
        return found

    def mixes(self, requests: Requests) -> list[Tensor | None]:
        """Of each model, the weights ``[all requests, adapters]`` of its mix of adapters.

        None for models without one.

        Raises:
            ValueError: a mix is of another number of requests.
        """
        total = requests.total or len(requests)
        return [
            model.adapter.rows(total, model.name) if isinstance(model.adapter, Mix) else None
            for model in self.models
        ]

    def writing(self, prompts: Sequence[Prompts]) -> Writing | None:
        """What turns responses to the first term's prompts into texts; None without a tokenizer."""
        return None if self.tokenizer is None else Writing(self.tokenizer, prompts[0])

    def search_job(
        self,
        search: Search | None,
        requests: Requests,
        writing: Writing | None,
        config: GenerationConfig,
        each: Each | None = None,
    ) -> SearchJob | None:
        """How these requests are searched, and how many rows of each are given back.

        Args:
            each: what the requests have of their own.
        """
        if search is None:
            return None
        of_limits: dict[int, Search] = {}
        limits = [] if each is None else each.table.get("limit", [])
        if search.budget is not None:
            if config.max_new_tokens is None:
                raise ValueError(
                    f"budget is {search.budget} and max_new_tokens is None; with a budget it must "
                    "be given, as the tokens that a row may have"
                )
            of_limits = {n: search.within(n) for n in limits or [config.max_new_tokens]}
            search = max(of_limits.values(), key=lambda s: s.rows)
        narrowest = min(of_limits.values(), key=lambda s: s.width, default=search)
        settings.check_search(narrowest, config)
        own = None
        if len(of_limits) > 1:
            own = [of_limits[limits[requests.number(i)]] for i in range(len(requests))]
        return SearchJob(
            search,
            self.blend,
            requests,
            self.tokenizer,
            writing,
            self.vocabulary,
            config.num_return_sequences,
            self._value_models,
            own,
        )

    def job(
        self,
        requests: Requests,
        prompts: Sequence[Prompts],
        copies: int,
        processors: Callable[[Sequence[int]], LogitsProcessorList],
        criteria: Sequence[Any],
        randomness: tuple[Tensor, Tensor],
        *,
        do_sample: bool,
        limits: Tensor | None = None,
        each: Each | None = None,
        search: SearchJob | None = None,
        term_logprobs: bool = False,
        **options: Any,
    ) -> Job:
        """A job from Hugging Face's lists, of which the kernel takes temperature and truncation.

        Args:
            prompts: what `self.prompts` gives for the requests.
            copies: rows of each request.
            processors: makes the list of processors for a batch, from the indices of its rows.
            criteria: Hugging Face's list.
            randomness: the seeds and the streams of all rows, as `seeds_and_streams` gives them.
            limits: new tokens of each row, in place of what the criteria say.
            each: what the requests have of their own, in place of what the lists say.
            options: fields of `Job`.
        """
        rest, sampling = settings.split_processors(
            processors(range(len(requests) * copies)), do_sample
        )
        ends = settings.split_criteria(criteria, prompts[0].ids.shape[1])

        def rest_of(rows: Sequence[int]) -> LogitsProcessorList:
            return settings.split_processors(processors(rows), do_sample)[0]

        seeds, streams = randomness
        eos = torch.tensor(ends.eos, dtype=torch.int64, device=self.device)
        table: dict[str, Any] = {
            **vars(sampling),
            "seed": seeds,
            "stream": streams,
            "limit": ends.limit if limits is None else limits,
            "eos": eos.expand(len(seeds), -1),
            **self._weights(requests, copies),
        }
        own_criteria: list[Criteria] = []
        if each is not None:
            own = each.part(requests)
            for name, x in own.table.items():
                dtype = torch.int64 if name in ("top_k", "limit") else torch.float32
                of_requests = torch.tensor(x, dtype=dtype, device="cpu")
                table[name] = of_requests.repeat_interleave(copies)
            own_criteria = own.criteria(self.tokenizer)
        longest = int(torch.as_tensor(table["limit"], device="cpu").max())
        if self.ranks is not None and ends.deadline is not None:
            raise NotImplementedError(
                "max_time is set, and models are in shards on several ranks; it must be None: the "
                "ranks would end at different tokens"
            )
        return Job(
            prompts=prompts,
            copies=copies,
            table=table,
            context_room=self._room(requests, prompts, search, longest),
            deadline=ends.deadline,
            processors=rest_of if rest else None,
            criteria=[*map(Criteria, ends.others), *own_criteria],
            numbers=requests.numbers,
            mixes=[None if x is None else requests.part_of(x) for x in self.mixes(requests)],
            term_logprobs=term_logprobs or (search is not None and search.needs_term_logprobs),
            references=self.members.references,
            search=search,
            classified=self.classified(requests, prompts),
            draft=self._drafted(requests, prompts),
            **options,
        )

    def _drafted(self, requests: Requests, prompts: Sequence[Prompts]) -> Drafted | None:
        """What guesses the tokens of these requests."""
        if self.draft is None:
            return None
        length = None if self.draft.length == AUTO else int(self.draft.length)
        texts: list[list[int]] | None = None
        if self.draft.texts is not None:
            total = requests.total or len(requests)
            if len(self.draft.texts) != total:
                raise ValueError(
                    f"draft.texts has {len(self.draft.texts)} entries; it must have {total}, one a "
                    "request (None for a request without one)"
                )
            writing, texts = self.writing(prompts), []
            for i, given in enumerate(requests.part_of(self.draft.texts)):
                name = f"draft.texts[{requests.number(i)}]"
                if given is None:
                    texts.append([])
                else:
                    texts.append(given_tokens(name, given, i, writing, self.vocabulary))
        return Drafted(texts, self.draft.blend, self.members.draft, self.members.judges, length)

    def classified(self, requests: Requests, prompts: Sequence[Prompts]) -> Classified | None:
        """What classifiers read of these requests; None if blend and references have none."""
        blends = (self.blend, *(r.blend for r in self.members.references))
        names = [name for blend in blends for name in blend.classifier_names]
        if not names:
            return None
        writing = self.writing(prompts)
        if writing is None:
            raise ValueError(
                f"tokenizer is None; the classifier {names[0]} reads texts: give Model(..., "
                "tokenizer=...) or tokenizer=..."
            )
        return Classified(as_texts(requests.items, self.tokenizer), writing, requests.chat)

    def _weights(self, requests: Requests, copies: int) -> dict[str, Any]:
        """The weights of the blend and of its references, as a job's table has them."""
        found: dict[str, Any] = {}
        total = requests.total or len(requests)
        guessing = None if self.draft is None else self.draft.blend
        for names, blend in (
            (WEIGHTS, self.blend),
            *((weights_of(i), r.blend) for i, r in enumerate(self.members.references)),
            *(() if guessing is None else ((weights_of(None), guessing),)),
        ):
            each = row_weights(blend, total, self.device)
            for name, weights in zip(names, each, strict=True):
                if isinstance(weights, Tensor):
                    found[name] = requests.part_of(weights).repeat_interleave(copies, 0)
                else:
                    found[name] = weights
        return found

    def _room(
        self,
        requests: Requests,
        prompts: Sequence[Prompts],
        search: SearchJob | None,
        limit: int,
    ) -> Room:
        """What is left of a limit of new tokens by the contexts of all models, a value's too."""
        deciding = self.models[: self.members.judges]  # Others guess as long as they have room.
        each = [ModelPrompts(*pair) for pair in zip(deciding, prompts, strict=False)]
        for question, sources in () if search is None else search.questions:
            for s in sources:
                own_tokens = s.writing is not None or s.whole is not None
                unread = None if own_tokens else int(question.predicted)
                each.append(ModelPrompts(s.model, s.padded, unread))
        return Room(each, len(prompts[0].ids), limit, requests.refused)


def blend_and_search(blend: Any, search: Any) -> tuple[Blend, Search | None]:
    """What is decoded, and how it is searched: a `Recipe` brings both."""
    if isinstance(blend, Recipe):
        if search is not None:
            raise ValueError("search is given twice: in the Recipe and as an argument")
        return blend.blend, blend.search
    if search is not None:
        check_search(search)
    return as_blend(blend), search


def seeds_and_streams(
    seed: Seed,
    requests: int,
    copies: int,
    do_sample: bool,
    device: torch.device,
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """The seed and the stream of every row, int64 ``[requests * copies]``.

    Args:
        ranks: that take part; where there is no seed, all have the first one's.
    """
    drawn = 0
    if seed is None and do_sample:  # Greedy decoding leaves torch's generator as in Hugging Face.
        drawn = int(torch.randint(2**63 - 1, (), device="cpu"))
    if ranks is not None:
        seed = ranks.seed_of_all(seed, drawn)
    seed = drawn if seed is None else seed
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.dtype == torch.bool or seed.dim() > 1:
            raise TypeError(
                f"seed is a {seed.dtype} tensor {list(seed.shape)}; it must be an int tensor, one "
                "a request"
            )
        each = seed.long().cpu()  # The kernels take a seed's bits as an int64.
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        each = torch.tensor([_bits(f"seed[{i}]", s) for i, s in enumerate(seed)], device="cpu")
    else:
        each = torch.tensor(_bits("seed", seed), device="cpu")
    if each.dim() == 1 and len(each) != requests:
        raise ValueError(f"seed has {len(each)} entries; it must have {requests}, one a request")
    numbers = torch.arange(requests, device="cpu")  # The default device may be another one.
    of_requests = torch.zeros_like(numbers) if each.dim() else numbers
    of_samples = torch.arange(copies, device="cpu") << 32
    streams = (of_requests[:, None] + of_samples[None, :]).flatten()
    return each.expand(requests).repeat_interleave(copies).to(device), streams.to(device)


def _bits(name: str, seed: Any) -> int:
    """A seed within [0, 2^64), as the int64 that has the same bits."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} is {seed!r}; it must be an int")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} is {seed}; it must be within [0, 2^64)")
    return seed - 2**64 if seed >= 2**63 else seed
