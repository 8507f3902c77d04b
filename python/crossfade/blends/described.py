"""What a blend says of itself: names of its members, what they cost, their weights in a batch."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .algebra import Algebra
from .parts import Part, part_rows
from .terms import Costs, costs, default_names, distinct_names
from .weights import Weight, weight_rows

if TYPE_CHECKING:
    from .blend import Model, ValueHead
    from .classifier import Classifier


class Described(Algebra):
    """What `Blend` says of its terms, values and classifiers, which it has as fields."""

    terms: tuple[Model, ...]
    weights: tuple[Weight, ...]
    values: tuple[ValueHead, ...]
    value_weights: tuple[Weight, ...]
    parts: tuple[Part, ...]
    classifiers: tuple[Classifier, ...]
    classifier_weights: tuple[Weight, ...]

    @property
    def _members(self) -> tuple[Model | ValueHead, ...]:
        return (*self.terms, *self.values)

    @cached_property
    def _all_names(self) -> tuple[str, ...]:
        otherwise = [f"model{i}" for i in range(len(self.terms))]
        otherwise += [f"value{i}" for i in range(len(self.values))]
        otherwise += [f"classifier{i}" for i in range(len(self.classifiers))]
        members = (*self._members, *self.classifiers)
        return distinct_names(default_names(members, otherwise))

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each term, different from all others of the blend."""
        return self._all_names[: len(self.terms)]

    @property
    def value_names(self) -> tuple[str, ...]:
        """A name for each value, different from all others of the blend."""
        return self._all_names[len(self.terms) : len(self._members)]

    @property
    def classifier_names(self) -> tuple[str, ...]:
        """A name for each classifier, different from all others of the blend."""
        return self._all_names[len(self._members) :]

    @property
    def models(self) -> Costs:
        """What the blend costs, by distinct underlying model; shared ones are counted once.

        Classifiers are not among them: what one costs depends on its texts.
        """
        return costs((*self.names, *self.value_names), [m.model for m in self._members])

    def row_weights(
        self, requests: int, device: torch.device | str | None = None
    ) -> tuple[float, ...] | Tensor:
        """The weights as `crossfade.ops` takes them, for a batch of `requests`.

        Returns:
            ``[K]`` numbers, or float32 ``[requests, K]`` on `device` if any weight is a tensor.

        Raises:
            ValueError: a weight tensor has another length; names the term.
        """
        return weight_rows(self.names, self.weights, requests, device)

    def row_value_weights(
        self, requests: int, device: torch.device | str | None = None
    ) -> tuple[float, ...] | Tensor:
        """The weights of the values, in the form that `row_weights` has for the terms."""
        return weight_rows(self.value_names, self.value_weights, requests, device)

    def row_part_weights(
        self, requests: int, device: torch.device | str | None = None
    ) -> tuple[tuple[float, ...], ...] | Tensor:
        """The weights of the terms in each part, in the form that `row_weights` has.

        Returns:
            ``[parts]`` tuples of K numbers, or float32 ``[requests, parts, K]`` on `device`.
        """
        return part_rows(self.parts, self.terms, self.names, requests, device)

    def row_classifier_weights(
        self, requests: int, device: torch.device | str | None = None
    ) -> tuple[float, ...] | Tensor:
        """The weights of the classifiers, in the form that `row_weights` has for the terms."""
        return weight_rows(self.classifier_names, self.classifier_weights, requests, device)
