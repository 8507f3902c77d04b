"""`crossfade.generate`: Hugging Face's `generate` for a blend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ..blend import Blend, Model, as_blend
from ..ops import check
from ..search import ChunkBeamSearch, Recipe, check_search
from ..terms import is_multimodal, underlying
from ..vocabulary import check_vocabularies
from . import settings
from .driver import Driver
from .ends import check_ids
from .engine import Engine
from .inputs import Prompts, Requests, read_requests, term_prompts
from .loop import Job
from .members import Members, references_of
from .output import Output, Stats
from .prefix import PrefixCache
from .term_model import term_models
from .valuer import Search
from .writing import Writing

Seed = int | Sequence[int] | Tensor | None


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
    kl_to: Any = None,
    return_kl_to_base: bool = False,
    max_batch: int | None = None,
    progress: bool | Callable[[int], object] | None = None,
    engine: Engine | None = None,
    cache: PrefixCache | None = None,
    return_cache: bool = False,
    search: ChunkBeamSearch | None = None,
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
        kl_to: a blend, a `Model` or a bare model: also give each step's divergence from it, as
            `Output.kl`. It need not be in the blend: what the blend does not run already runs
            beside it. Its tensors of weights are ``[requests]`` too.
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
        search: how rows are chosen by a value; see `ChunkBeamSearch` and `BestOfN`. It samples,
            ``width * samples`` rows a request, all of them counted by `max_batch`, and gives the
            `num_return_sequences` best.
        **arguments: the fields of ``GenerationConfig``.

    Returns:
        `Output`; the tensor `sequences` alone if ``return_dict_in_generate=False`` is passed.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
        NotImplementedError: names what is not supported.
    """
    blend, search = parts(blend, search)
    check.flag("return_term_logprobs", return_term_logprobs)
    check.flag("return_kl_to_base", return_kl_to_base)
    settings.check_int("max_batch", max_batch, 1)
    if progress is not None and not callable(progress):
        check.flag("progress", progress)
    check.flag("return_cache", return_cache)
    if cache is not None and not isinstance(cache, PrefixCache):
        raise TypeError(f"cache is a {type(cache).__name__}; it must be the cache of an Output")
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(f"engine is a {type(engine).__name__}; it must be a crossfade.Engine")
    for name, x in (
        ("logits_processor", logits_processor),
        ("stopping_criteria", stopping_criteria),
    ):
        if x is not None and not isinstance(x, (list, tuple)):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a list or None")
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(
            f"streamer is a {type(streamer).__name__}; it must have put and end, as Hugging Face's"
        )
    vocabulary = check_vocabularies(blend, tokenizer)
    tokenizer = tokenizer_of(blend, tokenizer)
    base: Any = underlying(blend.terms[0].model)
    members = Members(blend, vocabulary, tokenizer, references_of(blend, kl_to, return_kl_to_base))
    models = term_models(members)
    device = models[0].device

    if search is not None:
        if settings.stated("do_sample", arguments, generation_config) is None:
            arguments["do_sample"] = True  # whatever the model's saved config says
        if streamer is not None:
            raise NotImplementedError("streamer is set; a search knows its rows at the end alone")
    if not hasattr(base, "_prepare_generation_config"):
        raise TypeError(
            f"the first term is a {type(base).__name__}, which has no generation config; it must "
            "be a Hugging Face model with generate, other modules can be later terms"
        )
    config = settings.resolve(base, generation_config, arguments)
    asked_ends = getattr(generation_config, "eos_token_id", None)
    ends_asked = "eos_token_id" in arguments or asked_ends is not None
    check_ids(config, vocabulary, blend, tokenizer, ends_asked=ends_asked)
    base._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    eos = [] if config._eos_token_tensor is None else config._eos_token_tensor.tolist()
    pad = _pad_id(config, tokenizer)
    stated_pad = None if config._pad_token_tensor is None else pad
    requests = read_requests(inputs, attention_mask, stated_pad, eos, is_multimodal(base))
    returned = copies = config.num_return_sequences
    prompts = all_prompts(members, requests, tokenizer, pad)
    writing = None if tokenizer is None else Writing(tokenizer, prompts[0])
    searching = None
    if search is not None:
        copies = search.rows
        settings.check_search(search, bool(config.do_sample), returned)
        searching = Search(search, blend, requests, tokenizer, writing, vocabulary, returned)

    ids = prompts[0].ids.to(device)
    asked = settings.stated("max_length", arguments, generation_config, base.generation_config)
    settings.set_lengths(base, config, asked is not None, ids.shape[1])
    mask = prompts[0].mask.to(device)

    def processors(rows: Sequence[int]) -> LogitsProcessorList:
        """Hugging Face's list for a batch of rows, as if they were all."""
        batch = [row // copies for row in rows]
        allowed = prefix_allowed_tokens_fn
        return base._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids.shape[1],
            encoder_input_ids=ids[batch],
            prefix_allowed_tokens_fn=allowed and (lambda i, written: allowed(rows[i], written)),
            logits_processor=LogitsProcessorList(logits_processor or ()),
            device=device,
            model_kwargs={"attention_mask": mask[batch]},
        )

    try:
        criteria = base._get_stopping_criteria(
            generation_config=config,
            stopping_criteria=StoppingCriteriaList(stopping_criteria or ()),
            tokenizer=tokenizer,
        )
    except ValueError as error:  # it knows tokenizers by how they write the letters a to f
        if not config.stop_strings or tokenizer is None:
            raise
        raise ValueError(
            f"stop_strings={config.stop_strings!r}: Transformers cannot tell what the tokens of "
            f"this {type(tokenizer).__name__} add to a text ({error}); give eos_token_id or "
            "stopping_criteria"
        ) from error
    job = new_job(
        prompts,
        copies,
        processors,
        criteria,
        seeds_and_streams(seed, len(requests), copies, config.do_sample, device),
        do_sample=config.do_sample,
        pad=pad,
        streamer=streamer,
        term_logprobs=return_term_logprobs
        or (searching is not None and searching.needs_term_logprobs),
        references=members.references,
        search=searching,
    )
    whole = cache is not None or return_cache
    together = "cache or return_cache" if whole else "a streamer" if streamer is not None else None
    if together and max_batch is not None and max_batch < job.rows:
        raise ValueError(
            f"max_batch is {max_batch}; with {together} it must be at least the {job.rows} rows"
        )
    if whole and engine is not None and engine.simple:
        raise ValueError("engine is simple, which has no cache to keep; leave it out")
    driver = Driver(
        blend,
        models,
        job,
        vocabulary,
        engine or Engine(),
        max_batch,
        progress,
        cache,
        return_cache,
    )
    output = run(driver, writing)
    if not return_term_logprobs:
        output = replace(output, term_logprobs=None)
    as_dict = settings.stated("return_dict_in_generate", arguments, generation_config)
    return output.sequences if as_dict is False else output


