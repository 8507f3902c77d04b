"""A draw from a vocabulary that lies in shards: each part reads its own columns, and no row is
gathered.

A part tells the others of its groups of 256 tokens as little as the draw needs: see `ShardDraw`. A
group that lies in two parts is put together from its pieces, so that a token that is drawn is the
one that is drawn from the whole row.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import backends, memory
from .noise import GROUP, NEG_INF
from .reference import RowDraws, per_row
from .thresholds import Cut, Thresholds, log_sum
from .types import BlendSample, Draw, Inputs

Given = TypeVar("Given", Inputs, Draw)
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Partial:
    """What `blend_sample` was given, over some columns of a vocabulary. `merge` draws from it."""

    inputs: Inputs
    draw: Draw
    return_term_logprobs: bool
    backend: str | None

    def __post_init__(self) -> None:
        i = self.inputs
        each = i.weights, i.value_weights, i.part_weights
        weights = [w for w in each if isinstance(w, Tensor)]
        if memory.want_gradient(*i.logits, *i.values, *weights):
            raise NotImplementedError(
                "return_partial is True and an input wants a gradient, but merge has no "
                "derivative; detach the inputs"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same in all parts, by its name."""
        i, d = self.inputs, self.draw
        own = ("weights", "value_weights", "power", "parts", "part_weights", "support")
        return {
            "values": len(i.values),
            **{name: getattr(i, name) for name in own},
            **{name: getattr(d, name) for name in d.__slots__ if name != "first_token"},
            "return_term_logprobs": self.return_term_logprobs,
        }


def all_gather(group: Any = None) -> Reduce:
    """The `reduce` of `merge` between the ranks of a process group of torch.distributed.

    Every rank gives one part, or as many as every other, and has the same seeds and settings; so
    all of them get the same tokens, without a broadcast.
    """
    import torch.distributed as dist

    ranks = dist.get_world_size(group)
    if ranks < 1:
        raise ValueError("group has other processes; this one must be among its ranks")

    def reduce(own: Tensor) -> Tensor:
        each = own.new_empty(ranks, *own.shape)
        dist.all_gather([*each], own.contiguous(), group)
        return each.flatten(0, 1)

    return reduce


@torch.no_grad()
def merge(parts: Sequence[Any], reduce: Reduce | None = None) -> BlendSample:
    """Draws the tokens of rows whose vocabulary lies in parts, each given by `blend_sample`.

    The same in torch: join the columns of the parts, in their order, and call `blend_sample` on the
    whole. Only small numbers of each part are needed: without truncation 24 numbers a row, once.
    Top-k and top-p first ask for the best `top_k`, or 256, of each part's scores, and min-p for the
    largest. Where the tokens that top-p keeps are more than these, up to three histograms of 2,048
    numbers follow. Power means, parts and the log-probs of terms take a round more each, for a
    number a term, and a support one as truncation does. None of it grows with the vocabulary.

    Args:
        parts: the results of ``blend_sample(..., first_token=t, return_partial=True)`` that this
            process has, in the order of their tokens. Their settings must be the same. Each may be
            on a device of its own. Their tensors are read here, and must not have changed since.
        reduce: where other processes have parts too: a function that takes a float64 tensor ``[P,
            ...]`` of this process's P parts and returns ``[N, ...]``, of all parts of all
            processes, the same in each. `ops.all_gather()` makes one for ranks of
            torch.distributed. Each process must have as many parts, and call `merge` as often.

    Returns:
        `BlendSample`, on the device of the first part, with the tokens of the whole vocabulary and
        the term log-probs if these were asked for. A row that is bad in one part is bad.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    It waits for the device where a setting that truncates is a tensor, and with top-p.
    """
    _check(parts, reduce)
    return _Merge(parts, reduce).result()


def _check(parts: Sequence[Any], reduce: Any) -> None:
    if not isinstance(parts, (list, tuple)):
        raise TypeError(f"parts is a {type(parts).__name__}; it must be a list of partial draws")
    if not parts:
        raise ValueError("parts is empty; it must have at least one partial draw")
    settings: dict[str, Any] = {}
    for n, p in enumerate(parts):
        if not isinstance(p, Partial):
            raise TypeError(
                f"parts[{n}] is a {type(p).__name__}; it must be what blend_sample gives with "
                "return_partial=True"
            )
        first = parts[0].inputs
        if p.inputs.rows != first.rows or len(p.inputs.logits) != len(first.logits):
            raise ValueError(
                f"parts[{n}] has {p.inputs.rows} rows of {len(p.inputs.logits)} terms; it must "
                f"have {first.rows} rows of {len(first.logits)}, as parts[0]"
            )
        settings = settings or p.settings
        for name, x in p.settings.items() if n else ():
            if not _alike(x, settings[name]):
                raise ValueError(
                    f"parts[{n}] has {name} {_said(x)}; it must have {_said(settings[name])}, as "
                    "parts[0]"
                )
        if n and p.draw.first_token != _end(parts[n - 1]):
            raise ValueError(
                f"parts[{n}] begins at token {p.draw.first_token}; it must begin at "
                f"{_end(parts[n - 1])}, where parts[{n - 1}] ends"
            )
    if reduce is not None and not callable(reduce):
        raise TypeError(
            f"reduce is a {type(reduce).__name__}; it must be a function of a tensor, or None"
        )
    begins = parts[0].draw.first_token
    if reduce is None and begins != 0:
        raise ValueError(
            f"parts[0] begins at token {begins}; it must begin at 0, unless reduce gives parts of "
            "other processes"
        )


