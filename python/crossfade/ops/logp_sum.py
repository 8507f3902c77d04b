"""Log-probs whose sum is all that a loss is made of: gradients in the forward pass, three products.

A mean is such a loss. Its gradient of a logit, p - [target] times one number, is known as soon as a
token's log-sum-exp is: the logits need not be made again.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import logp_tiles
from .logp_tiles import NOTHING, Forward, Gradients, Head, Settings, Sums, product, results, start


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, kernel: ModuleType
) -> Forward:
    """The results, with the gradients of the sum of the log-probs.

    All logits of some tokens are kept until their log-sum-exp is known: of H tokens, or 256, so
    that they take no more than the gradient of weight does. `kernel` must leave them as they are in
    its forward pass, as `native` does; weight is float32.
    """
    settings, counts = Settings(0.0, 1.0, ignore_index), targets != ignore_index
    if not bool(counts.all()):
        of_sum = forward(hidden[counts], weight, targets[counts], ignore_index, kernel)
        rest = hidden[~counts], weight, targets[~counts]
        return _merged(counts, of_sum, logp_tiles.forward(*rest, None, settings, NOTHING, kernel))
    head = Head(hidden, weight, targets, None, settings, most_rows=max(256, weight.shape[1]))
    all_sums = Sums(start(head), None, None)
    for_hidden = head.scores.new_zeros(head.hidden.shape)
    for_weight = weight.new_empty(weight.shape)
    logits = head.scores.new_empty(max(r.stop - r.start for r in head.rows) * len(weight))
    for i, rows in enumerate(head.rows):
        sums, tiles, used = all_sums.of(rows), [], 0
        for part, w, _ in head.tiles():
            tiles.append(head.tile(rows, part, w, None, logits[used:]))
            kernel.logp_forward(tiles[-1], sums, None)
            used += tiles[-1].scores.numel()
        top, total, *_ = sums.sums.unbind(1)
        pick = (head.targets[rows] != ignore_index).to(top.dtype)  # 0: what was padded
        coefficients = [top, total.log(), pick, -pick, torch.zeros_like(pick)]
        of_logits = torch.stack(coefficients, 1).to(head.dtype)
        for tile, (part, w, _) in zip(tiles, head.tiles(), strict=True):
            kernel.logp_backward(tile, of_logits)
            product(tile.operand, w, for_hidden[rows], beta=1)
            product(tile.operand.t(), head.hidden[rows], for_weight[part], beta=min(i, 1))
    done = results(all_sums, targets, settings, head.dtype)
    return done._replace(first=for_hidden[: len(hidden)], second=for_weight)


def _merged(counts: Tensor, some: Forward, others: Forward) -> Forward:
    """Of tokens that count and those that do not, which have no gradients."""

    def merged(a: Tensor, b: Tensor) -> Tensor:
        both = a.new_empty(*a.shape[:-1], len(counts))
        both[..., counts], both[..., ~counts] = a, b
        return both

    logp, lse, entropy, normaliser = map(merged, some[:4], others[:4])
    assert some.first is not None
    first = some.first.new_zeros(len(counts), some.first.shape[1])
    first[counts] = some.first
    return Forward(logp, lse, entropy, normaliser, first, some.second)


def backward(
    hidden: Tensor,
    targets: Tensor,
    settings: Settings,
    for_hidden: Tensor,
    for_weight: Tensor,
    gradients: Gradients,
) -> tuple[Tensor, Tensor, None] | None:
    """The gradients of hidden and weight from those of the sum, if the loss's are a multiple."""
    of_logp, *others = gradients
    # compiled, a result that no loss is made of has gradients of 0
    if of_logp is None or any(x is not None and bool(x.any()) for x in others):
        return None
    of_tokens = of_logp[targets != settings.ignore_index]
    if not bool((of_tokens == of_tokens[:1]).all()):
        return None
    multiple = of_tokens[:1].sum()  # of no tokens, 0
    return (for_hidden * multiple).to(hidden.dtype), for_weight * multiple, None
