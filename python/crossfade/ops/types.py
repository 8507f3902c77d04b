"""What the ops take and return besides tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import elsewhere
from ..checks import explained
from . import check


@explained(elsewhere.SUPPORT)
@dataclass(frozen=True)
class Support:
    """The tokens that one term of a blend allows, cut from its own distribution at temperature 1.

    Other tokens are removed before blending; truncation of the blend itself comes after. The cuts
    mean what Hugging Face's processors of the same names mean, and are made in the same order.
    Tokens that tie with a threshold are kept.

    Args:
        term: index of the term among the blend's log-prob terms.
        top_k: keep the `top_k` most probable tokens; 0 keeps all.
        top_p: keep the smallest set of the most probable tokens with mass `top_p`; 1.0 keeps all.
        min_p: keep tokens with at least `min_p` times the largest probability; 0.0 keeps all.

    Raises:
        ValueError: a setting is out of range.

    Source: contrastive decoding's plausible tokens are ``Support(min_p=alpha)`` (Li et al.,
    arXiv:2210.15097, eq. 3); ARGS and PAD use ``Support(top_k=k)`` (arXiv:2402.01694).
    """

    term: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, kind in (("term", int), ("top_k", int), ("top_p", float), ("min_p", float)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise TypeError(
                    f"Support.{name} is {value!r} ({type(value).__name__}); it must be "
                    f"{'an int' if kind is int else 'a float'}"
                )
        if self.term < 0:
            raise ValueError(f"Support.term is {self.term}; it must be 0 or more")
        if not 0 <= self.top_k < 2**63:
            raise ValueError(
                f"Support.top_k is {self.top_k}; it must be 0 (off) or more, and below 2^63"
            )
        if not 0.0 <= self.top_p <= 1.0:
            raise ValueError(f"Support.top_p is {self.top_p}; it must be within [0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            raise ValueError(f"Support.min_p is {self.min_p}; it must be within [0, 1]")


@explained()
@dataclass(frozen=True, eq=False)
class Part:
    """Terms of a blend that are joined, and clamped, before they are added to the others.

    With weights u_k in the part, its push of a token is ``sum_k u_k log p_k`` with power 0. With
    power inf or -inf it is ``sum_k u_k`` times the largest or the smallest ``log p_k`` of the terms
    with ``u_k != 0``. The push is clamped to ``[min, max]``. Where it is infinite even so, or the
    difference of two infinities, the token is removed.

    Args:
        weights: ``[K]`` numbers or tensor, or a tensor ``[B, K]``: one a term of the blend. A term
            of weight 0 is left out of the part.
        power: 0.0 for a sum, ``math.inf`` for a union, ``-math.inf`` for an intersection.
        min, max: nats. By default nothing is clamped.

    Raises:
        TypeError, ValueError: a bound is NaN or no number, `min` is above `max`, or `power` is
            another number. The weights are checked with the blend that they are of.
    """

    weights: Any
    power: float = 0.0
    min: float = -math.inf
    max: float = math.inf

    def __post_init__(self) -> None:
        for name in ("power", "min", "max"):
            x = check.number(name, getattr(self, name), -math.inf, math.inf, "a number")
            object.__setattr__(self, name, x)  # the dataclass is frozen
        if self.power != 0 and not math.isinf(self.power):
            raise ValueError(f"power is {self.power}; of a part it must be 0, inf or -inf")
        if self.min > self.max:
            raise ValueError(f"min is {self.min}; it must be at most max, which is {self.max}")


@dataclass(init=False, eq=False, slots=True)
class Inputs:
    """What is blended, as every backend takes it: `crossfade::Blend` of csrc/crossfade.h.

    It is made of the arguments of `blend`, which are checked here and nowhere else.

    Attributes:
        logits: K tensors ``[rows, V_k]``; those of float64 have become float32.
        weights: K numbers, or a float32 tensor ``[K]`` or ``[rows, K]``.
        values: tensors like `logits`.
        value_weights: like `weights`, one a value.
        power: r of the power mean; 0 is the geometric blend, inf the union, -inf the intersection.
        parts: of each `Part` its power, min and max.
        part_weights: of each part, one after the other, K numbers; or a float32 tensor ``[parts *
            K]`` or ``[rows, parts * K]`` of these.
        support: what to cut from one term's distribution, or None.
        mask: bool ``[vocab_size]`` or ``[rows, vocab_size]``, or None.
        vocab_size: the columns that are used.
        rows, device: of all the tensors.
        log_z: the normalisers of the terms, a float32 tensor ``[rows, K]``, where the columns are a
            shard of a vocabulary; or None, as these are found in the columns. `merge` sets them.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    logits: Sequence[Tensor]
    weights: check.Weights
    values: Sequence[Tensor]
    value_weights: check.Weights
    power: float
    parts: tuple[tuple[float, float, float], ...]
    part_weights: check.Weights
    support: Support | None
    mask: Tensor | None
    vocab_size: int
    rows: int
    device: torch.device
    log_z: Tensor | None

    def __init__(
        self,
        logits: Any,
        weights: Any,
        values: Any = (),
        value_weights: Any = None,
        power: Any = 0.0,
        support: Any = None,
        mask: Any = None,
        vocab_size: Any = None,
        parts: Any = (),
    ) -> None:
        logits, columns, rows, device = check.matrices("logits", logits)
        if type(values) is not tuple or values:
            values, most, _, _ = check.matrices("values", values, rows, device)
            columns = min(columns, most)
        if type(power) is not float or power != 0:
            power = check.power_of(power)
        weights = check.weights_of("weights", weights, len(logits), rows, device, mean=power != 0)
        if value_weights is not None:
            count = len(values)
            value_weights = check.weights_of("value_weights", value_weights, count, rows, device)
        elif values:
            raise ValueError(f"value_weights is None; it must have {len(values)}, one a value")
        else:
            value_weights = ()
        if vocab_size is not None:
            columns = check.vocabulary(vocab_size, columns)
        self.parts, self.part_weights = (), ()
        if type(parts) is not tuple or parts:
            self._check_parts(parts)
            self.parts, self.part_weights = check.parts_of(parts, len(logits), rows, device)
        if support is not None:
            self._check_support(support, len(logits))
        if mask is not None:
            mask = check.mask_of(mask, rows, columns, device)
        self.logits, self.weights = logits, weights
        self.values, self.value_weights = values, value_weights
        self.power, self.support, self.mask, self.vocab_size = power, support, mask, columns
        self.rows, self.device = rows, device
        self.log_z = None

    @staticmethod
    def _check_parts(parts: Any) -> None:
        if not isinstance(parts, (list, tuple)):
            raise TypeError(f"parts is a {type(parts).__name__}; it must be a list of Part")
        for g, p in enumerate(parts):
            if not isinstance(p, Part):
                raise TypeError(f"parts[{g}] is a {type(p).__name__}; it must be a Part")

    @staticmethod
    def _check_support(s: Any, terms: int) -> None:
        if not isinstance(s, Support):
            raise TypeError(f"support is a {type(s).__name__}; it must be a Support or None")
        if s.term >= terms:
            raise ValueError(
                f"support.term is {s.term}; it must be below {terms}, the number of terms"
            )


