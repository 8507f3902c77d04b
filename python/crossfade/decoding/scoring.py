"""`crossfade.score`: log-probs of given responses under a blend."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import elsewhere
from ..blends.blend import as_blend
from ..checks import explained
from ..models.hf import is_multimodal
from ..ops import check
from .call import Call
from .chats import template_arguments
from .engine.asked import Asked
from .engine.batching import Cost, batches, max_tokens
from .engine.branches import Branches
from .engine.modules import Unsupported
from .engine.prefill import Prefill
from .figures import Figures, Mixing
from .forms import tensor, token_ids
from .inputs import read_requests
from .members import references_of
from .memory import is_out_of_memory
from .output import Scores
from .ranks import kind_of, together
from .settings import check_int
from .simple.contexts import check_context
from .simple.term_model import TermModel
from .stats import ModelStats, Stats, since, summed
from .writing import Writing, given_tokens

MAX_LOGITS = 1 << 27  # the most numbers of logits that are held at once, of all models together
# The part of all tokens that must be saved for the engine to read what texts begin with alike once.
WORTH_SHARING = 0.25


@explained(elsewhere.SCORE)
def score(
    blend: Any,
    prompts: Any,
    responses: Any,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    max_batch: int | None = None,
    return_term_logprobs: bool = False,
    kl_to: Any = None,
    top_logprobs: int = 0,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Scores:
    """Teacher-forced log-probs of `responses` after `prompts` under a blend at temperature 1.

    They are the `logprobs` that `crossfade.generate` gives when it writes the same tokens, and
    serve perplexities, harnesses and importance weights. A list may be of any length. Requests of
    about one length share a forward, of so many that activations and logits ``[requests, tokens,
    V]`` stay bounded; those of one request are held at once. Where that saves a quarter of the
    work, the engine reads a prompt of several responses, and what prompts begin with alike, only
    once. A model whose rows depend on what is beside them (by recurrent states, or RoPE frequencies
    that change with the length) reads each row alone, a token of the response at a time, as it
    would write it.

    Args:
        blend: a `Blend`, a `Model` or a bare Hugging Face causal LM.
        prompts: as `inputs` of `crossfade.generate`; every term reads its own.
        responses: one a prompt (or one alone): lists of token ids, as `Output.responses` gives
            them, or texts, as `Output.text` does. The tokens of a text are those by which prompt
            and response together go on from the first term's prompt, without an EOS. Where a token
            would span the two, the prompt stays as it is, and the response is encoded as if after a
            character that it shares no token with. In a chat it is the content of an answer.
        max_batch: how many requests share a forward, at most; None: as many as memory is meant for.
        top_logprobs: how many of the best tokens at each place are given, with their log-probs.
        tokenizer, attention_mask, return_term_logprobs, kl_to, tools, chat_template_kwargs: as in
            `crossfade.generate`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    scoring = Scoring(
        blend,
        prompts,
        responses,
        tokenizer=tokenizer,
        attention_mask=attention_mask,
        max_batch=max_batch,
        return_term_logprobs=return_term_logprobs,
        kl_to=kl_to,
        top_logprobs=top_logprobs,
        tools=tools,
        chat_template_kwargs=chat_template_kwargs,
    )
    return scoring.scores()


