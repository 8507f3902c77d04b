"""Reads what a request asks for: its formula, its settings, and what it is to be told."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...blends.blend import Blend, Model
from ...blends.mixes import Mix
from ...checks import did_you_mean
from ...formula import names_in, parse
from ...models.hf import is_multimodal
from .. import settings
from ..call import Call
from ..generation import Generation
from ..inputs import read_requests
from ..job import Job, of_any_loop
from ..settings import check_int
from ..simple.term_model import TermModel
from .asked import Asked, Given, check_position, own_weight
from .penalties import CountPenalty

ENDS = 16  # the tokens that may end a row of a session
TOPS = 20  # the best tokens of a step that are kept where any are asked for
NEGATIVE = "negative"  # the name of the term that reads a negative prompt
# What `Generation` takes that is no field of a generation config.
PASSED = ("generation_config", "tools", "chat_template_kwargs")
# Arguments of `generate` that a request does not have, and what there is in their place.
OF_CALLS = {
    "attention_mask": "its inputs are not padded; leave it out",
    "cache": "a session goes on from what its caches hold; leave it out",
    "engine": "give it to the Session",
    "kl_to": "it has return_kl_to_base",
    "logits_processor": "rows of a session come and go; it has logit_bias and penalties",
    "max_batch": "give it to the Session",
    "num_return_sequences": "submit once for each, with sample=0, 1, ...",
    "prefix_allowed_tokens_fn": "rows of a session come and go; leave it out",
    "progress": "iterate over the request",
    "return_cache": "a session keeps what its caches hold; leave it out",
    "return_dict_in_generate": "its result is an Output; leave it out",
    "stopping_criteria": "rows of a session come and go; it has stop_strings, and Request.cancel",
    "streamer": "iterate over the request",
    "tokenizer": "give it to the Session",
}


class Asking:
    """Reads requests over the terms of a session.

    Args:
        terms: by name, what formulas may name. The first one is the base.
        blend, weights: where a request has no formula, and no faders, of its own.
        tokenizer: for terms that have none.
    """

    def __init__(
        self,
        terms: Mapping[str, Any],
        blend: str,
        weights: Mapping[str, float],
        tokenizer: Any = None,
    ) -> None:
        self.terms, self.tokenizer = dict(terms), tokenizer
        self.blend, self.weights = blend, dict(weights)
        self._known: dict[Hashable, TermModel] = {}
        self.models = {n: x for n, x in self.terms.items() if isinstance(x, Model)}

    def read(self, inputs: Any, given: Given) -> Asked:
        """One request as a job of its own.

        Raises:
            TypeError, ValueError, NotImplementedError: names the argument, what it was and what it
                must be.
        """
        faders = self._faders(given)
        terms = self._terms(given)

        def mixed(at: Mapping[str, float]) -> Blend:
            return self._mixed(given, terms, at)

        blend = mixed(faders)
        arguments, passed, penalties = _arguments(given)
        generation = Generation(
            blend,
            tokenizer=self.tokenizer,
            logits_processor=penalties,
            return_term_logprobs=given.return_term_logprobs,
            return_kl_to_base=given.return_kl_to_base,
            return_pushes=given.return_pushes,
            search=given.search,
            draft=given.draft,
            arguments=arguments,
            known=self._known,
            **passed,
        )
        copies = generation.config.num_return_sequences
        if copies != 1:
            raise ValueError(
                f"num_return_sequences is {copies}; it must be 1: submit once for each, with "
                "sample=0, 1, ..."
            )
        requests = generation.read(inputs)
        check_one(len(requests))
        job = generation.job(requests, 0 if given.seed is None else given.seed)
        for penalty in penalties:
            penalty.prompt = len(job.prompt_ids[0][0])
        if given.seed is None:
            seed = torch.randint(2**63 - 1, (1,), device="cpu")
            job = replace(job, table={**job.table, "seed": seed.expand(len(job)).clone()})
        why = job.context_room.why(0)
        if min(job.limits) < 1:
            raise ValueError(f"inputs cannot be decoded: {why}")
        job = _of_any_loop(job, given, generation.call.vocabulary)
        return Asked(given, _kind(generation, job, given), generation, job, mixed, faders)

    def check_faders(self, weights: Mapping[str, float]) -> None:
        """Refuse positions of faders that are no finite numbers, or have the names of terms."""
        for name, x in weights.items():
            check_position(f"weights[{name!r}]", x)
            if name in self.terms:
                raise ValueError(f"weights has {name!r}, which is a term; a fader must differ")

    def check(self) -> None:
        """Read the session's own formula and faders, so that a fault in them is found.

        Raises:
            TypeError, ValueError: as of `read`.
            NotImplementedError: a term is in shards on several ranks.
        """
        self.check_faders(self.weights)
        blend = self.mixed(self.blend, {})
        generation = Generation(blend, tokenizer=self.tokenizer, arguments={})
        if generation.call.ranks is not None:
            raise NotImplementedError(
                f"{blend} has models in shards on several ranks; a session must have whole ones: "
                "requests would come to each rank at another time"
            )

    def ids(self, blend: Blend, inputs: Any) -> list[int]:
        """What the first term reads of a request."""
        call = Call(blend, self.tokenizer, known=self._known)
        multimodal = is_multimodal(blend.terms[0].model)
        requests = read_requests(inputs, None, multimodal=multimodal, name="inputs")
        check_one(len(requests))
        return list(call.prompts(requests)[0].unpadded()[0])

    def mixed(self, formula: str, weights: Mapping[str, float]) -> Blend:
        """The blend that a formula means, with these faders and the session's."""
        given = Given(formula, weights)
        return self._mixed(given, self.terms, self._faders(given))

    def _faders(self, given: Given) -> dict[str, float]:
        """Where each fader of a request's formula stands."""
        if not isinstance(given.blend, str):
            raise TypeError(f"blend is a {type(given.blend).__name__}; it must be a formula, a str")
        if given.lora is not None:
            if given.weights:
                raise ValueError("weights and lora are both given; lora has no faders")
            return {}
        self.check_faders(given.weights)
        positions = {**self.weights, **given.weights}
        parse(given.blend, **self.terms, **positions_in(given.blend, positions))
        known = names_in(given.blend)
        for name in given.weights:
            if name not in known:
                raise ValueError(
                    f"weights has {name!r}, which is not in {given.blend!r}"
                    f"{did_you_mean(name, known - self.terms.keys())}"
                )
        return positions_in(given.blend, positions)

    def _terms(self, given: Given) -> dict[str, Any]:
        """What the names of a request's formula stand for."""
        for name in given.systems:
            if name not in self.models:
                meant = did_you_mean(name, self.models)
                raise ValueError(
                    f"systems has {name!r}; it must name terms: {', '.join(self.models)}{meant}"
                )
        terms = dict(self.terms)
        for name, system in given.systems.items():
            terms[name] = replace(terms[name], system=system)
        return terms

    def _mixed(self, given: Given, terms: Mapping[str, Any], faders: Mapping[str, float]) -> Blend:
        """The blend of a request, with all models of the session where it is geometric."""
        if given.lora is not None:
            blend = self._lora(given, terms)
        else:
            at = {name: torch.tensor([x], dtype=torch.float64) for name, x in faders.items()}
            blend = parse(given.blend, **terms, **at)
        if given.guidance_scale is not None:
            blend = _guided(blend, given)
        models = [x for x in terms.values() if isinstance(x, Model)]
        geometric = blend.power == 0 and not blend.parts and blend.support is None
        if geometric and all(t in models or t.name == NEGATIVE for t in blend.terms):
            others = [t for t in blend.terms if t not in models]
            weights = dict(zip(blend.terms, blend.weights, strict=True))
            each = (*models, *others)
            # A weight that is the number 0 would leave its term out.
            own = tuple(own_weight(weights.get(t, 0.0)) for t in each)
            blend = replace(blend, terms=each, weights=own)
        return replace(
            blend,
            weights=tuple(map(own_weight, blend.weights)),
            value_weights=tuple(map(own_weight, blend.value_weights)),
            classifier_weights=tuple(map(own_weight, blend.classifier_weights)),
            parts=tuple(replace(p, weights=tuple(map(own_weight, p.weights))) for p in blend.parts),
        )

    def _lora(self, given: Given, terms: Mapping[str, Any]) -> Blend:
        """One model whose layers have the sum of some adapters' deltas."""
        assert given.lora is not None
        known = {n: x for n, x in self.models.items() if _is_adapter(x)}
        for name, scale in given.lora.items():
            if name not in known:
                names = ", ".join(known) or "there are none"
                raise ValueError(
                    f"lora has {name!r}; it must name terms that are adapters: {names}"
                )
            check_position(f"lora[{name!r}]", scale)
        if not given.lora:
            raise ValueError("lora is empty; it must have a scale for an adapter")
        first = next(iter(given.lora))
        model = known[first].model
        for name in given.lora:
            if known[name].model is not model:
                raise ValueError(
                    f"lora has {name!r}, which is an adapter of another model than {first!r}; all "
                    "must be of one"
                )
        # All adapters of the model are in the mix, so that all mixes are rows of one loop.
        mix = {x.adapter: torch.zeros(1) for x in known.values() if x.model is model}
        for name, scale in given.lora.items():
            mix[known[name].adapter] += scale
        return Blend((replace(terms[first], adapter=mix, name="lora"),), (own_weight(1.0),))