def _alike(x: Any, other: Any) -> bool:
    """Whether settings are the same, as far as is seen without waiting for a device."""
    if isinstance(x, Tensor) and isinstance(other, Tensor):
        return x.shape == other.shape
    return type(x) is type(other) and x == other


def _said(x: Any) -> str:
    return f"{list(x.shape)} (a tensor)" if isinstance(x, Tensor) else repr(x)


def _end(part: Partial) -> int:
    return part.draw.first_token + part.inputs.vocab_size


class _Merge:
    """The rounds of one call. What is gathered is ``[N, ...]`` of all N parts, in float64."""

    def __init__(self, parts: Sequence[Partial], reduce: Reduce | None) -> None:
        first = parts[0]
        self.parts, self.reduce = parts, reduce
        self.device = first.inputs.device
        self.own = RowDraws.of(first.draw, first.inputs)
        self.thresholds = Thresholds(self.gather)

    def gather(self, each: Sequence[Tensor]) -> Tensor:
        own = torch.stack([x.to(self.device, torch.float64) for x in each])
        if self.reduce is None:
            return own
        found = self.reduce(own)
        if not isinstance(found, Tensor) or found.dtype != own.dtype:
            kind = getattr(found, "dtype", type(found).__name__)
            raise TypeError(f"reduce gave {kind}; it must give a float64 tensor")
        if found.shape[1:] != own.shape[1:] or len(found) < len(own):
            raise ValueError(
                f"reduce gave a tensor {list(found.shape)} of {list(own.shape)}; it must give "
                f"{['N', *own.shape[1:]]}, of all N parts".replace("'", "")
            )
        return found

    def result(self) -> BlendSample:
        inputs, log_z = self.normalised([p.inputs for p in self.parts])
        inputs = self.supported(inputs)
        log_sum = None
        if self.truncates():
            scores = [
                backends.select(p.backend, i.device).blend(i, raw=True)
                for p, i in zip(self.parts, inputs, strict=True)
            ]
            own = self.own
            cut = Cut(own.temperature, own.top_k, own.top_p, own.min_p)
            threshold, log_sum = self.thresholds.of(scores, cut)
            for s in scores:
                s.masked_fill_(~(s >= threshold.to(s.device, s.dtype)[:, None]), NEG_INF)
            inputs = [Inputs([s], [1.0]) for s in scores]
        drawn = self.drawn(inputs, log_sum)
        if log_z is None or not self.parts[0].return_term_logprobs:
            return drawn
        return drawn._replace(term_logprobs=self.term_log_probs(drawn.tokens, log_z))

    # ---- What comes before the scores ------------------------------------------------------------

    def normalised(self, inputs: list[Inputs]) -> tuple[list[Inputs], Tensor | None]:
        """The inputs with the normalisers ``[B, K]`` of their terms, if these are needed."""
        first = self.parts[0]
        means = first.inputs.power != 0 or bool(first.inputs.parts)
        if not means and not first.return_term_logprobs:
            return inputs, None
        each = [
            torch.stack([log_sum(z[:, : i.vocab_size].float()) for z in i.logits], dim=-1)
            for i in inputs
        ]
        log_z = self.gather(each).logsumexp(0)
        log_z = log_z.where(log_z.isfinite(), torch.nan)
        if not means:
            return inputs, log_z
        return [_changed(i, log_z=log_z.to(i.device, torch.float32)) for i in inputs], log_z

    def supported(self, inputs: list[Inputs]) -> list[Inputs]:
        """The inputs with a mask in place of a support."""
        support = inputs[0].support
        if support is None:
            return inputs
        terms = [i.logits[support.term][:, : i.vocab_size].float() for i in inputs]
        rows, device = inputs[0].rows, self.device
        one, top_p, min_p = (
            per_row(x, rows, device, torch.float32).double()  # as kernels have them
            for x in (1.0, support.top_p, support.min_p)
        )
        cut = Cut(one, per_row(support.top_k, rows, device, torch.int64), top_p, min_p)
        threshold, log_sum = self.thresholds.of(terms, cut)
        threshold = threshold.where(log_sum.isfinite(), torch.nan)  # then no token is left
        masks = [z >= threshold.to(z.device, z.dtype)[:, None] for z in terms]
        return [
            _changed(i, support=None, mask=m if i.mask is None else m & i.mask)
            for i, m in zip(inputs, masks, strict=True)
        ]

    def truncates(self) -> bool:
        d = self.parts[0].draw
        off = (d.top_k, 0), (d.top_p, 1), (d.min_p, 0)
        return d.do_sample and any(isinstance(x, Tensor) or x != none for x, none in off)

    # ---- The draw --------------------------------------------------------------------------------

    def drawn(self, inputs: list[Inputs], log_sum: Tensor | None) -> BlendSample:
        """What wins among all parts; `log_sum` is that of all tokens, where some were removed."""
        own = self.own
        pieces = [_pieces(p, i) for p, i in zip(self.parts, inputs, strict=True)]
        told = self.gather(pieces).transpose(1, 2).flatten(0, 1)  # [pieces, B, 8]
        top, _, _, mass, group_noise, below, token_noise, token = told.unbind(-1)
        highest = top.amax(0)
        bad = own.bad | ~highest.isfinite()
        shift = torch.where(bad, 0.0, top - highest)  # of the piece's largest score
        inv_t = 1 / own.temperature
        if log_sum is None:
            log_sum = highest + (shift + told[..., 1]).logsumexp(0)
        bad |= ~log_sum.isfinite()
        log_mass = (shift * inv_t + told[..., 2]).logsumexp(0)

        # A group in several pieces has the mass of all of them; a greedy row's has its best token.
        group = token.div(GROUP, rounding_mode="floor")
        same = group[:, None] == group[None]
        of_pieces = torch.where(same, shift * inv_t + mass, NEG_INF)  # [pieces, pieces, B]
        masses = torch.where(own.greedy, of_pieces.amax(1), of_pieces.logsumexp(1))
        won = _first_of_the_best(masses + group_noise, group)
        x = (shift + below).where(group == won, NEG_INF)
        tokens = _first_of_the_best(x * inv_t + token_noise, token)
        score = x.where(token == tokens, NEG_INF).amax(0)

        nan = float("nan")
        return BlendSample(
            tokens.long().masked_fill(bad, -1),
            (score + highest - log_sum).masked_fill(bad, nan).float(),
            (score * inv_t - log_mass).masked_fill(own.greedy, 0.0).masked_fill(bad, nan).float(),
            None,
            None,
        )

    def term_log_probs(self, tokens: Tensor, log_z: Tensor) -> Tensor:
        """Each term's own log-prob of the tokens, which one part has: ``[B, K]``."""
        each = []
        for p in self.parts:
            at = (tokens.to(p.inputs.device) - p.draw.first_token)[:, None]
            has = (at >= 0) & (at < p.inputs.vocab_size)
            at = at.clamp(0, p.inputs.vocab_size - 1)
            z = torch.cat([z.gather(1, at) for z in p.inputs.logits], dim=1)
            each.append(z.double().where(has, NEG_INF))
        log_p = self.gather(each).amax(0) - log_z
        return log_p.masked_fill((tokens < 0)[:, None], float("nan")).float()


