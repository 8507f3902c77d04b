"""`cf.Session`: models that serve requests as they come, each with its own blend."""

from __future__ import annotations

import atexit
import itertools
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ...blends.blend import Model, ValueHead
from ...blends.classifier import Classifier
from ...blends.terms import check_name
from ...checks import explained
from ...drafts import Draft, check_draft
from ...search import Search
from .. import settings
from ..driver import ROWS
from ..engine.options import Engine, check_engine
from ..members import tokenizer_of
from .asked import Given, check_position
from .asking import Asking
from .request import Request
from .scored import Scoring
from .worker import SessionStats, Worker


@explained()
class Session:
    """Models that serve requests as they come, from any thread or task.

    One thread owns the models and runs a loop for ever: requests join when there is a place, are
    rows of one batch, and leave as they end. A formula is a vector of weights, so that requests
    with different formulas are rows of one batch too; what is no weighted sum of log-probs (a power
    mean, a clamp, a support), has a value or a search, or wants more to be told, has a batch of its
    own kind beside that.

    The tokens of a request depend on its prompt, blend, settings and seed alone (but for near ties,
    as everywhere). They are those of `crossfade.generate` with the same seed.

    Every row is read by all terms, also by those of weight 0, so that a request costs as many rows
    as there are terms: load what you blend.

    Args:
        terms: by name, what formulas may name: `Model` or bare models, the first of which is the
            base, and `ValueHead`, `Classifier` or `Blend`.
        blend: the formula of requests that have none; None: the first term.
        weights: where the faders of formulas stand unless a request says so.
        max_batch: rows decoded at a time; None: 32 on CPUs and 64 on GPUs.
        max_waiting: requests that may wait for a place.
        max_length: tokens that a prompt and its response may have together; None: as many as the
            contexts of the models have. It bounds the memory of caches.
        tokenizer: for terms that have none.
        engine: as in `crossfade.generate`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Example::

        with cf.Session({"base": base, "kind": kind}) as session:
            request = session.submit("Hello", blend="base + w * (kind - base)", weights={"w": 0.8})
            for piece in request:
                print(piece.text, end="")
    """

    def __init__(
        self,
        terms: Mapping[str, Any],
        *,
        blend: str | None = None,
        weights: Mapping[str, float] | None = None,
        max_batch: int | None = None,
        max_waiting: int = 256,
        max_length: int | None = None,
        tokenizer: Any = None,
        engine: Engine | None = None,
    ) -> None:
        named = _named(terms)
        _check_mapping("weights", weights)
        settings.check_int("max_batch", max_batch, 1)
        settings.check_int("max_waiting", max_waiting, 0)
        settings.check_int("max_length", max_length, 1)
        check_engine(engine)
        self.blend = next(iter(named)) if blend is None else blend
        self._asking = Asking(named, self.blend, dict(weights or {}), tokenizer)
        first = next(iter(self._asking.models.values()))
        self.tokenizer = tokenizer_of(first._blend(), tokenizer)
        device = next(first.model.parameters()).device
        self.max_batch = max_batch or ROWS.get(device.type, ROWS["cuda"])
        self.max_waiting, self.max_length = max_waiting, max_length
        self.engine = engine or Engine()
        # That the default formula can be decoded is found out here, and not by the first request.
        self._asking.check()

        self._worker = Worker(self.max_batch, max_waiting, self.engine)
        self._numbers = itertools.count()
        self._thread = threading.Thread(
            target=_serve,
            args=(self._worker, torch.get_num_threads()),  # Each thread has a number of its own.
            name="crossfade.Session",
            daemon=True,
        )
        self._thread.start()
        # A session that nobody has any more closes.
        weakref.finalize(self, self._worker.close, drain=False)

    @property
    def terms(self) -> tuple[str, ...]:
        """The names that formulas may have."""
        return tuple(self._asking.terms)

    @property
    def values(self) -> tuple[str, ...]:
        """Those of them whose numbers are added to a blend: value heads and classifiers."""
        kinds = (ValueHead, Classifier)
        return tuple(name for name, x in self._asking.terms.items() if isinstance(x, kinds))

    @property
    def weights(self) -> dict[str, float]:
        """Where faders stand unless a request says so."""
        return dict(self._asking.weights)

    @property
    def alive(self) -> bool:
        """Whether requests can be submitted."""
        return not self._worker.closing and self._thread.is_alive()

    @property
    def running(self) -> int:
        """How many requests are being decoded."""
        return self._worker.running

    @property
    def waiting(self) -> int:
        """How many requests wait for a place."""
        return len(self._worker.waiting)

    def submit(
        self,
        inputs: Any,
        *,
        blend: str | None = None,
        weights: Mapping[str, float] | None = None,
        systems: Mapping[str, str] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Any = None,
        lora: Mapping[str, float] | None = None,
        search: Search | None = None,
        draft: Draft | None = None,
        seed: int | None = None,
        sample: int = 0,
        priority: int = 0,
        timeout: float | None = None,
        scope: str = "",
        logit_bias: Mapping[int, float] | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        top_logprobs: int = 0,
        return_term_logprobs: bool = False,
        return_pushes: bool = False,
        return_kl_to_base: bool = False,
        **generation: Any,
    ) -> Request:
        """Ask for a response. This returns at once; the `Request` gives it as it comes.

        Args:
            inputs: a text, a chat or token ids: one request.
            blend: a formula over the session's terms; None: the session's own.
            weights: where the formula's faders stand, which `Request.weights` moves later.
            systems: system prompts of terms, for this request.
            guidance_scale, negative_prompt: classifier-free guidance: ``(guidance_scale - 1) *
                (first - first after negative_prompt)`` is added to the blend, of its first term.
            lora: in the place of a formula: the names of terms that are adapters of one model, each
                with its scale. Every layer has the sum of their deltas: one forward, a mix in
                weight space.
            search: as in `crossfade.generate`. Its pieces come at its end.
            draft: as in `crossfade.generate`, with a text at most.
            seed: of the draws; None: one that nobody knows.
            sample: which of several responses to one prompt this is. Sample j has the draws of
                sample j of `num_return_sequences`.
            priority: of requests that wait, those of a higher one are begun first.
            timeout: seconds from now at which it is cut.
            scope: whose it is. Prompts that caches hold serve requests of one scope alone, and at
                one priority those scopes come first that have fewest requests under way.
            logit_bias: by token id, what is added to its score.
            presence_penalty, frequency_penalty: OpenAI's: ``presence + frequency * count`` is taken
                from the score of each token that the response has `count` times.
            top_logprobs: how many of the best tokens of each step pieces tell of, up to 20.
            return_term_logprobs, return_kl_to_base, return_pushes: as in `crossfade.generate`;
                pieces have them, too.
            **generation: as in `crossfade.generate`, such as `max_new_tokens`, `temperature`,
                `top_k`, `top_p`, `min_p`, `do_sample`, `stop_strings`, `repetition_penalty`,
                `tools`, `chat_template_kwargs`. One default differs: a request with one of the
                first four samples, unless `do_sample` says no.

        Raises:
            TypeError, ValueError, NotImplementedError: names the argument, what it was and what it
                must be.
            Full: too many requests wait.
            Closed: the session is closed, or its thread has died.
        """
        self._worker.check_room()
        settings.check_int("sample", sample, 0, 2**30)
        settings.check_int("top_logprobs", top_logprobs, 0, 20)
        settings.check_int("priority", priority, -(2**63), 2**63 - 1)
        if timeout is not None:
            check_position("timeout", timeout)
            if timeout <= 0:
                raise ValueError(f"timeout is {timeout}; it must be above 0 seconds, or None")
        if not isinstance(scope, str):
            raise TypeError(f"scope is {scope!r:.80}; it must be a str")
        each = {"weights": weights, "systems": systems, "lora": lora, "logit_bias": logit_bias}
        for name, x in each.items():
            _check_mapping(name, x)
        if lora is not None and blend is not None:
            raise ValueError("blend and lora are both given; lora is in the place of a formula")
        if negative_prompt is not None and guidance_scale is None:
            raise ValueError("guidance_scale is None; with negative_prompt it must be a number")
        check_draft(draft, simple=self.engine.simple)
        given = Given(
            self.blend if blend is None else blend,
            dict(weights or {}),
            dict(systems or {}),
            guidance_scale,
            negative_prompt,
            lora,
            search,
            draft,
            seed,
            sample,
            scope,
            logit_bias,
            presence_penalty,
            frequency_penalty,
            top_logprobs,
            return_term_logprobs,
            return_pushes,
            return_kl_to_base,
            generation,
        )
        request = Request(next(self._numbers), self._asking.read(inputs, given), self._worker)
        self._check_size(request)
        if timeout is not None:
            request.expire(timeout)
        self._worker.add(request, priority)
        return request

    def score(
        self,
        inputs: Any,
        *,
        blend: str | None = None,
        weights: Mapping[str, float] | None = None,
        top_logprobs: int = 0,
    ) -> Scoring:
        """The log-probs of a prompt's own tokens, read between two steps of the requests.

        Args:
            inputs, blend, weights: as of `submit`.
            top_logprobs: how many of the best tokens at each place are told.

        Raises:
            TypeError, ValueError, Closed: as of `submit`.
        """
        formula = self.blend if blend is None else blend
        mixed = self._asking.mixed(formula, dict(weights or {}))
        ids = self._asking.ids(mixed, inputs)
        return Scoring(ids, self._worker, mixed, self.tokenizer, top_logprobs)

    def stats(self) -> SessionStats:
        """What it has done so far."""
        return self._worker.stats()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: whether requests that were submitted are decoded to their ends. Otherwise, and
                after `timeout` seconds, they are cancelled.
        """
        self._worker.close(drain=drain)
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._worker.close(drain=False)
            self._thread.join()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    def _check_size(self, request: Request) -> None:
        """Refuse a request that could never have a place, or would be too long."""
        job = request.asked.job
        if len(job) > self.max_batch:
            raise ValueError(
                f"search has {len(job)} rows; it must have at most max_batch, {self.max_batch}"
            )
        longest = max(map(len, job.prompt_ids[0])) + max(job.limits)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"the prompt and max_new_tokens are {longest} tokens together; they must be at "
                f"most max_length, {self.max_length}"
            )


def _named(terms: Any) -> dict[str, Any]:
    """The terms by their names, bare models as `Model`."""
    if isinstance(terms, nn.Module) or not isinstance(terms, Mapping):
        raise TypeError(
            f"terms is a {type(terms).__name__}; it must map names to models: {{'base': model}}"
        )
    found: dict[str, Any] = {}
    for name, x in terms.items():
        check_name(name)
        x = Model(x) if isinstance(x, nn.Module) else x
        found[name] = replace(x, name=name) if hasattr(x, "name") else x
    first = next(iter(found.values()), None)
    if not isinstance(first, Model):
        raise TypeError(
            f"terms begin with {first!r:.80}; the first one must be a Model, which is the base"
        )
    return found


def _check_mapping(name: str, x: Any) -> None:
    if x is not None and not isinstance(x, Mapping):
        raise TypeError(f"{name} is {x!r:.80}; it must be a mapping, such as a dict")


def _serve(worker: Worker, threads: int) -> None:
    """What a session's thread does. The interpreter does not end while torch is at work in it."""
    thread = threading.current_thread()

    def stop() -> None:
        worker.close(drain=False)
        thread.join()

    atexit.register(stop)
    try:
        worker.run(threads)
    finally:
        atexit.unregister(stop)
