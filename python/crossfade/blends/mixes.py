"""Mixes of adapters in weight space: one term, whose weights are a base and parts of deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .printing import weight_text
from .weights import check_weight


@dataclass(frozen=True, repr=False)
class Mix:
    """How much of each adapter a term has: ``W + sum_k weights[k] * delta_k`` in every layer.

    Two mixes are equal if they have the same adapters, in the same order, with the same weights.

    Attributes:
        names: of the adapters.
        weights: of each adapter a number, or one number a request.
    """

    names: tuple[str, ...]
    weights: tuple[float | tuple[float, ...], ...]

    @classmethod
    def of(cls, given: Mapping[str, Any], name: str = "adapter") -> Mix:
        """The mix that a mapping of names to numbers or tensors ``[requests]`` describes.

        Tensors are read here, once, wherever they lie.

        Args:
            name: what errors call the mapping.

        Raises:
            TypeError, ValueError: names the entry, what it was and what it must be.
        """
        if not given:
            raise ValueError(f"{name} is an empty mix; it must have a weight for an adapter")
        weights: list[float | tuple[float, ...]] = []
        counts: dict[str, int] = {}
        for adapter, x in given.items():
            if not isinstance(adapter, str):
                raise TypeError(f"{name} has the key {adapter!r}; it must be an adapter's name")
            where = f"{name}[{adapter!r}]"
            w = check_weight(where, x)
            if not isinstance(w, Tensor):
                weights.append(w)
                continue
            if not len(w):
                raise ValueError(f"{where} is empty; it must have a number for each request")
            if not w.isfinite().all():
                raise ValueError(f"{where} is {weight_text(w)}; it must be finite")
            weights.append(tuple(w.tolist()))
            counts[adapter] = len(w)
        if len(set(counts.values())) > 1:
            each = " and ".join(f"[{n}] for {a!r}" for a, n in counts.items())
            raise ValueError(f"{name} has {each}; they must have one length, one a request")
        return cls(tuple(given), tuple(weights))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:  # kept, as a long list's mix is asked for it at each of its requests
        return hash((self.names, self.weights))

    @cached_property
    def _table(self) -> Tensor:
        """``[requests, adapters]``, or ``[1, adapters]`` where all requests have the same."""
        each = [torch.tensor(w, dtype=torch.float32, device="cpu") for w in self.weights]
        return torch.stack([w.expand(self.requests or 1) for w in each], dim=1)

    @property
    def requests(self) -> int | None:
        """How many requests have weights of their own; None where all have the same."""
        return next((len(w) for w in self.weights if isinstance(w, tuple)), None)

    def rows(self, requests: int, term: str) -> Tensor:
        """The weights of a batch: float32 ``[requests, adapters]``.

        Args:
            term: what errors call the term that has the mix.

        Raises:
            ValueError: the mix is of another number of requests.
        """
        if self.requests not in (None, requests):
            raise ValueError(
                f"adapter of {term} has weights [{self.requests}]; they must be [{requests}], the "
                "requests"
            )
        return self._table.expand(requests, -1)

    def plain(self) -> dict[str, float | list[float]]:
        """The mix as JSON can hold it."""
        each = zip(self.names, self.weights, strict=True)
        return {n: list(w) if isinstance(w, tuple) else w for n, w in each}

    def __repr__(self) -> str:
        each = zip(self.names, self.weights, strict=True)
        shown = (torch.tensor(w, device="cpu") if isinstance(w, tuple) else w for _, w in each)
        texts = [f"{n!r}: {weight_text(w)}" for n, w in zip(self.names, shown, strict=True)]
        return f"{{{', '.join(texts)}}}"