def check_one(requests: int) -> None:
    """Refuse inputs that are not one request."""
    if requests != 1:
        raise ValueError(f"inputs are {requests} requests; they must be one: a text, a chat or ids")


def positions_in(formula: str, positions: Mapping[str, float]) -> dict[str, float]:
    """The faders that a formula has, of those whose positions are known.

    Raises:
        ValueError: as `parse` says it, where the formula cannot be read.
    """
    try:
        known = names_in(formula)
    except SyntaxError:
        return {}  # `parse` tells where the fault is.
    return {n: float(x) for n, x in positions.items() if n in known}


def _is_adapter(term: Model) -> bool:
    return isinstance(term.adapter, str) and term.adapter != "active"


def _guided(blend: Blend, given: Given) -> Blend:
    """``blend + (scale - 1) * (base - base | negative_prompt)``: classifier-free guidance. With the
    base alone this is ``uncond + scale * (cond - uncond)`` (Sanchez et al., arXiv:2306.17806)."""
    check_position("guidance_scale", given.guidance_scale)
    assert given.guidance_scale is not None
    if given.negative_prompt is None:
        raise ValueError(
            "negative_prompt is None; with guidance_scale it must be the prompt to be led away from"
        )
    base = blend.terms[0]
    negative = replace(base, prompt=given.negative_prompt, system=None, name=NEGATIVE)
    more = torch.tensor([given.guidance_scale - 1.0], dtype=torch.float64)
    return blend + more * base - more * negative


