"""Teacher forcing: texts in; logits, log-probs of their tokens, or hidden states out.

`Prefill` reads whole texts by a model's own modules, as Hugging Face runs them, and keeps nothing
of them. As many texts share a forward as memory is meant for. Where a model must not read one text
beside another, or not all of it at once, each is read alone, a token at a time. `over_caches` reads
texts with the engine, on from what its caches hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...models.hf import underlying
from ..forms import Ids
from ..inputs import left_pad, right_pad
from ..simple.own_loop import OwnRows, own_modules, why_a_token_at_a_time
from ..simple.term_model import TermModel, positions_of
from ..stats import ModelStats
from .batching import MAX_LOGITS, Cost, batches, max_tokens

if TYPE_CHECKING:
    from .group import Group


class Prefill:
    """Reads whole texts with one model.

    Methods yield what they find of a text once it is read. Texts of about one length are read
    together, so that results do not come in the order of the texts.

    Attributes:
        forwards: how often the model ran.
        tokens: how many it read, padding not counted.
    """

    def __init__(self, model: TermModel) -> None:
        self.model = model
        self.forwards = self.tokens = 0

    @torch.no_grad()
    def logits(
        self, texts: Sequence[Ids], firsts: Sequence[int], *, every: bool = True
    ) -> Iterator[tuple[int, Tensor]]:
        """The logits before each token of each text, from its token ``firsts[i] >= 1`` on.

        So the last token of a text is not read. With ``every=False``, only the logits before that
        token are given.

        Yields:
            The index of a text, and its logits ``[len(texts[i]) - firsts[i], V]``, or ``[1, V]``.
        """
        counts = [len(t) - first if every else 1 for t, first in zip(texts, firsts, strict=True)]
        for now in batches(
            Cost([len(t) for t in texts], max_tokens(self.model.device)),
            Cost([self.numbers(len(t), n) for t, n in zip(texts, counts, strict=True)], MAX_LOGITS),
        ):
            found = self.batch_logits(
                [texts[i] for i in now], [firsts[i] for i in now], every=every
            )
            for i, z in zip(now, found, strict=True):
                yield i, z[len(z) - counts[i] :]

    @torch.no_grad()
    def batch_logits(
        self,
        texts: Sequence[Ids],
        firsts: Sequence[int],
        *,
        every: bool = True,
        mixes: Tensor | None = None,
    ) -> Tensor:
        """What `logits` gives, of all texts at once: ``[texts, most, V]``, padded on the left.

        `most` are the logits of the text that has most. What stands before those of another text
        means nothing.

        Args:
            mixes: of each text, as in `TermModel.seat`.
        """
        counts = [len(t) - first if every else 1 for t, first in zip(texts, firsts, strict=True)]
        most, longest = max(1, *counts), max(map(len, texts)) - 1
        self.tokens += sum(map(len, texts)) - len(texts)
        if why_a_token_at_a_time(self.model, longest) is not None:
            begun = [min(first, len(t) - 1) for t, first in zip(texts, firsts, strict=True)]
            its = [None] * len(texts) if mixes is None else mixes.split(1)
            each = zip(texts, begun, counts, its, strict=True)
            found = [self._as_written(t[:b], t[b:], x)[-max(n, 1) :] for t, b, n, x in each]
            return torch.stack([pad(z, (0, 0, most - len(z), 0)) for z in found])
        read = left_pad([t[:-1] for t in texts]).to(self.model.device)
        arguments: dict[str, Any] = {
            "attention_mask": None if read.mask.all() else read.mask,
            "position_ids": positions_of(read.mask),
            "logits_to_keep": most,
        }
        arguments = {k: v for k, v in arguments.items() if k in self.model.accepts}
        fixed = self.model.original_context is None  # whether RoPE frequencies never change
        runs = self.model.runs if fixed else own_modules(self.model)
        self.forwards += 1
        self.model.seat(mixes, len(texts))
        output = runs(input_ids=read.ids, use_cache=False, return_dict=True, **arguments)
        return output.logits[:, -most:]

    def numbers(self, tokens: int, count: int) -> int:
        """How many numbers a model's logits are for a text, where those of `count` tokens are
        wanted: some models give the others too."""
        kept = count if "logits_to_keep" in self.model.accepts else tokens
        return kept * (self.model.vocabulary or 1)

    def _as_written(self, prompt: Ids, response: Ids, mix: Tensor | None) -> Tensor:
        """Logits ``[tokens, V]`` before each token of a response, as `model.generate` has them when
        it writes it after this prompt alone: a token at a time."""
        ids = torch.tensor([[*prompt]], device=self.model.device)
        rows = OwnRows(self.model, ids, torch.ones_like(ids), len(response), mix)
        tokens = torch.tensor([*response[:-1]], dtype=torch.int64, device=self.model.device)
        found = [rows.step(), *map(rows.step, tokens.split(1) if len(tokens) else ())]
        self.forwards += rows.forwards
        return torch.cat(found)

    @torch.no_grad()
    def last_outputs(self, texts: Sequence[Ids]) -> Iterator[tuple[int, Tensor]]:
        """What a scalar head or a classifier says of each text; its model may be an encoder.

        Yields:
            The index of a text, and the numbers ``[labels]`` that the model gives for the text, or
            for its last token where it gives some for each.
        """
        # Classifiers find the end of a text by the padding after it.
        padding = getattr(self.model.bare.config, "pad_token_id", None)
        longest = max(map(len, texts), default=0)
        alone = padding is None or self.model.follows_longest(longest)
        most = 0 if alone else max_tokens(self.model.device)
        for now in batches(Cost([len(t) for t in texts], most)):
            ids, mask = (
                x.to(self.model.device) for x in right_pad([texts[i] for i in now], padding or 0)
            )
            self.tokens += int(mask.sum())
            self.forwards += 1
            runs = own_modules(self.model)
            self.model.seat(None, len(now))
            z = runs(input_ids=ids, attention_mask=mask, return_dict=True).logits
            if z.dim() == 3:
                z = z[torch.arange(len(z), device=z.device), mask.sum(dim=1) - 1]
            yield from zip(now, z, strict=True)

    @torch.no_grad()
    def hidden(
        self, texts: Sequence[Ids], firsts: Sequence[int], *, rows: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """The last hidden states of the tokens of each text from its token ``firsts[i]`` on.

        Args:
            rows: how many texts share a forward; None: as many as memory is meant for.

        Yields:
            The index of a text, and its states ``[len(texts[i]) - firsts[i], H]``.
        """
        lengths = [len(t) for t in texts]
        most = max_tokens(self.model.device) if rows is None else math.inf
        if self.model.follows_longest(max(lengths, default=0)):
            rows = 1
        for now in batches(Cost(lengths, most), Cost([1] * len(texts), rows or math.inf)):
            ids, mask = (x.to(self.model.device) for x in right_pad([texts[i] for i in now]))
            starts = torch.tensor([firsts[i] for i in now], device=ids.device)
            counts = [lengths[i] - firsts[i] for i in now]
            self.tokens += sum(lengths[i] for i in now)
            self.forwards += 1
            self.model.seat(None, len(now))
            found = hidden_states(own_modules(self.model), ids, mask, starts, max(counts))
            for i, n, states in zip(now, counts, found, strict=True):
                yield i, states[:n]

    def stats(self) -> ModelStats:
        return ModelStats((self.model.name,), self.forwards, self.tokens)


def hidden_states(
    model: Any, input_ids: Tensor, attention_mask: Tensor, starts: Tensor, length: int
) -> Tensor:
    """The last hidden states ``[rows, length, H]`` of each row's tokens from ``starts [rows]`` on.

    Gradients flow through them. What is past the end of a row means nothing.

    Args:
        model: one with a backbone, or a PEFT model around such a one.
        input_ids, attention_mask: ``[rows, tokens]``, padded on the right.
    """
    bare: Any = underlying(model)
    states = bare.base_model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True
    ).last_hidden_state
    at = starts[:, None] + torch.arange(length, device=starts.device)
    at = at.clamp(max=states.shape[1] - 1)
    return states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))


def over_caches(
    group: Group,
    rows: Sequence[int],
    starts: Sequence[int],
    ids: Sequence[Ids],
    counts: Sequence[int],
    *,
    states: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Let rows of the engine read `ids`, which stand at their positions from `starts` on.

    Long texts are read in pieces.

    Args:
        counts: after how many of its last tokens each row's logits are wanted; 0: it only reads.
        states: as of `Group.read_at`.

    Yields:
        The index of a row in `rows`, and the logits ``[n, V]`` after the next n of those tokens.
    """
    most = max_tokens(group.device)
    most_logits = max(1, MAX_LOGITS // group.backbone.config.vocab_size)
    done = [0] * len(rows)
    unread = [i for i in range(len(rows)) if ids[i]]
    while unread:
        firsts = [max(done[i], len(ids[i]) - counts[i]) for i in unread]  # whose logits are wanted
        ends = [
            min(len(ids[i]), done[i] + most, first + most_logits)
            for i, first in zip(unread, firsts, strict=True)
        ]
        pieces = [ids[i][done[i] : end] for i, end in zip(unread, ends, strict=True)]
        wanted = [max(0, end - first) for end, first in zip(ends, firsts, strict=True)]
        at = [starts[i] + done[i] for i in unread]
        read = group.read_at([rows[i] for i in unread], at, pieces, wanted, states=states)
        for batch, logits in read:
            for j, z in zip(batch, logits, strict=True):
                if wanted[j]:
                    yield unread[j], z[len(z) - wanted[j] :]
        for i, end in zip(unread, ends, strict=True):
            done[i] = end
        unread = [i for i in unread if done[i] < len(ids[i])]


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """``log p(token)`` in float32 of ``tokens [n]`` under ``logits [n, V]``."""
    z = logits.float()
    return z.gather(1, tokens[:, None])[:, 0] - z.logsumexp(dim=1)
