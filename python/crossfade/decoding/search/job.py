"""How requests are searched: which models and functions score a row, and what these read of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...blends.blend import Blend, Model, ValueHead
from ...blends.classifier import Classifier
from ...blends.mixes import Mix
from ...blends.values import LogRatio, Reward, RewardModel
from ...blends.vocabulary import check_vocabularies, vocabulary
from ...models.hf import is_scalar
from ...models.value_heads import check_width
from ...search import Search
from ..chats import plain_text
from ..forms import Ids, Request, is_ids
from ..inputs import Prompts, Requests, encode, left_pad, term_prompts
from ..job import Row
from ..simple.term_model import TermModel, reads_request
from ..writing import Writing, as_texts
from .readers import Question, log_prob, q_value, scalar

if TYPE_CHECKING:
    from .candidates import Candidates
    from .finished import Finished

NOTHING = [0]  # what is read in place of a text without tokens, whose answer is not used


@dataclass(frozen=True)
class SearchJob:
    """How the requests of a job are searched.

    Attributes:
        settings: of the request that has the most rows: those of all, where none keeps its budget
            with fewer.
        writing: turns what rows write into texts; None without a tokenizer.
        vocabulary: how many tokens the blend's models share.
        returned: how many rows of each request are given back.
        models: those of the value, by the `Model`, `ValueHead` or `RewardModel` that each is of.
            All jobs of a call share them.
        own: the settings of each request, where not all have the same.
    """

    settings: Search
    blend: Blend
    requests: Requests
    tokenizer: Any
    writing: Writing | None
    vocabulary: int
    returned: int
    models: dict[Any, TermModel] = field(default_factory=dict)
    own: Sequence[Search] | None = None

    def of(self, request: int) -> Search:
        """The settings of a request."""
        return self.settings if self.own is None else self.own[request]

    @cached_property
    def weights(self) -> Tensor:
        """What each part of the value counts for each request: ``[requests, parts]`` float64."""
        value, requests = self.settings.objective, self.requests
        if value is None:
            return torch.zeros(len(requests), 0, dtype=torch.float64, device="cpu")
        return requests.part_of(value.row_weights(requests.total or len(requests)))

    @property
    def parts(self) -> list[tuple[Any, str]]:
        """The parts of the value, and their names."""
        value = self.settings.objective
        return [] if value is None else list(zip(value.values, value.names, strict=True))

    @cached_property
    def questions(self) -> list[tuple[Question, list[Source]]]:
        """The questions that the value asks about what rows write, and the models that it asks.

        Models of one question may share forwards. Prompts are encoded here, so that an error in
        them is raised before decoding.
        """
        log_probs: dict[int, tuple[Question, list[Source]]] = {}
        heads: dict[Hashable, tuple[Question, list[Source]]] = {}
        others = []
        for value, name in self.parts:
            if isinstance(value, LogRatio):
                columns = check_vocabularies(value.tuned + value.ref)
                own = value.tuned.tokenizer or value.ref.tokenizer
                if value == self.settings.tilt:  # It is about the tokens that were drawn.
                    own = None
                for role, model in (("tuned", value.tuned), ("ref", value.ref)):
                    known = [s.key for _, sources in log_probs.values() for s in sources]
                    if model in self.blend.terms or model in known:
                        continue
                    source = self._source(model, f"{name}.{model.name or role}", own)
                    of_blend = source.writing is None  # whether it reads the blend's own tokens
                    question = log_prob(self.vocabulary if of_blend else columns)
                    log_probs.setdefault(id(None if of_blend else own), (question, []))[1].append(
                        source
                    )
            elif isinstance(value, ValueHead):
                check_width(value.model, name, 1 if value.tokenizer else self.vocabulary)
                source = self._source(value, name, value.tokenizer)
                one = is_scalar(source.model.bare)
                reads = None if source.writing is None else id(value.tokenizer)
                heads.setdefault(
                    (one, reads, source.model.backbone), (scalar() if one else q_value(), [])
                )[1].append(source)
            elif isinstance(value, RewardModel):
                others.append((scalar(value.label), [self._reward(value, name)]))
        return [*log_probs.values(), *heads.values(), *others]

    def __post_init__(self) -> None:
        """Make what the value needs, so that an error in it is raised before decoding."""
        self._check_tilt()
        _ = self.weights, self.questions
        needs_text = any(isinstance(value, Reward) for value, _ in self.parts)
        if needs_text or self.settings.objective is None or self.settings.text_end is not None:
            _ = self.texts

    def heads(self, *, scalar: bool) -> list[TermModel]:
        """The value heads that read the blend's own tokens, so that they may ride on its rows.

        Args:
            scalar: whether scalar heads are among them.
        """
        each = [s for _, sources in self.questions for s in sources]
        return [
            s.model
            for s in each
            if isinstance(s.key, ValueHead)
            and s.writing is None
            and (scalar or not is_scalar(s.model.bare))
        ]

    def _check_tilt(self) -> None:
        """Require that a tilt's `ref` is what proposes, and that its `tuned` reads the same tokens.

        Raises:
            ValueError: says which it is.
        """
        tilt, blend = self.settings.tilt, self.blend
        if tilt is None:
            return
        one = isinstance(blend.weights[0], float) and blend.weights[0] == 1
        others = blend.values or blend.classifiers or blend.parts or blend.support
        plain = one and not others
        if blend.terms != (tilt.ref,) or not plain:
            raise ValueError(
                f"tilt is {tilt}, and what proposes is {blend}; its second model must be the one "
                "that proposes, alone: it is that density that a tilt corrects"
            )
        target = replace(tilt.tuned, name=tilt.tuned.name or "target")
        try:
            check_vocabularies(target + replace(tilt.ref, name=tilt.ref.name or "sampler"))
        except ValueError as error:
            raise ValueError(
                f"tilt is over two vocabularies, and must be over one, whose tokens both models "
                f"score: {error}"
            ) from None

    @property
    def needs_term_logprobs(self) -> bool:
        """Whether a log-ratio needs log-probs of the blend's terms, which decoding then keeps."""
        ratios = [v for v, _ in self.parts if isinstance(v, LogRatio)]
        return any(m in self.blend.terms for v in ratios for m in (v.tuned, v.ref))

    @cached_property
    def texts(self) -> list[Request]:
        """The requests as texts and chats: those given as ids are decoded.

        Where responses are texts already, as they are without a blend, only that needs a tokenizer.
        """
        if self.tokenizer is None and (self.blend.terms or any(map(is_ids, self.requests.items))):
            reader = "judge" if self.settings.objective is None else "value"
            raise ValueError(
                f"tokenizer is None; the {reader} reads texts: give Model(..., tokenizer=...) or "
                "tokenizer=..."
            )
        return as_texts(self.requests.items, self.tokenizer)

    def _source(self, member: Model | ValueHead, name: str, own: Any) -> Source:
        """A model of the value that reads prompts and responses as a language model.

        Args:
            name: what errors call it.
            own: the tokenizer of its ids; None if they are the blend's.
        """
        tokenizer = own or self.tokenizer
        if own is None or self.tokenizer is None or _same(own, self.tokenizer):
            own = None
        prompts = term_prompts(
            self.requests if own is None else replace(self.requests, items=self.texts, padded=None),
            term=name,
            tokenizer=tokenizer,
            system=getattr(member, "system", None),
            prompt=getattr(member, "prompt", None),
        )
        adapter = getattr(member, "adapter", "active")
        model = self._model(member, name, adapter, tokenizer, reads_request(member))
        model.check(prompts)
        return Source(member, model, prompts, None if own is None else Writing(own, prompts))

    def _model(
        self,
        member: Any,
        name: str,
        adapter: str | Mix | None = "active",
        tokenizer: Any = None,
        reads_request: bool = False,
    ) -> TermModel:
        if isinstance(adapter, Mix) and adapter.requests is not None:
            raise NotImplementedError(
                f"adapter of {name} is a mix with weights [{adapter.requests}]; in a value it must "
                "have numbers, unless the value's model is a term of the blend"
            )
        if member not in self.models:
            self.models[member] = TermModel(
                member.model, name, adapter, tokenizer=tokenizer, reads_request=reads_request
            )
        return self.models[member]

    def _reward(self, value: RewardModel, name: str) -> Source:
        """A reward model, which reads prompt and response as one text."""

        def whole(request: int, response: str) -> Ids:
            return read_whole(value, name, self.texts[request], response, self.requests.chat)

        # A place in a cache begins with a token, also where a template leaves the prompt out.
        prompts = left_pad([whole(r, "") or NOTHING for r in range(len(self.texts))], 0)
        model = self._model(value, name)
        model.check(prompts)
        return Source(value, model, prompts, whole=whole)