def _arguments(given: Given) -> tuple[dict[str, Any], dict[str, Any], list[CountPenalty]]:
    """The fields of a generation config, other arguments of `generate`, and penalties."""
    arguments = dict(given.generation)
    for name, instead in OF_CALLS.items():
        if name in arguments:
            raise TypeError(f"{name} is of a whole call of generate, not of a request: {instead}")
    passed = {name: arguments.pop(name) for name in PASSED if name in arguments}
    if settings.stated("do_sample", arguments, passed.get("generation_config")) is None and any(
        arguments.get(name) is not None for name in settings.SAMPLING
    ):  # Who says how to sample wants samples, but for the temperature 0.
        arguments["do_sample"] = arguments.get("temperature") != 0
    if given.logit_bias:
        if arguments.get("sequence_bias") is not None:
            raise ValueError("logit_bias and sequence_bias are both given; it must be one of them")
        for token, bias in given.logit_bias.items():
            check_int("a token of logit_bias", token, 0)
            check_position(f"logit_bias[{token}]", bias)
        arguments["sequence_bias"] = {(t,): float(b) for t, b in given.logit_bias.items()}
    penalties: list[CountPenalty] = []
    for name in ("presence_penalty", "frequency_penalty"):
        check_position(name, getattr(given, name))
    if given.presence_penalty or given.frequency_penalty:
        penalties.append(CountPenalty(given.presence_penalty, given.frequency_penalty, 0))
    return arguments, passed, penalties


def _of_any_loop(job: Job, given: Given, vocabulary: int) -> Job:
    """A job whose rows fit any loop of its kind, whatever its request asks for."""
    job = of_any_loop(job, own=(CountPenalty,))
    table = dict(job.table)
    table["stream"] = table["stream"] + (given.sample << 32)
    eos = table["eos"]
    if eos.shape[1] > ENDS:
        raise ValueError(f"eos_token_id has {eos.shape[1]} tokens; it must have at most {ENDS}")
    table["eos"] = torch.nn.functional.pad(eos, (0, ENDS - eos.shape[1]), value=-1)
    tops = min(TOPS, vocabulary) if given.top_logprobs else 0
    return replace(job, table=table, tops=tops, scope=given.scope)


def _kind(generation: Generation, job: Job, given: Given) -> Hashable:
    """What requests must have in common to be rows of one loop."""
    call = generation.call
    blend, draft = call.blend, given.draft
    models = tuple(
        (id(m.model), m.adapter.names if isinstance(m.adapter, Mix) else m.adapter)
        for m in call.models
    )
    parts = tuple((p.power, p.min, p.max, *map(blend.terms.index, p.terms)) for p in blend.parts)
    # Rows have tensors of their own. Anything else in the table is one value for all rows.
    table = tuple((n, None if isinstance(x, Tensor) else x) for n, x in job.table.items())
    guesses: tuple[Hashable, ...] = ()
    if draft is not None:
        its = draft.blend
        of_blend = its and (len(its.terms), len(its.values), its.power, its.support, len(its.parts))
        guesses = draft.source is None, draft.length, of_blend
    shown = job.tops, job.term_logprobs, len(job.references), given.return_pushes
    structure = len(blend.terms), len(blend.values), blend.power, blend.support, parts
    classifiers = tuple(map(id, blend.classifiers))
    if given.search is not None:
        return object()  # A search is a batch of its own, with value models of its own.
    return models, structure, classifiers, table, guesses, shown, len(job)
