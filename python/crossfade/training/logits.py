"""How a model makes logits of its head's products, and sums over all logits of each token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.logp import tiles


@dataclass(frozen=True)
class Logits:
    """How a model turns the products x of its head into logits: ``c tanh(s x / c) / temperature``.

    `scale` is s and `softcap` is c. Without a softcap (None), logits are ``s x / temperature``.
    """

    scale: float
    softcap: float | None
    temperature: float

    @classmethod
    def of(cls, config: Any, temperature: float) -> Logits:
        """Read it from the config of a text model. Families have different names for the scale."""
        scale = next(
            (
                getattr(config, name)
                for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                if getattr(config, name, None) is not None
            ),
            None,
        )
        if scale is None and getattr(config, "logits_scaling", None) is not None:
            multiplies = config.model_type == "hyperclovax"
            scale = config.logits_scaling if multiplies else 1 / config.logits_scaling
        scale = 1.0 if scale is None else float(scale)
        if not 0 < scale < math.inf:
            raise ValueError(f"the model scales its logits by {scale}; it must be above 0")
        return cls(scale, getattr(config, "final_logit_softcapping", None) or None, temperature)

    def without_temperature(self, products: Tensor) -> Tensor:
        """Logits at temperature 1, as float64, of the head's products."""
        x = self.scale * products.double()
        return x if self.softcap is None else self.softcap * (x / self.softcap).tanh()

    def settings(self) -> tuple[float, float]:
        """The softcap (0 for none) and the temperature to call `linear_logp` with.

        `linear_logp` has no scale, but ``c tanh(s x / c)`` equals ``s (c / s) tanh(x / (c / s))``:
        a softcap of ``c / s``, and a temperature that is divided by s.
        """
        return (self.softcap or 0.0) / self.scale, self.temperature / self.scale

    def __call__(self, products: Tensor) -> Tensor:
        """Logits of the head's products, in their dtype."""
        x = products * self.scale
        x = x if self.softcap is None else self.softcap * (x / self.softcap).tanh()
        return x / self.temperature


@torch.no_grad()
def mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits) -> Tensor:
    """The mean of each token's logits over the vocabulary, ``[tokens]``.

    Without a softcap it is one product with the mean of the head's rows. With one, all logits have
    to be computed again.
    """
    if logits.softcap is None:
        dtype = tiles.compute_dtype(hidden.dtype)
        x = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
        x = x if bias is None else x + bias.mean(dtype=dtype)
        return logits(x)
    total = hidden.new_zeros(len(hidden), dtype=tiles.compute_dtype(hidden.dtype))
    for rows, products in _products(hidden, weight, bias):
        total[rows] += logits(products).sum(1)
    return total / len(weight)


@torch.no_grad()
def log_sum_squares(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lse: Tensor, logits: Logits
) -> Tensor:
    """``log sum_v p(v)^2`` of each token's distribution, ``[tokens]``, which WPO's weights need.

    All logits are computed again, as only now `lse`, their log-sum-exp, is known. The sum is at
    least one over the size of the vocabulary, so that no term that matters underflows.
    """
    total = torch.zeros_like(lse)
    for rows, products in _products(hidden, weight, bias):
        total[rows] += (2 * (logits(products) - lse[rows, None])).exp_().sum(1)
    return total.log()


def _products(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """The head's products, a tile at a time: some tokens, and their products with some columns."""
    dtype = tiles.compute_dtype(hidden.dtype)
    hidden = hidden.to(dtype)
    height, width = tiles.tile_size(hidden.device)
    for i in range(0, len(hidden), height):
        rows = slice(i, i + height)
        for j in range(0, len(weight), width):
            columns = slice(j, j + width)
            x = hidden[rows] @ weight[columns].to(dtype).t()
            yield rows, x if bias is None else x + bias[columns].to(dtype)
