"""What a model does to its head's outputs before they are its logits: caps, scales, hooks.

Configs tell it by many names, or not at all. So it is tried: known numbers take the place of the
head's outputs, and the logits show what became of them. Four things depend on it: one head for
several terms, heads of which few columns are computed, value heads, and log-probs that are computed
without logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

A, B = 2.0, -3.0  # A linear f has f(A x + B y) = A f(x) + B f(y).


@dataclass(frozen=True)
class AfterHead:
    """The numbers that took the place of the head's outputs, and the logits that they became.

    Attributes:
        given: ``[4, V]``: x, numbers of many sizes; y, others; A x + B y; and x again, with 0 in
            all but every third column.
        got: ``[4, V]`` float64; None where the model did not give logits of that shape.
        reads: what the head reads, as a multiple of the hidden states that the backbone gives: 1.0
            where it reads these; None where it reads something else.
    """

    given: Tensor
    got: Tensor | None
    reads: float | None

    @property
    def is_nothing(self) -> bool:
        """Whether the head's outputs are the logits."""
        return self.is_like(self.given)

    def is_like(self, expected: Tensor) -> bool:
        """Whether the logits are `expected`, up to rounding."""
        if self.got is None:
            return False
        return bool(((self.got - expected).abs() <= self._rounding * expected.abs()).all())

    @property
    def is_linear(self) -> bool:
        """Whether a weighted sum of outputs becomes the weighted sum of their logits."""
        if self.got is None or not self.got.isfinite().all():
            return False
        one, other, both = self.got[:3]
        size = abs(A) * one.abs() + abs(B) * other.abs()
        return bool(((both - A * one - B * other).abs() <= self._rounding * size).all())

    @property
    def keeps_columns_apart(self) -> bool:
        """Whether a column's logits do not depend on the other columns."""
        if self.got is None or self.got.isnan().any():
            return False
        return torch.equal(self.got[3, ::3], self.got[0, ::3])

    @property
    def _rounding(self) -> float:
        return 8 * torch.finfo(self.given.dtype).eps


@torch.no_grad()
def after_head(model: Any) -> AfterHead:
    """Run one token through a causal LM, with known numbers in the place of its head's outputs.

    Hooks that others have put on the head see these numbers as its outputs.
    """
    head, body = model.get_output_embeddings(), model.base_model
    seen: dict[str, Any] = {}

    def on_body(module: Any, args: Any, output: Any) -> None:
        seen["body"] = output[0]

    def on_head(module: Any, args: Any, output: Tensor) -> Tensor:
        seen["read"] = args[0] if args else None
        seen["given"] = _numbers(output)
        return seen["given"].clone()

    handles = [
        body.register_forward_hook(on_body),
        head.register_forward_hook(on_head, prepend=True),
    ]
    try:
        tokens = torch.zeros(4, 1, dtype=torch.int64, device=model.device)
        mask = torch.ones_like(tokens)
        given = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
        logits = model(**given, return_dict=True).logits
        if "body" not in seen:  # some families call their backbone's parts, and never the backbone
            body(**given, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    numbers, read, body_gave = seen.get("given"), seen.get("read"), seen.get("body")
    reads = _multiple(read, body_gave)
    if numbers is None or not isinstance(logits, Tensor) or logits.shape != numbers.shape:
        return AfterHead(torch.zeros(4, 1, device="cpu"), None, reads)
    return AfterHead(numbers[:, 0], logits[:, 0].double(), reads)


def _multiple(read: Any, given: Any) -> float | None:
    """The number by which `given` must be multiplied to give `read`; None: there is none."""
    if not (isinstance(read, Tensor) and isinstance(given, Tensor) and read.shape == given.shape):
        return None
    if torch.equal(read, given.to(read.dtype)):
        return 1.0
    x, y = read.double(), given.double()
    times = float((x * y).sum() / y.square().sum())
    rounding = 8 * max(torch.finfo(t.dtype).eps for t in (read, given))
    return times if bool(((x - times * y).abs() <= rounding * x.abs()).all()) else None


def _numbers(output: Tensor) -> Tensor:
    """``[4, 1, V]`` numbers to replace a head's ``output``: every dtype holds them exactly."""
    columns = torch.arange(output.shape[-1], device=output.device)
    size = 2.0 ** (columns % 11 - 3)
    one, other = ((columns * k + 3) % 15 - 7 for k in (7, 4))
    rows = torch.stack([one * size, other * size, (A * one + B * other) * size, one * size])
    rows[3] *= columns % 3 == 0
    return rows[:, None].to(output.dtype)