# ---- What a part finds among its own columns -----------------------------------------------------


def _pieces(part: Partial, inputs: Inputs) -> Tensor:
    """What wins ``[B, 3, 8]`` among the tokens before the first boundary of groups, among those of
    whole groups, and among those after the last boundary: the facts of `ShardDraw`, and its token.
    """
    first, columns = part.draw.first_token, inputs.vocab_size
    lead = min(-first % GROUP, columns)
    whole = (columns - lead) // GROUP * GROUP
    backend = backends.select(part.backend, inputs.device)
    pieces = inputs.logits[0].new_empty(inputs.rows, 3, 8, dtype=torch.float64)
    for n, (begin, end) in enumerate(((0, lead), (lead, lead + whole), (lead + whole, columns))):
        if begin == end:
            pieces[:, n] = _nothing(inputs.device)
            continue
        draw = _changed(part.draw, top_k=0, top_p=1.0, min_p=0.0, first_token=first + begin)
        tokens, facts = backend.draw_shard(_columns(inputs, begin, end), draw)
        pieces[:, n, :7], pieces[:, n, 7] = facts, tokens
    return pieces


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    """The facts of no columns."""
    facts = [NEG_INF, NEG_INF, NEG_INF, NEG_INF, 0.0, NEG_INF, 0.0, -1.0]
    return torch.tensor(facts, dtype=torch.float64, device=device)


def _columns(i: Inputs, begin: int, end: int) -> Inputs:
    if (begin, end) == (0, i.vocab_size):
        return i
    return _changed(
        i,
        logits=[z[:, begin:end] for z in i.logits],
        values=[q[:, begin:end] for q in i.values],
        mask=None if i.mask is None else i.mask[..., begin:end],
        vocab_size=end - begin,
    )


def _first_of_the_best(x: Tensor, numbers: Tensor) -> Tensor:
    """Of each column of ``[pieces, B]``, the lowest of the numbers whose x is the largest."""
    return numbers.where(x == x.amax(0), float("inf")).amin(0)


def _changed(given: Given, **changes: Any) -> Given:
    """A copy of what was checked already."""
    changed = copy.copy(given)
    for name, x in changes.items():
        setattr(changed, name, x)
    return changed