@dataclass(frozen=True)
class Source:
    """A model of a value, and how it reads a row.

    Attributes:
        key: the `Model`, `ValueHead` or `RewardModel` that it is.
        padded: what it reads of every request before the response.
        writing: turns texts into its own tokens, where these are not the blend's.
        whole: for a reward model: gives what it reads of a request, by its number, and a response,
            as a text.
    """

    key: Any
    model: TermModel
    padded: Prompts
    writing: Writing | None = None
    whole: Callable[[int, str], Ids] | None = None

    @cached_property
    def prompts(self) -> list[list[int]]:
        return self.padded.unpadded()

    def texts(self, candidates: Candidates | Finished) -> list[Ids]:
        """What it reads of each candidate. All are of its own job."""
        requests = candidates.requests
        if self.whole is not None:
            return list(map(self.whole, requests, candidates.texts))
        responses: Sequence[Ids] = candidates.tokens
        if self.writing is not None:
            eos = getattr(self.writing.tokenizer, "eos_token_id", None)
            end = [] if eos is None else [eos]
            encoded = self.writing.tokens(requests, candidates.texts)
            responses = [
                [*ids, *end] if ended else ids
                for ids, ended in zip(encoded, candidates.finished, strict=True)
            ]
        return [[*self.prompts[r], *ids] for r, ids in zip(requests, responses, strict=True)]


def read_whole(
    value: RewardModel | Classifier,
    name: str,
    prompt: Request,
    response: str,
    chat: Mapping[str, Any],
) -> Ids:
    """A prompt and its response as a reward model reads them, `chat` with its chat template."""
    if value.template is not None:
        text = value.template(prompt, response)
        if not isinstance(text, str):
            raise TypeError(
                f"the template of {name} returned {text!r:.80}; it must return the text to read"
            )
        return encode(text, value.tokenizer, name)
    if isinstance(prompt, str):
        return encode(prompt + response, value.tokenizer, name)
    *turns, last = prompt
    if last["role"] == "assistant":
        answer = {**last, "content": (plain_text(last.get("content")) or "") + response}
    else:
        turns, answer = prompt, {"role": "assistant", "content": response}
    return encode([*turns, answer], value.tokenizer, name, chat, whole=True)


def _same(a: Any, b: Any) -> bool:
    """Whether two tokenizers have one vocabulary."""
    return a is b or vocabulary(a).digest == vocabulary(b).digest


def search_of(row: Row) -> SearchJob:
    """The search of a row's job, which has one."""
    assert row.job.search is not None
    return row.job.search
