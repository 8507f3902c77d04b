"""Log-probs for a loss that depends on their sum alone: three products, all in the forward pass.

A mean is such a loss. Its gradient by a logit is p - [target] times one number, which is known as
soon as a token's log-sum-exp is: the logits need not be made again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import tiles
from .tiles import NOTHING, Forward, Gradients, Head, Settings, Sums, product, results, start


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings) -> Forward:
    """The results and the gradients of the sum of the log-probs, for plain logits on a CPU."""
    counts = targets != settings.ignore_index
    if bool(counts.all()):
        return _counting(hidden, weight, targets, settings)
    used, unused = (x.nonzero().squeeze(1) for x in (counts, ~counts))
    some = _counting(hidden[used], weight, targets[used], settings)
    rest = hidden[unused], weight, targets[unused], None
    others = tiles.forward(*rest, settings, NOTHING, native)

    def merged(a: Tensor, b: Tensor) -> Tensor:
        both = a.new_empty(*a.shape[:-1], len(targets))
        return both.index_copy_(-1, used, a).index_copy_(-1, unused, b)

    logp, lse, entropy, normaliser = map(merged, some[:4], others[:4])
    assert some.first is not None
    first = some.first.new_zeros(hidden.shape).index_copy_(0, used, some.first)
    return Forward(logp, lse, entropy, normaliser, first, some.second)


def _counting(hidden: Tensor, weight: Tensor, targets: Tensor, settings: Settings) -> Forward:
    """The same for tokens that all count. A block's logits are all made before its gradients."""
    head = Head(hidden, weight, targets, None, settings, whole=True)
    all_sums = Sums(start(head), None, None)
    for_hidden = head.scores.new_zeros(head.hidden.shape)
    for_weight = weight.new_empty(weight.shape)
    for i, rows in enumerate(head.rows):
        sums, made = all_sums.of(rows), []
        for part, w, _ in head.tiles():
            tile = head.tile(rows, part, w, None)
            native.logp_forward(tile, sums, None)  # which leaves plain logits as they are
            made.append((tile, part, w))
        top, total, *_ = sums.sums.unbind(1)
        pick = (head.targets[rows] != settings.ignore_index).to(top.dtype)  # 0 for padding
        coefficients = [top, total.log(), pick, -pick, torch.zeros_like(pick)]
        of_logits = torch.stack(coefficients, 1).to(head.dtype)
        for tile, part, w in made:
            native.logp_backward(tile, of_logits)
            product(tile.operand, w, for_hidden[rows], beta=1)
            product(tile.operand.t(), head.hidden[rows], for_weight[part], beta=min(i, 1))
    done = results(all_sums, targets, settings, head.dtype)
    return done._replace(first=for_hidden[: len(hidden)], second=for_weight)


def backward(
    hidden: Tensor,
    targets: Tensor,
    settings: Settings,
    for_hidden: Tensor,
    for_weight: Tensor,
    gradients: Gradients,
) -> tuple[Tensor, Tensor, None] | None:
    """The loss's gradients of hidden and weight if they are a multiple of the sum's, else None.

    Also None if that multiple is 0 or infinite: 0 times NaN and infinity times 0 would be NaN.
    """
    of_logp, *others = gradients
    # In a compiled graph, a result that the loss does not depend on has gradients of 0.
    if of_logp is None or any(x is not None and bool(x.any()) for x in others):
        return None
    of_tokens = of_logp[targets != settings.ignore_index]
    multiple = of_tokens.unique()
    if len(multiple) != 1 or not bool(multiple.isfinite()) or not bool(multiple):
        return None
    return (for_hidden * multiple).to(hidden.dtype), for_weight * multiple, None
