"""What a model makes of pairs of responses: their log-probs, and how sure it is beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import explained
from ..decoding.engine.prefill import Prefill
from ..decoding.forms import Ids
from ..decoding.settings import check_int
from ..decoding.simple.term_model import TermModel
from ..models.hf import text_config, underlying
from ..ops.logp.api import all_results
from ..ops.logp.tiles import Settings, tile_size
from ..training.fused_head import IGNORED, check_logits, in_pieces, plain_layer
from ..training.logits import Logits
from ..training.rows import LONGEST, check_ids
from .rows import OF_IDS
from .states import term_model


@dataclass(frozen=True, eq=False)
class Reading:
    """Figures of each pair under a model, ``[pairs]`` float64 on the CPU, in nats.

    Attributes:
        chosen, rejected: log-probs of the whole responses after their prompts.
        argmax: the mean, over the tokens of the chosen response, of the log-prob of the most likely
            token there. Where training presses both responses down, this is what rises (Ren and
            Sutherland, arXiv:2407.10490).
        entropy: the mean entropy of the next token over the tokens of the chosen response.
    """

    chosen: Tensor
    rejected: Tensor
    argmax: Tensor
    entropy: Tensor

    @property
    def margins(self) -> Tensor:
        """``log p(chosen) - log p(rejected)`` of each pair."""
        return self.chosen - self.rejected

    @property
    def is_finite(self) -> Tensor:
        """Whether all figures of a pair are finite, ``[pairs]``."""
        return torch.stack([*vars(self).values()]).isfinite().all(0)

    def __getitem__(self, pairs: Tensor) -> Reading:
        """The figures of some pairs alone."""
        return Reading(*(x[pairs] for x in vars(self).values()))


class _Asked(NamedTuple):
    """A response that is asked about: its place among all, and its tokens."""

    place: int
    tokens: Ids


@torch.no_grad()
@explained()
def read_pairs(
    model: Any, pairs: Sequence[Mapping[str, Any]], max_batch: int | None = None
) -> Reading:
    """Read both responses of each pair after its prompt, many in a forward.

    The model may be in the middle of its training: it is read without gradients and without
    dropout, nothing of it changes, and no random number is drawn. An autocast around the call
    holds. Logits are made in tiles, and stored for one text at a time at most. What two responses
    read alike is read once, such as the prompt of two answers of one token.

    Args:
        model: a causal LM, a PEFT model, or a `Model` with an adapter.
        pairs: mappings with `prompt_ids`, `chosen_ids` and `rejected_ids`, of one token or more
            each.
        max_batch: how many texts share a forward at most; None: as many as memory is meant for.

    Raises:
        TypeError, ValueError: name the pair, the key, what it was and what it must be.
    """
    check_int("max_batch", max_batch, 1)
    term = term_model(model)
    asked = _asked(pairs, term)
    found = torch.full((3, 2 * len(pairs)), torch.nan, dtype=torch.float64)
    each = _by_states if has_linear_head(term) else _by_logits
    for asks, logp, top, entropy in each(term, asked, max_batch):
        counts = [len(ask.tokens) for ask in asks]
        split = (x.to("cpu", torch.float64).split(counts) for x in (logp, top, entropy))
        for ask, own, tops, entropies in zip(asks, *split, strict=True):
            found[:, ask.place] = torch.stack([own.sum(), tops.mean(), entropies.mean()])
    chosen, rejected = found[:, 0::2], found[:, 1::2]
    return Reading(chosen[0], rejected[0], chosen[1], chosen[2])


# The texts to read, each with where the first state is that predicts a token asked about.
_Texts = dict[tuple[tuple[int, ...], int], list[_Asked]]
# Some responses, and of all their tokens ``[tokens]``: the log-prob, that of the most likely token
# in its place, and the entropy there.
_Figures = tuple[list[_Asked], Tensor, Tensor, Tensor]


def _asked(pairs: Sequence[Mapping[str, Any]], term: TermModel) -> _Texts:
    """What is to be read: nothing reads the last token of a response."""
    texts: _Texts = {}
    vocabulary = term.vocabulary or LONGEST
    for i, pair in enumerate(pairs):
        where = f"pair {i} of pairs"
        if not isinstance(pair, Mapping):
            raise TypeError(f"{where} is a {type(pair).__name__}; it must be a mapping")
        for name in OF_IDS:
            if pair.get(name) is None:
                raise ValueError(f"{name} of {where} is missing; it must have {', '.join(OF_IDS)}")
        prompt, *responses = (check_ids(pair[x], f"{x} of {where}", vocabulary) for x in OF_IDS)
        for side, response in enumerate(responses):
            read = (*prompt, *response[:-1])
            if term.context is not None and len(read) > term.context:
                raise ValueError(
                    f"{OF_IDS[1 + side]} of {where} ends after {len(read) + 1} tokens; the model's "
                    f"context is {term.context}"
                )
            asks = texts.setdefault((read, len(prompt) - 1), [])
            asks.append(_Asked(2 * i + side, response))
    return texts


def has_linear_head(term: TermModel) -> bool:
    """Whether logits are those of a linear layer after the backbone, as far as `Logits` knows."""
    bare: Any = underlying(term.runs)
    try:
        plain_layer(bare, bare.get_output_embeddings())
        term.seat(None, 4)  # the trial's rows
        check_logits(bare, logits_of(bare))
    except NotImplementedError:
        return False
    return not in_pieces(bare.get_output_embeddings())


def logits_of(bare: Any) -> Logits:
    """How a model turns the products of its head into logits."""
    return Logits.of(text_config(bare), 1.0)


def _by_states(term: TermModel, texts: _Texts, max_batch: int | None) -> Iterator[_Figures]:
    """The figures, from states and a linear head, whose logits are made in tiles."""
    bare: Any = underlying(term.runs)
    head = bare.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", plain_layer(bare, head).bias)
    settings = Settings(*logits_of(bare).settings(), IGNORED)
    wanted = list(texts.values())
    waiting: list[_Asked] = []
    states: list[Tensor] = []

    def figures() -> _Figures:
        targets = torch.tensor([t for ask in waiting for t in ask.tokens], device=weight.device)
        with torch.autocast(weight.device.type, enabled=False):
            logp, _, entropy, normaliser, *_ = all_results(
                torch.cat(states), weight, targets, bias, settings
            )
        # the largest logit less the log-sum-exp
        return list(waiting), logp, -normaliser[1], entropy

    reads = Prefill(term).hidden(
        [list(ids) for ids, _ in texts], [at for _, at in texts], rows=max_batch
    )
    for i, own in reads:
        for ask in wanted[i]:
            waiting.append(ask)
            states.append(own.to(weight.device))
        if sum(map(len, states)) >= tile_size(weight.device)[0]:
            yield figures()
            waiting, states = [], []
    if waiting:
        yield figures()


def _by_logits(term: TermModel, texts: _Texts, max_batch: int | None) -> Iterator[_Figures]:
    """The figures, from the logits that the model itself gives, whatever its head is."""
    prefill, each = Prefill(term), list(texts.items())
    for k in range(0, len(each), max_batch or len(each)):
        part = each[k : k + (max_batch or len(each))]
        # logits are given before the tokens of a text, so one more stands for those asked about
        whole = [[*ids, 0] for (ids, _), _ in part]
        for i, logits in prefill.logits(whole, [at + 1 for (_, at), _ in part]):
            log_p = logits.double().log_softmax(-1)
            top, entropy = log_p.amax(-1), torch.special.entr(log_p.exp()).sum(-1)
            for ask in part[i][1]:
                targets = torch.tensor(ask.tokens, device=log_p.device)
                yield [ask], log_p.gather(-1, targets[:, None])[:, 0], top, entropy
