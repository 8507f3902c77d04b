"""A session that needs no model: each token of a text follows from its prompt, seed and sample.

It has what `crossfade.serve.contract.Session` says, and can be told to be slow, full or broken.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Generator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from crossfade import formula
from crossfade.blends.blend import Model
from crossfade.decoding.session import Closed, Full
from crossfade.loading.formulas import Unloaded
from tiny_models import EOS, WORDS, make_tokenizer

BLEND = "base + w * (kind - base)"
GENERATION = {
    *("temperature", "top_k", "top_p", "min_p", "do_sample", "max_new_tokens", "stop_strings"),
    *("repetition_penalty", "tools", "chat_template_kwargs"),
}
FIRST = 8  # the id of the first of `WORDS`


def logprob_of(token: int) -> float:
    return -0.25 * (1 + token % 3)


@dataclass
class Piece:
    text: str
    ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    term_logprobs: list[dict[str, float]] = field(default_factory=list)
    pushes: list[dict[str, float]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)


@dataclass
class Stats:
    requests: dict[str, int]
    tokens: int
    notes: str = "no figure"


class Request:
    """A text of words; it ends with EOS after `length` of them, or at its limit."""

    def __init__(self, session: Session, inputs: Any, options: dict[str, Any]) -> None:
        self.session, self.inputs, self.options = session, inputs, options
        self.prompt_ids = session.ids_of(inputs)
        self.changes: list[tuple[int, dict[str, float]]] = []
        self.reason: str | None = None
        self.written: list[int] = []
        self.cancelled = False
        self.until = time.monotonic() + (options.get("timeout") or 1e9)
        seen = repr((self.prompt_ids, options.get("seed"), options["sample"]))
        self.noise = hashlib.sha256(seen.encode()).digest()

    @property
    def done(self) -> bool:
        return self.reason is not None

    def cancel(self) -> None:
        self.cancelled = True
        self.reason = self.reason or "cancelled"

    def weights(self, **faders: float) -> None:
        for name in faders:
            if name != "w":
                raise ValueError(f"weights has {name!r}; the faders are w")
        self.changes.append((len(self.written), faders))

    def __await__(self) -> Generator[Any, None, Any]:
        async def output() -> Any:
            search = self.options.get("search")
            values = None if search is None else torch.tensor([0.5])
            drafted = None if self.options.get("draft") is None else torch.tensor([3])
            return SimpleNamespace(tokens_by_draft=drafted, values=values)

        return output().__await__()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while self.reason is None:
                await asyncio.sleep(self.session.delay)
                while self.session.paused and self.reason is None:
                    await asyncio.sleep(0.002)
                if self.session.fails_at == len(self.written):
                    raise RuntimeError(f"request {self.session.requests.index(self)}: a NaN")
                if self.reason is None and time.monotonic() > self.until:
                    self.reason = "timeout"
                elif self.reason is None and (piece := self.step()) is not None:
                    yield piece
        except RuntimeError:
            self.reason = "error"
            raise

    def step(self) -> Piece | None:
        n = len(self.written)
        ended = n == self.session.length
        token = EOS if ended else FIRST + self.noise[n % 32] % len(WORDS)
        word = "" if ended else WORDS[token - FIRST]
        if word in (self.options.get("stop_strings") or ()):
            self.reason = "stop"
            return None
        self.written.append(token)
        if ended:
            self.reason = "stop"
        elif n + 1 == self.options["max_new_tokens"]:
            self.reason = "length"
        options, logprob = self.options, logprob_of(token)
        piece = Piece(f"{' ' if n and word else ''}{word}", [token], [logprob])
        if options["top_logprobs"]:
            best = {token: logprob, **{i: logprob - 1 - i for i in range(3, 6)}}
            piece.top_logprobs = [dict(list(best.items())[: options["top_logprobs"]])]
        if options["return_term_logprobs"]:
            piece.term_logprobs = [{"base": -1.0, "kind": float("-inf")}]
        if options["return_pushes"]:
            piece.pushes = [{"w": 0.5}]
        if options["return_kl_to_base"]:
            piece.kl = [float("inf") if n else 0.125]
        return piece


class Session:
    """See the module.

    Attributes:
        delay: seconds between two tokens.
        paused: whether no token comes.
        full: whether the queue is full.
        alive: whether the thread that owns the models lives.
        length: how many words a text has.
        fails_at: how many tokens a text has when it fails.
    """

    terms: tuple[str, ...] = ("base", "kind")
    values: tuple[str, ...] = ()
    blend = BLEND

    def __init__(self, length: int = 6) -> None:
        self.tokenizer = make_tokenizer()
        self.closed: dict[str, Any] | None = None
        self.reset(length)

    def reset(self, length: int = 6) -> None:
        """Forget all requests, and be as at the beginning."""
        self.length = length
        self.delay, self.paused, self.full, self.alive = 0.0, False, False, True
        self.fails_at: int | None = None
        self.requests: list[Request] = []
        self.weights: dict[str, float] = {}

    @property
    def running(self) -> int:
        return sum(not r.done for r in self.requests)

    waiting = 0

    def ids_of(self, inputs: Any) -> list[int]:
        if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
            text = self.tokenizer.apply_chat_template(
                inputs, tokenize=False, add_generation_prompt=True
            )
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(inputs)["input_ids"] if isinstance(inputs, str) else list(inputs)
        if not ids:
            raise ValueError("inputs is empty; it must have a token")
        if max(ids) >= len(self.tokenizer):
            raise ValueError(f"inputs has id {max(ids)}; ids must be within [0, 61)")
        return ids

    def check(self, blend: str | None, weights: Mapping[str, float] | None) -> None:
        if not self.alive:
            raise Closed("the session is closed")
        if self.full:
            raise Full("256 requests wait, as many as may")
        terms = {name: Model(Unloaded()) for name in self.terms}
        faders = formula.names_in(blend or BLEND) - {*terms}
        for name in weights or ():
            if name not in faders:
                raise ValueError(f"weights has {name!r}; the faders are {', '.join(faders)}")
        found = formula.parse(blend or BLEND, **terms, **dict.fromkeys(faders, 0.5))
        if found.power != 0:
            raise NotImplementedError("blend is a power mean, which does not share a batch")

    def submit(
        self,
        inputs: Any,
        *,
        blend: str | None = None,
        weights: Mapping[str, float] | None = None,
        systems: Mapping[str, str] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        lora: Mapping[str, float] | None = None,
        search: Any = None,
        draft: Any = None,
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
        options = {name: x for name, x in locals().items() if name not in ("self", "inputs")}
        options |= options.pop("generation")
        for name in generation:
            if name not in GENERATION:
                raise TypeError(f"{name} is not an argument")
        self.check(blend, weights)
        request = Request(self, inputs, options)
        self.requests.append(request)
        return request

    def score(
        self,
        inputs: Any,
        responses: Any,
        *,
        blend: str | None = None,
        weights: Mapping[str, float] | None = None,
        timeout: float | None = None,
        top_logprobs: int = 0,
    ) -> Any:
        """The tokens of a response have the log-probs -0.1, -0.2 and so on."""
        self.check(blend, weights)
        for response in responses:
            self.ids_of(response)
        shape = len(responses), max(map(len, responses))
        logprobs = -0.1 * torch.arange(1, shape[1] + 1).expand(shape)
        tops: Any = (None, None)
        if top_logprobs:
            tops = torch.full((*shape, 1), 3), torch.full((*shape, 1), -0.05)
        return SimpleNamespace(logprobs=logprobs, top_tokens=tops[0], top_logprobs=tops[1])

    def stats(self) -> Stats:
        return Stats({"stop": 2}, sum(len(r.written) for r in self.requests))

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        self.closed = {"drain": drain, "timeout": timeout}