def parts(blend: Any, search: Any) -> tuple[Blend, ChunkBeamSearch | None]:
    """What is decoded, and how it is searched."""
    if isinstance(blend, Recipe):
        if search is not None:
            raise ValueError("search is given twice: in the Recipe and as an argument")
        return blend.blend, blend.search
    if search is not None:
        check_search(search)
    return as_blend(blend), search


def tokenizer_of(blend: Blend, given: Any = None) -> Any:
    """The tokenizer given, or the first that a term or value has; None if there is none."""
    members: tuple[Any, ...] = (*blend.terms, *blend.values)
    return next((t for t in (given, *(m.tokenizer for m in members)) if t is not None), None)


def new_job(
    prompts: Sequence[Prompts],
    copies: int,
    processors: Callable[[Sequence[int]], LogitsProcessorList],
    criteria: Sequence[Any],
    seeds_and_streams: tuple[Tensor, Tensor],
    *,
    do_sample: bool,
    **options: Any,
) -> Job:
    """A job from Hugging Face's lists, of which the kernel takes temperature and truncation.

    `processors` makes the list for a batch of rows.
    """
    seeds, streams = seeds_and_streams
    rest, sampling = settings.split_processors(processors(range(len(seeds))), do_sample)

    def left(rows: Sequence[int]) -> LogitsProcessorList:
        return settings.split_processors(processors(rows), do_sample)[0]

    ends = settings.split_criteria(criteria, prompts[0].ids.shape[1])
    return Job(
        prompts=prompts,
        copies=copies,
        sampling=sampling,
        seeds=seeds,
        streams=streams,
        limit=ends.limit,
        eos=torch.tensor(ends.eos, dtype=torch.int64, device=seeds.device),
        deadline=ends.deadline,
        processors=left if rest else None,
        criteria=ends.others,
        **options,
    )


