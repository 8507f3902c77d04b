"""What a request asks for, as the row of a loop: which blend, with which weights, drawn how."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...blends.blend import Blend
from ...checks import did_you_mean
from ...drafts import Draft
from ...search import Search
from ..generation import Generation
from ..job import WEIGHTS, Job
from ..mixer import row_weights
from .piece import Piece

NONE = -math.inf  # the log-prob of what cannot be drawn


@dataclass(frozen=True)
class Given:
    """What `Session.submit` was given besides the prompt; its docstring says what each means."""

    blend: str
    weights: Mapping[str, float]
    systems: Mapping[str, str] = field(default_factory=dict)
    guidance_scale: float | None = None
    negative_prompt: Any = None
    lora: Mapping[str, float] | None = None
    search: Search | None = None
    draft: Draft | None = None
    seed: int | None = None
    sample: int = 0
    scope: str = ""
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top_logprobs: int = 0
    return_term_logprobs: bool = False
    return_pushes: bool = False
    return_kl_to_base: bool = False
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Asked:
    """A request, read: its job, and what kind of loop decodes it.

    Attributes:
        kind: requests of one kind are rows of one loop.
        generation: what the job was made by.
        mixed: the blend that a formula means with these faders, as all rows of the kind have it.
        faders: where they stand.
    """

    given: Given
    kind: Hashable
    generation: Generation
    job: Job
    mixed: Callable[[Mapping[str, float]], Blend]
    faders: dict[str, float]

    @property
    def stop_strings(self) -> tuple[str, ...]:
        generation = self.generation
        stops = [generation.config.stop_strings or ()]
        stops = generation.each.stop_strings or stops
        return (stops[0],) if isinstance(stops[0], str) else tuple(stops[0])

    @property
    def cost(self) -> int:
        """Rows of forwards at each step: those of the request times the models that read them."""
        return len(self.job) * len(self.generation.call.models)

    def moved(self, faders: Mapping[str, float]) -> dict[str, Tensor]:
        """The weights of the row once these faders have moved, by their names in a job's table.

        Raises:
            TypeError, ValueError: names the fader, where it was put and where it must be.
        """
        for name, x in faders.items():
            if name not in self.faders:
                meant = did_you_mean(name, self.faders)
                known = ", ".join(self.faders) or "none"
                raise ValueError(
                    f"{name} is no fader of {self.given.blend!r} (faders: {known}){meant}"
                )
            check_position(name, x)
        found = _rows(self.mixed({**self.faders, **faders}), self.job.table["seed"].device)
        self.faders |= faders
        return found

    def piece(self, text: str, columns: Mapping[str, Tensor]) -> Piece:
        """A piece of what the row has written."""
        call, given = self.generation.call, self.given
        ids = columns["tokens"].tolist()
        more: dict[str, Any] = {}
        if given.top_logprobs and "top_tokens" in columns:
            n = given.top_logprobs
            tops = zip(columns["top_tokens"], columns["top_logprobs"], strict=True)
            more["top_logprobs"] = [
                {t: p for t, p in zip(ids[:n].tolist(), each[:n].tolist(), strict=True) if p > NONE}
                for ids, each in tops
            ]
        if given.return_term_logprobs and "term_logprobs" in columns:
            names = call.blend.names
            rows = columns["term_logprobs"].tolist()
            more["term_logprobs"] = [dict(zip(names, row, strict=True)) for row in rows]
        if given.return_pushes and "pushes" in columns:
            more["pushes"] = self._by_fader(columns["pushes"])
        if given.return_kl_to_base and "kl" in columns:
            more["kl"] = columns["kl"][:, 0].tolist()
        return Piece(text, ids, columns["logprobs"].tolist(), **more)

    def _by_fader(self, pushes: Tensor) -> list[dict[str, float]]:
        """How far each fader moved each token, of how far each term did: ``[tokens, terms + values
        + classifiers]``.

        A fader has the part of each term's weight that it makes: what the weight loses where the
        fader is at 0. Where the formula has no faders, each term but the first counts as one.
        """
        blend = self.mixed(self.faders)
        if not self.faders:
            names = [*blend.names, *blend.value_names, *blend.classifier_names]
            rows = pushes[:, 1:].tolist()
            each = [zip(names[1:], row, strict=True) for row in rows]
            return [{name: x for name, x in row if x != 0} for row in each]
        w, parts = _flat(blend), []
        for name in self.faders:
            without = _flat(self.mixed({**self.faders, name: 0.0}))
            parts.append(torch.where(w == 0, 0.0, (w - without) / w.where(w != 0, 1.0)))
        moved = (torch.stack(parts) * pushes.cpu()[:, None]).sum(dim=2)
        return [dict(zip(self.faders, row, strict=True)) for row in moved.tolist()]


def check_position(name: str, x: Any) -> None:
    """Refuse anything but a finite number as a fader's position."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name} is {x!r:.80}; it must be a number")
    if not math.isfinite(x):
        raise ValueError(f"{name} is {x}; it must be finite")


def own_weight(w: Any) -> Tensor:
    """A weight as that of one request."""
    return w if isinstance(w, Tensor) else torch.tensor([w], dtype=torch.float64)


def _flat(blend: Blend) -> Tensor:
    """``[terms + values + classifiers]``: the weights of a blend of one request."""
    each = *blend.weights, *blend.value_weights, *blend.classifier_weights
    return torch.cat([own_weight(w).double() for w in each])


def _rows(blend: Blend, device: torch.device) -> dict[str, Tensor]:
    """The weights of a blend of one request, by their names in a job's table."""
    each = zip(WEIGHTS, row_weights(blend, 1, device), strict=True)
    return {name: w for name, w in each if isinstance(w, Tensor)}
