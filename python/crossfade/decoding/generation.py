"""`crossfade.generate`: Hugging Face's `generate` for a blend."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .. import elsewhere
from ..blends.algebra import Algebra
from ..checks import explained, warn
from ..drafts import Draft, check_draft
from ..models.hf import is_multimodal, underlying
from ..ops import check
from ..search import Search
from . import settings
from .call import Call, Seed, blend_and_search, seeds_and_streams
from .chats import template_arguments
from .driver import Driver
from .each import STOPS, stop_criterion, take_each
from .ends import check_ids
from .engine.options import Engine, check_engine
from .engine.prefix import PrefixCache
from .inputs import Requests, read_requests
from .job import Job
from .members import references_of
from .output import Output
from .ranks import together
from .results import output_of
from .simple.term_model import TermModel
from .streaming import Stream, check_streamer


@explained(elsewhere.GENERATE)
def generate(
    blend: Any,
    inputs: Any,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    streamer: Any = None,
    seed: Seed = None,
    return_term_logprobs: bool = False,
    return_pushes: bool = False,
    kl_to: Any = None,
    return_kl_to_base: bool = False,
    max_batch: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
    engine: Engine | None = None,
    cache: PrefixCache | None = None,
    return_cache: bool = False,
    search: Search | None = None,
    draft: Draft | None = None,
    tools: Sequence[Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Output | Tensor:
    """Decode a blend, with the arguments of Hugging Face's ``model.generate``.

    Each argument means what it means there; one that is not supported raises. The first term's
    model gives the saved generation config, and its prompt is the one in `sequences`. One default
    differs: top-k is off unless the caller or the saved config sets it. With one term, greedy
    tokens are those of ``model.generate``.

    Every term and value has a context, as its config says. A row whose prompt is longer than one
    fails, and a row that fills one ends there; a RuntimeWarning names it, and others go on.

    Logits processors read the first term's prompt and response and the blended logits (for
    ``power != 0``, log-probs); `logprobs` are the blend's own, before them.

    Args:
        blend: a `Blend`, a `Model`, a bare Hugging Face causal LM, or a `Recipe`, which brings its
            `search`.
        inputs: a text, a chat, token ids, a list of one of these, or a left-padded tensor or
            mapping of `input_ids` and `attention_mask`. Texts are read as they are; a term with a
            system prompt reads them as a chat.
        tokenizer: for terms that have none, for `stop_strings` and for `Output.text`; by default
            the first one that a term has.
        attention_mask: as in `inputs`.
        generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn, streamer:
            as in Hugging Face.
        seed: an int: request i draws from stream i. One int a request: each has its own draws,
            wherever it is in the batch. None takes one from torch's generator. Sample j of a
            request (`num_return_sequences`) draws from stream ``i + (j << 32)``.
        return_term_logprobs: also give each term's log-prob of each token.
        return_pushes: also give what each term and value did for each token, as `Output.pushes`. A
            blend with a power or with parts (clamps, unions) is no sum of such pushes.
        kl_to: a blend, a `Model` or a bare model: also give each step's divergence from it, as
            `Output.kl`. Its models need not be in the blend: those that the blend does not run
            are run beside it. Its tensors of weights are ``[requests]`` too.
        return_kl_to_base: the same for the first term alone, as `Output.kl_to_base`.
        max_batch: rows decoded at a time; one that ends gives its place to the next, so that a
            long list runs at the rate of a full batch. None takes 32 on CPUs and 64 on GPUs.
            Where logits processors or stopping criteria read all rows at one step, rows go in
            batches of whole requests, by default all at once; with a streamer, always all at once.
        progress: show a bar on stderr; by default where there are more rows than `max_batch`. Or a
            function that is called with how many rows have ended since its last call.
        engine: how the models are run; see `Engine`.
        cache: `Output.cache` of an earlier call of the same models and rows: of each prompt, no
            model reads again what it read there. Prompts are given whole.
        return_cache: also give `Output.cache`. All rows are decoded at a time then.
        search: how rows are chosen by a value or a judge; see `ChunkBeamSearch`, `BestOfN`,
            `ParticleFilter` and `Tournament`. It samples ``search.rows`` rows a request, all of
            them counted by `max_batch`, and gives the `num_return_sequences` best.
        draft: what guesses tokens, which all models then check in one forward; see `Draft`. The
            tokens are the same, sooner. Where rows are to stay at one step, as with processors that
            read all of them, a forward yields what all of them drew as it was guessed.
        tools: what a chat may call: functions with docstrings and type hints, or JSON schemas, as
            ``apply_chat_template`` takes them. Every term's chat template gets them.
        chat_template_kwargs: what else chat templates are given, such as
            ``{"enable_thinking": False}``. What no template reads is refused.
        **arguments: the fields of ``GenerationConfig``. `temperature`, `top_k`, `top_p`, `min_p`,
            `max_new_tokens` and `stop_strings` may be lists with an entry for each request; stop
            strings then are lists of texts, or None. A row of temperature 0 is greedy.

    Returns:
        `Output`; the tensor `sequences` alone if ``return_dict_in_generate=False`` is passed.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
        NotImplementedError: names what is not supported.
    """
    if isinstance(inputs, (Algebra, nn.Module)):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}; the blend comes first: generate(blend, inputs)"
        )
    with together(blend):
        generation = Generation(
            blend,
            tokenizer=tokenizer,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            streamer=streamer,
            return_term_logprobs=return_term_logprobs,
            return_pushes=return_pushes,
            kl_to=kl_to,
            return_kl_to_base=return_kl_to_base,
            search=search,
            draft=draft,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            arguments=arguments,
        )
        check_running(max_batch, progress, engine)
        check_draft(draft, simple=engine is not None and engine.simple)
        check.flag("return_cache", return_cache)
        if cache is not None and not isinstance(cache, PrefixCache):
            raise TypeError(
                f"cache is a {type(cache).__name__}; it must be the cache of an Output, which "
                "return_cache=True gives"
            )
        requests = generation.read(inputs, attention_mask)
        job = generation.job(requests, seed)
        whole = cache is not None or return_cache
        check_together(len(job), max_batch, streamer, whole=whole)
        if whole and engine is not None and engine.simple:
            raise ValueError("engine is simple, which has no cache to keep; leave it out")
        driver = Driver(
            generation.call.blend,
            generation.call.models,
            generation.call.vocabulary,
            engine or Engine(),
            max_batch,
            progress,
            cache,
            return_cache,
        )
    written = list(driver.decode([job]))
    if driver.interrupted:
        ended = sum(w.ended for w in written)
        warn(f"interrupted when {ended} of {len(job)} rows had ended", RuntimeWarning)
    output = output_of(job, written, driver, term_logprobs=return_term_logprobs)
    return output if generation.as_dict else output.sequences


def check_together(rows: int, max_batch: int | None, streamer: Any, *, whole: bool = False) -> None:
    """Refuse batches below all rows where a streamer, or a `whole` cache, needs these together."""
    together = "cache or return_cache" if whole else "a streamer" if streamer is not None else None
    if together and max_batch is not None and max_batch < rows:
        raise ValueError(
            f"max_batch is {max_batch}; with {together} it must be at least the {rows} rows"
        )


def check_running(max_batch: Any = None, progress: Any = None, engine: Any = None) -> None:
    """Check the arguments of `generate` that say how rows are run, and not what they are."""
    settings.check_int("max_batch", max_batch, 1)
    if progress is not None and not callable(progress):
        check.flag("progress", progress)
    check_engine(engine)


ARGUMENTS = inspect.signature(generate).parameters.keys() - {"blend", "inputs", "arguments"}


class Generation:
    """The arguments of `generate`, checked once, for any number of jobs.

    Attributes:
        call: the models, and what they read.
        base: the first term's model; its Hugging Face methods turn the arguments into `config`.
        config: Hugging Face's generation config of the call.
        each: what requests have of their own.
        chat: what chat templates are given besides a chat.
        as_dict: whether an `Output` is wanted, or its sequences alone.
    """

    def __init__(
        self,
        blend: Any,
        *,
        tokenizer: Any = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Any] | None = None,
        stopping_criteria: Sequence[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        streamer: Any = None,
        return_term_logprobs: bool = False,
        return_pushes: bool = False,
        kl_to: Any = None,
        return_kl_to_base: bool = False,
        search: Search | None = None,
        draft: Draft | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        arguments: dict[str, Any],
        known: dict[Hashable, TermModel] | None = None,
    ) -> None:
        """The arguments are those of `generate`; `arguments` has all those without a name there,
        and `known` is as of `term_models`."""
        mixed, self.search = blend_and_search(blend, search)
        check.flag("return_term_logprobs", return_term_logprobs)
        if check.flag("return_pushes", return_pushes):
            check.pushes_exist(mixed.power, mixed.parts)
        check.flag("return_kl_to_base", return_kl_to_base)
        for name, x in (
            ("logits_processor", logits_processor),
            ("stopping_criteria", stopping_criteria),
        ):
            if x is not None and not isinstance(x, (list, tuple)):
                raise TypeError(
                    f"{name} is a {type(x).__name__}; it must be a list, also of one, or None"
                )
        check_streamer(streamer, self.search)
        check_draft(draft)
        references = references_of(mixed, kl_to, return_kl_to_base)
        self.call = Call(mixed, tokenizer, references, draft, known)
        self.chat = template_arguments(tools, chat_template_kwargs)
        self.term_logprobs, self.pushes = return_term_logprobs, return_pushes
        self.streamer = streamer
        self.logits_processor = list(logits_processor or ())
        self.stopping_criteria = list(stopping_criteria or ())
        self.prefix_allowed_tokens_fn = prefix_allowed_tokens_fn
        asked = settings.stated("do_sample", arguments, generation_config)
        if self.search is not None and asked is None:
            arguments["do_sample"] = True  # A search samples, whatever the saved config says.
        base: Any = underlying(mixed.terms[0].model)
        self.base = base
        if not hasattr(self.base, "_prepare_generation_config"):
            raise TypeError(
                f"the first term is a {type(self.base).__name__}, which has no generation config; "
                "it must be a Hugging Face model with generate, other modules can be later terms"
            )
        self.each = take_each(arguments)
        config = settings.resolve(
            self.base, generation_config, arguments, self.each.table, ARGUMENTS
        )
        asked_ends = getattr(generation_config, "eos_token_id", None)
        check_ids(
            config,
            self.call.vocabulary,
            mixed,
            self.call.tokenizer,
            ends_asked="eos_token_id" in arguments or asked_ends is not None,
        )
        if self.each.stop_strings is not None:
            config.stop_strings = None
        device = self.call.device
        self.base._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
        self.config = config
        saved = self.base.generation_config
        length = settings.stated("max_length", arguments, generation_config, saved)
        self.asked_max_length = length is not None
        as_dict = settings.stated("return_dict_in_generate", arguments, generation_config)
        self.as_dict = as_dict is not False

    def read(self, inputs: Any, attention_mask: Any = None) -> Requests:
        """The requests in `inputs`, which are all that the caller has.

        They may be `Requests` already, which crossfade itself makes where some are refused.
        """
        if isinstance(inputs, Requests):
            return replace(inputs, chat=self.chat)
        config = self.config
        eos = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
        pad = None if config._pad_token_tensor is None else self._pad
        found = read_requests(inputs, attention_mask, pad, eos, is_multimodal(self.base))
        return replace(found, chat=self.chat)

    @property
    def _pad(self) -> int:
        """The padding id. Where neither config nor tokenizer names one, any id will do, as masks
        say what is padding."""
        if self.config._pad_token_tensor is not None:
            return int(self.config._pad_token_tensor)
        own = getattr(self.call.tokenizer, "pad_token_id", None)
        return 0 if own is None else int(own)

    def job(self, requests: Requests, seed: Seed, *, alone: bool = False) -> Job:
        """The job that decodes some requests: all of the caller's, or a part of them.

        Args:
            alone: whether a limit of the whole length (`max_length`) counts each request's own
                prompt. In Hugging Face it counts the longest prompt of the batch.
        """
        call, base, device = self.call, self.base, self.call.device
        self.each.check(requests.total or len(requests))
        config = copy.copy(self.config)  # Its lengths are set below.
        prompts = call.prompts(requests, self._pad)
        copies = config.num_return_sequences
        writing = call.writing(prompts)
        search = call.search_job(self.search, requests, writing, config, self.each)
        if search is not None:
            copies = search.settings.rows
        ids, mask = prompts[0].ids.to(device), prompts[0].mask.to(device)
        settings.set_lengths(base, config, self.asked_max_length, ids.shape[1])

        criteria, limits = self._criteria(config), None
        if alone and self.asked_max_length:
            padding = ids.shape[1] - mask.sum(dim=1).cpu()
            most = settings.split_criteria(criteria, ids.shape[1]).limit
            limits = (most + padding).repeat_interleave(copies)

        def processors(rows: Sequence[int]) -> LogitsProcessorList:
            """Hugging Face's list for a batch of rows, as if there were no others."""
            batch = [row // copies for row in rows]
            numbers = [requests.number(row // copies) * copies + row % copies for row in rows]
            allowed = self.prefix_allowed_tokens_fn
            return base._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=ids.shape[1],
                encoder_input_ids=ids[batch],
                prefix_allowed_tokens_fn=allowed
                and (lambda i, written: allowed(numbers[i], written)),
                logits_processor=LogitsProcessorList(self.logits_processor),
                device=device,
                model_kwargs={"attention_mask": mask[batch]},
            )

        return call.job(
            requests,
            prompts,
            copies,
            processors,
            criteria,
            seeds_and_streams(seed, len(requests), copies, config.do_sample, device, call.ranks),
            do_sample=config.do_sample,
            limits=limits,
            each=self.each,
            search=search,
            term_logprobs=self.term_logprobs,
            pushes=self.pushes,
            pad=self._pad,
            writing=writing,
            streamer=None if self.streamer is None else Stream(self.streamer),
        )

    def _criteria(self, config: GenerationConfig) -> Sequence[Any]:
        """Hugging Face's list of what ends rows."""
        tokenizer = self.call.tokenizer
        if tokenizer is None and (config.stop_strings or self.each.stop_strings):
            raise ValueError(
                "tokenizer is None, and stop_strings are texts; give Model(..., tokenizer=...) or "
                "tokenizer=..."
            )
        try:
            with STOPS:
                return self.base._get_stopping_criteria(
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList(self.stopping_criteria),
                    tokenizer=tokenizer,
                )
        except ValueError:
            if not config.stop_strings or tokenizer is None:
                raise
            stop_criterion(config.stop_strings, tokenizer)  # Its error says why.
            raise