def run(driver: Driver, writing: Writing | None = None) -> Output:
    """Run a job and put together what it gives."""
    driver.run()
    job, results = driver.job, driver.results
    device = results.lengths.device
    kept = torch.tensor(job.returned, device=device)
    lengths = results.lengths[kept]
    each = lengths.tolist()
    new = max(each)

    def written(x: Tensor | None, fill: float) -> Tensor | None:
        if x is None:
            return None
        past = torch.arange(new, device=x.device) >= lengths[:, None]
        past = past.view(*past.shape, *[1] * (x.dim() - 2))
        return x[kept, :new].masked_fill(past, fill)

    tokens: Any = written(results.tokens, job.pad)
    prompts = job.prompts[0].ids.to(device)[kept // job.copies]
    text = None
    if writing is not None:
        responses = [row[:n] for row, n in zip(tokens.tolist(), each, strict=True)]
        text = writing.texts([r // job.copies for r in job.returned], responses)
    values = None
    if job.search is not None:
        values = results.values[kept]
        if job.search.returned > 1:
            values = values.unflatten(0, (-1, job.search.returned))
    kl = {
        reference.output: written(None if results.kl is None else results.kl[..., i], 0.0)
        for i, reference in enumerate(job.references)
    }
    cuda = driver.device.type == "cuda"
    return Output(
        sequences=torch.cat([prompts, tokens], dim=1),
        prompt_length=prompts.shape[1],
        lengths=lengths,
        text=text,
        logprobs=written(results.logprobs, 0.0),  # type: ignore[arg-type]
        sampled_logprobs=written(results.sampled_logprobs, 0.0),  # type: ignore[arg-type]
        finished=results.finished[kept],
        failed=results.failed[kept],
        ended=torch.tensor([r in driver.ended for r in job.returned], device=device),
        stats=Stats(
            tokens=sum(each),
            seconds=driver.seconds,
            models=driver.stats(),
            cache_bytes=driver.cache_bytes,
            peak_bytes=torch.cuda.max_memory_allocated(driver.device)
            if cuda
            else driver.peak_bytes,
            notes=tuple(driver.notes),
            interrupted=driver.interrupted,
        ),
        term_logprobs=written(results.term_logprobs, 0.0),
        cache=driver.cache,
        values=None if values is None else values[..., 0],
        value_parts=None if values is None else values[..., 1:],
        **kl,
    )


def all_prompts(members: Members, requests: Requests, tokenizer: Any, pad: int) -> list[Prompts]:
    """The prompt of every member; values read the request as it is."""
    return [
        term_prompts(
            requests,
            term=name,
            tokenizer=tokenizer if m.tokenizer is None else m.tokenizer,
            system=m.system if isinstance(m, Model) else None,
            prompt=m.prompt if isinstance(m, Model) else None,
            pad=pad,
        )
        for m, name in zip(members.all, members.names, strict=True)
    ]


def _pad_id(config: GenerationConfig, tokenizer: Any) -> int:
    """The padding id, or any id where neither config nor tokenizer names one: masks count."""
    if config._pad_token_tensor is not None:
        return int(config._pad_token_tensor)
    own = getattr(tokenizer, "pad_token_id", None)
    return 0 if own is None else int(own)


def seeds_and_streams(
    seed: Seed, requests: int, copies: int, do_sample: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The seed and the stream of every row, int64 ``[requests * copies]``."""
    if seed is None:
        # greedy decoding leaves torch's generator as it is, as in Hugging Face
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if do_sample else 0
    if isinstance(seed, Tensor):
        if seed.is_floating_point() or seed.dtype == torch.bool or seed.dim() > 1:
            raise TypeError(
                f"seed is a {seed.dtype} tensor {list(seed.shape)}; it must be an int tensor, one "
                "a request"
            )
        each = seed.long().cpu()  # its bits, as the kernels take them
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        each = torch.tensor([_bits(f"seed[{i}]", s) for i, s in enumerate(seed)], device="cpu")
    else:
        each = torch.tensor(_bits("seed", seed), device="cpu")
    if each.dim() == 1 and len(each) != requests:
        raise ValueError(f"seed has {len(each)} entries; it must have {requests}, one a request")
    own = torch.arange(requests, device="cpu")  # not a default device, which may be another
    stream = torch.zeros_like(own) if each.dim() else own
    slots = torch.arange(copies, device="cpu") << 32
    streams = (stream[:, None] + slots[None, :]).flatten()
    return each.expand(requests).repeat_interleave(copies).to(device), streams.to(device)


def _bits(name: str, seed: Any) -> int:
    """A seed within [0, 2^64) as int64 holds it."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name} is {seed!r}; it must be an int")
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} is {seed}; it must be within [0, 2^64)")
    return seed - 2**64 if seed >= 2**63 else seed