@dataclass(init=False, eq=False, slots=True)
class Draw:
    """How each row's token is drawn: the settings of `crossfade::Sampling` of csrc/crossfade.h.

    It is made of arguments of `blend_sample`, which are checked here and nowhere else. Each is one
    for all rows of the `inputs`, or a tensor with one a row.

    Attributes:
        temperature, top_p, min_p: a number, or a float32 tensor ``[rows]``.
        top_k, seed, stream, step: an int, or an int64 tensor ``[rows]``.
        do_sample: False makes every row greedy, as temperature 0 makes its own.
        first_token: the token that the first column is; another than 0 for a shard of a vocabulary.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    temperature: float | Tensor
    top_k: int | Tensor
    top_p: float | Tensor
    min_p: float | Tensor
    do_sample: bool
    seed: int | Tensor
    stream: int | Tensor
    step: int | Tensor
    first_token: int

    def __init__(
        self,
        inputs: Inputs,
        temperature: Any = 1.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        min_p: Any = 0.0,
        do_sample: Any = True,
        *,
        seed: Any,
        stream: Any = 0,
        step: Any,
        first_token: Any = 0,
    ) -> None:
        rows, device = inputs.rows, inputs.device
        self.temperature = check.setting("temperature", temperature, rows, device)
        self.top_k = check.setting("top_k", top_k, rows, device)
        self.top_p = check.setting("top_p", top_p, rows, device)
        self.min_p = check.setting("min_p", min_p, rows, device)
        self.do_sample = check.flag("do_sample", do_sample)
        self.seed = check.setting("seed", seed, rows, device)
        self.stream = check.setting("stream", stream, rows, device)
        self.step = check.setting("step", step, rows, device)
        self.first_token = first_token
        if type(first_token) is not int or first_token != 0:
            most = check.MOST_COLUMNS - inputs.vocab_size
            must_be = f"within [0, {most}]: tokens are below 2^31"
            self.first_token = check.integer("first_token", first_token, 0, most, must_be)


class BlendSample(NamedTuple):
    """The tokens drawn from a blend. A row that cannot be sampled has token -1 and NaN log-probs.

    Attributes:
        tokens: ``[B]`` int64.
        logprobs: ``[B]`` float32, nats: of the token under the blend at temperature 1, before
            truncation.
        sampled_logprobs: ``[B]`` float32, nats: of the token under the distribution that was
            sampled, after temperature and truncation; 0 where decoding is greedy.
        term_logprobs: ``[B, K]`` float32, nats: of the token under each term alone, or None.
        pushes: ``[B, K + M]`` float32, nats: what each term and then each value did for the token,
            or None.

    With y the token, pi the blend at temperature 1 before truncation, and E the expectation under
    pi, the pushes are::

        w_k * ((z_k - z_0)[y] - E[z_k - z_0])  # of term k: its departure from the first term
        l_m * (Q_m[y] - E[Q_m])                # of value m

    The first term's push is 0. Tokens without probability have no part in E. Where the weights of
    terms sum to one, all pushes sum to ``log(pi / p_0)[y] - E[log(pi / p_0)]``: they share out how
    the blend departs from the first term's own distribution p_0. A term or value of weight 0 has a
    push of 0 and is not read; only the first term is, as others depart from it. If its weight is 0
    and it has an infinity or NaN at a token of the blend, the pushes of other terms are NaN.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    sampled_logprobs: torch.Tensor
    term_logprobs: torch.Tensor | None
    pushes: torch.Tensor | None


class ShardDraw(NamedTuple):
    """What some columns of a vocabulary tell of a draw, without truncation: for `merge`.

    Attributes:
        tokens: ``[B]`` int64: the token of the whole vocabulary that won among these columns; -1 in
            a bad row, and where no token is left.
        facts: ``[B, 7]`` float32, the fields of `crossfade::Shard` of csrc/crossfade.h: max,
            log_sum, log_mass, group_mass, group_noise, below, token_noise.
    """

    tokens: torch.Tensor
    facts: torch.Tensor


class LinearLogp(NamedTuple):
    """Log-probs of a linear head's tokens: float32, or float64 of float64 arguments.

    Attributes:
        logp: ``[...]``, nats: of the targets; 0 where a target is ignored.
        lse: ``[...]``: log of the sum of the logits' exponentials.
        entropy: ``[...]``, nats, or None.
    """

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