class Scorer:
    """A blend that scores several times, and keeps what it has read from one time to the next.

    Prompts that begin like earlier ones are read on from there, so that a judge which is asked
    round after round reads each context and each answer in its place once::

        with Scorer(blend, tokenizer=tokenizer) as scorer:
            first = scorer.score(prompts, responses)
            second = scorer.score(other_prompts, other_responses)

    What is kept are rows of the engine's caches, as many as memory is meant for, until the end of
    the `with`. Outside of one nothing is kept, and each `score` is that of the module. Prompts may
    be token ids, the same for all models, or texts and chats, of which each term makes its own.

    Several responses to one prompt cost no more than one if they differ in their last token alone:
    log-probs of the labels A and B after n prompts are ``scorer.score([p for p in prompts for _ in
    "AB"], [[a], [b]] * n).logprobs[:, 0].view(n, 2)``, for which n rows go through the head.

    Where a model's weights, hooks or active adapters have changed since the last time, what it has
    read is forgotten, and a note in `Scores.stats` says so.

    Args:
        blend, tokenizer, max_batch, return_term_logprobs, kl_to: as in `score`.
    """

    def __init__(
        self,
        blend: Any,
        *,
        tokenizer: Any = None,
        max_batch: int | None = None,
        return_term_logprobs: bool = False,
        kl_to: Any = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "tokenizer": tokenizer,
            "max_batch": max_batch,
            "return_term_logprobs": return_term_logprobs,
            "kl_to": kl_to,
        }
        self.blend = blend
        self._branches: Branches | None = None

    def __enter__(self) -> Scorer:
        self._branches = Branches(kept=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._branches = None

    def score(
        self,
        prompts: Any,
        responses: Any,
        *,
        attention_mask: Tensor | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Scores:
        """The log-probs of responses, as `score` gives them.

        Raises:
            TypeError, ValueError: as `score`; or another call within the same `with` is under way.
        """
        scoring = Scoring(
            self.blend,
            prompts,
            responses,
            attention_mask=attention_mask,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            branches=self._branches,
            **self._arguments,
        )
        return scoring.scores()


class Scoring:
    """Requests whose responses are scored. `score` describes the arguments and their errors.

    Args:
        branches: what reads on from what it has read for other requests; None: nothing is kept.
    """

    def __init__(
        self,
        blend: Any,
        prompts: Any,
        responses: Any,
        *,
        tokenizer: Any = None,
        attention_mask: Tensor | None = None,
        max_batch: int | None = None,
        return_term_logprobs: bool = False,
        kl_to: Any = None,
        top_logprobs: int = 0,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        branches: Branches | None = None,
    ) -> None:
        with together(blend):
            blend = as_blend(blend)
            check.flag("return_term_logprobs", return_term_logprobs)
            check_int("max_batch", max_batch, 1)
            check_int("top_logprobs", top_logprobs, 0)
            call = Call(blend, tokenizer, references_of(blend, kl_to))
            self.members, self.models, self.max_batch = call.members, call.models, max_batch
            requests = read_requests(
                prompts,
                attention_mask,
                multimodal=is_multimodal(blend.terms[0].model),
                name="prompts",
            )
            requests = replace(requests, chat=template_arguments(tools, chat_template_kwargs))
            read = call.prompts(requests)
            writing = call.writing(read)
            self.responses = _responses(responses, writing, len(requests), call.vocabulary)
            for model, prompt in zip(self.models, read, strict=True):
                check_context(model, prompt.mask.sum(dim=1), self.responses)
            self.prompts = [*zip(*(p.unpadded() for p in read), strict=True)]
            self.mixes = call.mixes(requests)
            self.mixing = Mixing(
                blend,
                self.members,
                len(requests),
                call.device,
                return_term_logprobs,
                call.classified(requests, read),
                max(map(len, self.responses)),
                top_logprobs,
            )
            if call.ranks is not None:
                call.ranks.check_same(
                    {
                        "the list of prompts": [
                            [list(ids) for ids in each] for each in self.prompts
                        ],
                        "the list of responses": [list(ids) for ids in self.responses],
                        "the kind of blend": kind_of(blend),
                        "max_batch": max_batch,
                        "return_term_logprobs": return_term_logprobs,
                        "top_logprobs": top_logprobs,
                        "kl_to": [kind_of(r.blend) for r in call.members.references],
                    }
                )
        self.branches = Branches() if branches is None else branches
        self._stats: Stats | None = None

    @torch.no_grad()
    def each(self) -> Iterator[tuple[int, Figures]]:
        """Yields the place of each request and its figures, as soon as it is read."""
        start, before = time.perf_counter(), self.branches.models_stats
        self._apart: list[ModelStats] = []
        self._notes: list[str] = []
        size = 0
        for requests, logits in self._read():
            responses = [self.responses[i] for i in requests]
            for i, figures in zip(
                requests, self.mixing.figures(requests, logits, responses), strict=True
            ):
                size += sum(x.nbytes for x in figures)
                yield i, figures
        runner, device = self.branches.runner, self.mixing.device
        cached, peak = (0, 0) if runner is None else (runner.cache_bytes, runner.peak_bytes)
        classifiers = self.mixing.each_classifier
        cached += sum(c.reader.cache_bytes for c in classifiers)
        peak += sum(c.reader.peak_bytes for c in classifiers)
        asked = [s for c in classifiers for s in c.reader.stats()]
        on_gpu = device.type == "cuda"
        self._stats = Stats(
            tokens=sum(map(len, self.responses)),
            seconds=time.perf_counter() - start,
            models=summed([*since(before, self.branches.models_stats), *self._apart, *asked]),
            cache_bytes=cached,
            peak_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else peak + size,
            notes=(*self.branches.notes, *self._notes, *(n for c in classifiers for n in c.notes)),
        )

    def scores(self) -> Scores:
        """The figures of all requests."""
        found = dict(self.each())
        each = zip(*(found[i] for i in range(len(found))), strict=True)
        log_p, ranks, terms, kl, *best = (pad_sequence(list(x), batch_first=True) for x in each)
        top_tokens, top_logprobs = best if self.mixing.tops else (None, None)
        assert self._stats is not None
        return Scores(
            logprobs=log_p,
            ranks=ranks,
            lengths=torch.tensor([len(r) for r in self.responses], device=log_p.device),
            stats=self._stats,
            term_logprobs=terms if self.mixing.terms else None,
            kl=kl if self.members.references else None,
            top_tokens=top_tokens,
            top_logprobs=top_logprobs,
        )

    def _read(self) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        """Requests that are read together, and each model's logits ``[requests, tokens, V]`` before
        each token of their responses, padded on the left."""
        unread = dict.fromkeys(range(len(self.responses)))
        asked = Asked(self.prompts, self.responses)
        worth = self.branches.kept or asked.saved >= WORTH_SHARING
        if worth and any(x is not None and bool((x != x[:1]).any()) for x in self.mixes):
            self._notes.append("nothing is shared: requests have mixes of adapters of their own")
        elif worth:
            try:
                for requests, logits in self.branches.read(
                    self.models, asked, MAX_LOGITS, self.max_batch
                ):
                    yield requests, logits
                    for i in requests:
                        del unread[i]
            except Unsupported as why:  # It reads each text whole.
                self._notes.append(f"nothing is shared: {why}")
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # Caches take memory that whole texts do not.
                self._notes.append("memory ran out: what was left was read text by text")
                self.branches.free()
        yield from self._read_apart([*unread])

    def _read_apart(self, requests: Sequence[int]) -> Iterator[tuple[Sequence[int], list[Tensor]]]:
        """What `_read` gives, where each text is read whole."""
        readers = []
        for k, model in enumerate(self.models):
            texts = [[*self.prompts[i][k], *self.responses[i]] for i in requests]
            firsts = [len(self.prompts[i][k]) for i in requests]
            mixes = self.mixes[k]
            of_texts = None if mixes is None else mixes[[*requests]]
            readers.append(_Reader(model, texts, firsts, of_texts))
        for now in batches(
            *(Cost([*map(len, r.texts)], max_tokens(r.prefill.model.device)) for r in readers),
            Cost([*map(sum, zip(*(r.numbers for r in readers), strict=True))], MAX_LOGITS),
            Cost([1] * len(requests), self.max_batch or math.inf),
        ):
            yield [requests[i] for i in now], [reader.logits(now) for reader in readers]
        self._apart = [s for r in readers if (s := r.prefill.stats()).forwards]


class _Reader:
    """A model and the texts that it reads: its own prompts, each with the response after it.

    Args:
        firsts: where the response begins in each text.
        mixes: of each text, as in `TermModel.seat`.
    """

    def __init__(
        self,
        model: TermModel,
        texts: list[list[int]],
        firsts: list[int],
        mixes: Tensor | None = None,
    ) -> None:
        self.prefill, self.mixes = Prefill(model), mixes
        self.texts, self.firsts = texts, firsts
        self.numbers = [
            self.prefill.numbers(len(text), len(text) - first)
            for text, first in zip(texts, firsts, strict=True)
        ]

    def logits(self, texts: Sequence[int]) -> Tensor:
        """``[texts, tokens, V]`` before each token of the responses, padded on the left."""
        return self.prefill.batch_logits(
            [self.texts[i] for i in texts],
            [self.firsts[i] for i in texts],
            mixes=None if self.mixes is None else self.mixes[[*texts]],
        )


def _responses(
    responses: Any, writing: Writing | None, requests: int, vocabulary: int
) -> list[list[int]]:
    """The token ids of each response, checked.

    Raises:
        TypeError, ValueError: names the response, what it was and what it must be.
    """
    if isinstance(responses, str) or token_ids("responses", responses) is not None:
        responses = [responses]
    elif hasattr(responses, "tolist"):  # It is a tensor or an array, with a response in each row.
        responses = tensor("responses", responses)
        responses = list(responses) if responses.dim() else responses
    if not isinstance(responses, Sequence):
        raise TypeError(
            f"responses is a {type(responses).__name__}; it must be a list of texts or of token ids"
        )
    if len(responses) != requests:
        raise ValueError(
            f"responses has {len(responses)} entries; it must have {requests}, one a prompt"
        )
    rows = []
    for i, given in enumerate(responses):
        name = f"responses[{i}]"
        response = given_tokens(name, given, i, writing, vocabulary)
        if not response:
            raise TypeError(f"{name} is {given!r:.80}; it must be a text or token ids, not empty")
        rows.append(response)
    return rows
