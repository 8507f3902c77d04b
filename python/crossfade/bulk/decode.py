"""Any number of prompts through one loop, whose places are always full."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Sequence, Sized
from typing import Any

from torch import Tensor

from ..decoding.driver import ROWS, Driver
from ..decoding.engine.options import Engine, check_engine
from ..decoding.forms import Request, request
from ..decoding.generation import Generation
from ..decoding.inputs import Requests
from ..decoding.job import Job
from ..decoding.output import Output
from ..decoding.results import output_of
from ..decoding.rows import Written
from ..decoding.settings import check_int
from ..drafts import check_draft
from .records import seed_of

# The arguments of `generate` that are no fields of Hugging Face's GenerationConfig.
OWN = inspect.signature(Generation).parameters.keys() - {"blend", "streamer", "arguments"}


def decode(
    blend: Any,
    prompts: Iterable[Any],
    *,
    seed: int | Sequence[int] = 0,
    skip: Container[int] = (),
    max_batch: int | None = None,
    progress: Callable[[int], object] | None = None,
    engine: Engine | None = None,
    **generation: Any,
) -> Iterator[tuple[int, Output]]:
    """Decode prompts of any number, and give each one's output as soon as it is done.

    A row that ends gives its place to the next prompt, which is read while the others go on: no
    place waits for a batch to end. What is decoded depends on the prompt, its place in `prompts`
    and `seed` alone, and not on the prompts beside it or on `max_batch`. Where logits processors or
    stopping criteria read all rows at one step, prompts go in batches that end together.

    Prompts are taken as places become free, so that they may come from a generator, and what has
    been given back takes no memory here.

    Args:
        blend: as in `crossfade.generate`.
        prompts: texts, chats or lists of token ids.
        seed: an int: prompt i draws by a seed that is made of this one and i. A list: each prompt
            draws by its own.
        skip: the places in `prompts` of those that are not to be decoded.
        max_batch: rows decoded at a time, of which a prompt has `num_return_sequences`, or the
            rows of a search; as in `crossfade.generate`.
        progress: is called with how many rows have ended since its last call.
        engine, generation: as in `crossfade.generate`, but without a streamer and caches. A list or
            tensor with an entry for each request has one for each of `prompts`, which must have a
            length then; so have the texts of a `draft`.

    Yields:
        The place of a prompt in `prompts` and its `Output`, of one request; prompts that end sooner
        come sooner. Of its `stats`, `tokens` are the prompt's own and the rest is of all so far.

    Raises:
        TypeError, ValueError, NotImplementedError: as `crossfade.generate`. A prompt that cannot be
            read ends the loop: what has not been given by then is lost.
        KeyboardInterrupt: after all outputs that were done by then have been given.
    """
    check_int("max_batch", max_batch, 1)
    each_seed = _seeds(seed)
    if not isinstance(skip, Container):
        raise TypeError(f"skip is a {type(skip).__name__}; it must be a set or list of places")
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}; it must be a list or another iterable of "
            "texts, chats or lists of token ids"
        )
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is a {type(progress).__name__}; it must be a function or None")
    check_engine(engine)
    check_draft(generation.get("draft"), simple=engine is not None and engine.simple)
    for name in ("streamer", "cache", "return_cache", "attention_mask"):
        given = generation.pop(name, None)
        if given is not None and given is not False:
            raise NotImplementedError(f"{name} is not supported for prompts of any number")
    own = {name: generation.pop(name) for name in OWN & generation.keys()}
    checked = Generation(blend, **own, arguments=generation)
    _check_length(checked, prompts, seed)
    return _decode(checked, prompts, each_seed, skip, max_batch, progress, engine or Engine())


def _seeds(seed: Any) -> Callable[[int], int]:
    """What gives the seed of each prompt by its place."""
    if isinstance(seed, Sequence) and not isinstance(seed, str):
        for i, own in enumerate(seed):
            _check_seed(f"seed[{i}]", own)
        return lambda i: seed[i]
    _check_seed("seed", seed)
    return lambda i: seed_of(seed, i)


def _check_seed(name: str, seed: Any) -> None:
    if seed is None:
        raise TypeError(f"{name} is None; it must be an int, from which each prompt's is made")
    check_int(name, seed, 0)


def _check_length(generation: Generation, prompts: Iterable[Any], seed: Any) -> None:
    """Refuse lists and tensors with an entry a request that do not have one for each prompt."""
    call, draft = generation.call, generation.call.draft
    blends = [call.blend, *(r.blend for r in call.members.references)]
    blends += [] if draft is None or draft.blend is None else [draft.blend]
    lists = {
        "seed": seed if isinstance(seed, Sequence) else None,
        "draft.texts": None if draft is None else draft.texts,
    }
    each = {**generation.each.table, "stop_strings": generation.each.stop_strings, **lists}
    given = [name for name, entries in each.items() if entries is not None]
    value = None if generation.search is None else generation.search.objective
    values = [] if value is None else [value]
    given += [
        f"the weight of {name}"
        for names, weights in (
            *((blend.names, blend.weights) for blend in blends),
            *((blend.value_names, blend.value_weights) for blend in blends),
            *((blend.classifier_names, blend.classifier_weights) for blend in blends),
            *(([t.name or str(t) for t in p.terms], p.weights) for b in blends for p in b.parts),
            *((value.names, value.weights) for value in values),
        )
        for name, w in zip(names, weights, strict=True)
        if isinstance(w, Tensor)
    ]
    if isinstance(prompts, Sized):
        generation.each.check(len(prompts))
        for name, entries in lists.items():
            if entries is not None and len(entries) != len(prompts):
                raise ValueError(
                    f"{name} has {len(entries)} entries; it must have {len(prompts)}, one a prompt"
                )
        for blend in blends:
            blend.row_weights(len(prompts), "cpu")
            blend.row_value_weights(len(prompts), "cpu")
            blend.row_part_weights(len(prompts), "cpu")
            blend.row_classifier_weights(len(prompts), "cpu")
        for value in values:
            value.row_weights(len(prompts))
    elif given:
        name = "max_new_tokens" if given[0] == "limit" else given[0]
        raise ValueError(
            f"{name} has an entry for each request, and prompts is a {type(prompts).__name__}, "
            "which has no length; it must be a list, or the entries one for all"
        )


def _decode(
    generation: Generation,
    prompts: Iterable[Any],
    seed: Callable[[int], int],
    skip: Container[int],
    max_batch: int | None,
    progress: Callable[[int], object] | None,
    engine: Engine,
) -> Iterator[tuple[int, Output]]:
    call = generation.call
    driver = Driver(call.blend, call.models, call.vocabulary, engine, max_batch, progress or False)
    rows = ROWS.get(call.device.type, ROWS["cuda"]) if max_batch is None else max_batch
    search = generation.search
    copies = generation.config.num_return_sequences if search is None else search.rows
    total = len(prompts) if isinstance(prompts, Sized) else None
    jobs = _jobs(generation, prompts, seed, skip, max(1, rows // copies), total)
    unfinished: dict[tuple[Job, int], list[Written]] = {}  # what rows of a request have written
    for written in driver.decode(jobs):
        job, request = written.row.job, written.row.request
        its = unfinished.setdefault((job, request), [])
        its.append(written)
        if len(its) < job.copies:
            continue
        del unfinished[job, request]
        if driver.interrupted and not all(w.ended for w in its):
            continue
        output = output_of(job, its, driver, alone=True, term_logprobs=generation.term_logprobs)
        yield (request if job.numbers is None else job.numbers[request]), output
    if driver.interrupted:
        raise KeyboardInterrupt


def _jobs(
    generation: Generation,
    prompts: Iterable[Any],
    seed: Callable[[int], int],
    skip: Container[int],
    size: int,
    total: int | None,
) -> Iterator[Job]:
    """Jobs of `size` prompts each, made when they are asked for."""
    numbers: list[int] = []
    items: list[Request] = []

    def job() -> Job:
        requests = Requests(list(items), None, list(numbers), total, generation.chat)
        return generation.job(requests, [seed(i) for i in numbers], alone=True)

    for i, prompt in enumerate(prompts):
        if i in skip:
            continue
        numbers.append(i)
        items.append(request(f"prompts[{i}]", prompt))
        if len(items) == size:
            yield job()
            numbers.clear()
            items.clear()
    if items:
        yield job()
