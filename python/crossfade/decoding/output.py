"""What decoding gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from torch import Tensor

from ..blends.printing import cut
from .stats import Stats

if TYPE_CHECKING:
    from .engine.prefix import PrefixCache

ROWS = 8  # so many rows are shown where an output is printed


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _more(rows: int) -> list[str]:
    return [f"... and {rows - ROWS} more"] if rows > ROWS else []


class Match(NamedTuple):
    """Two rows of a tournament that were compared.

    Attributes:
        a, b: the slots of the rows, which are numbered from 0 within their request; b is None where
            a had a bye, and won without a match.
        prob: the probability that a is preferred, in [0, 1]; NaN for a bye, and where the two could
            not be compared.
        winner: the slot of the row that stayed: a, b, or the lower one where `prob` is 0.5 or NaN.
    """

    a: int
    b: int | None
    prob: float
    winner: int


class Played(NamedTuple):
    """A tournament of one request that is over.

    Attributes:
        rounds: the matches of each round.
        order: the slots in the order of elimination, the winner first.
    """

    rounds: list[list[Match]]
    order: list[int]


class Filtered(NamedTuple):
    """The particle filter of one request, once it is over.

    Attributes:
        weights: of each row that stayed, the best first; they sum to 1.
        sizes: the effective sample size at the end of each chunk, before rows were resampled.
    """

    weights: list[float]
    sizes: list[float]


@dataclass(frozen=True, eq=False)
class Output:
    """Generated sequences. With `num_return_sequences` = n, the n rows of a request stay together.

    Attributes:
        sequences: ``[rows, prompt + new]`` int64: the first term's prompt, left-padded, then the
            response, right-padded.
        prompt_length: columns of the prompt in `sequences`.
        lengths: ``[rows]`` int64: new tokens, EOS included.
        text: the responses as texts, without special tokens. The text of a prompt followed by this
            one is the whole text, the space between them included. In a chat, it is the content of
            the answer. None without a tokenizer.
        logprobs: ``[rows, new]`` float32, nats: of each token under the blend at temperature 1,
            before logits processors and truncation; 0 past the end.
        sampled_logprobs: ``[rows, new]`` float32: of each token under the distribution that it was
            sampled from; 0 where the best token was taken.
        finished: ``[rows]`` bool: ended by EOS, a stop string or a stopping criterion; False if cut
            by a limit of length or time, or failed.
        ended: ``[rows]`` bool: finished, failed or at its limit of length; False if time or an
            interrupt cut it, or kept it from starting.
        failed: ``[rows]`` bool: cut because no token could be chosen, or not begun because a prompt
            is longer than the context of a model that reads it; a RuntimeWarning said why.
        stats: what it cost.
        term_logprobs: ``[rows, new, terms]`` float32: under each term alone; on demand.
        pushes: ``[rows, new, terms + values]`` float32, nats: what each term, then each value and
            classifier did for each token, as `crossfade.ops.BlendSample` says: how far it made the
            token's log-prob depart from the first term's, and from the mean over the blend's
            tokens; 0 past the end; on demand.
        kl: ``[rows, new]`` float32, nats: KL(blend at temperature 1 || `kl_to`) of each step: how
            far a step's distribution is from the reference's. Infinite where the reference excludes
            a token that the blend does not, NaN where it is bad; on demand.
        kl_to_base: ``[rows, new]`` float32: the same with the first term as reference; on demand.
        cache: for a call that goes on with these rows; on demand.
        values: of a search, ``[requests]`` float32: each response's value, as the search last saw
            it; ``[requests, n]``, the best first, where n are returned. NaN where none was chosen.
            Of a tournament that a judge decides: the mean probability that the judge preferred the
            response in its matches, of those that have one; NaN if none has.
        value_parts: of a search by a sum of values, ``[requests, parts]`` or ``[requests, n,
            parts]``: each part before its weight, in the order of ``search.objective.names``. None
            where a judge decides.
        bracket: of a tournament, for each request its rounds, each a list of `Match`; no rounds
            where there was one row, or an interrupt came first.
        slots: of a tournament, int64 as `values`: the slot that each response has in the bracket.
        weights: of a particle filter, float32 as `values`: the weight of each response. Those of
            all n rows sum to 1. NaN where none was chosen.
        effective_sizes: of a particle filter, for each request its effective sample size ``1 /
            sum_i w_i^2`` at the end of each chunk, before rows were resampled: the last one is
            that of the rows at the end, as `weights` has them unless they were resampled there.
        entropies: ``[rows, new]`` float32, nats: of a search whose chunks end by the entropy, the
            blend's entropy where each token was drawn, at temperature 1; 0 past the end.
        tokens_by_draft: with a draft, ``[rows]`` int64: how many new tokens it had guessed.
    """

    sequences: Tensor
    prompt_length: int
    lengths: Tensor
    text: list[str] | None
    logprobs: Tensor
    sampled_logprobs: Tensor
    finished: Tensor
    failed: Tensor
    ended: Tensor
    stats: Stats
    term_logprobs: Tensor | None = None
    kl: Tensor | None = None
    kl_to_base: Tensor | None = None
    cache: PrefixCache | None = None
    values: Tensor | None = None
    value_parts: Tensor | None = None
    bracket: list[list[list[Match]]] | None = None
    slots: Tensor | None = None
    weights: Tensor | None = None
    effective_sizes: list[list[float]] | None = None
    entropies: Tensor | None = None
    tokens_by_draft: Tensor | None = None
    pushes: Tensor | None = None

    def __repr__(self) -> str:
        """For people: what was written, cut after some rows and characters, and why it ended."""
        lines = []
        for i, tokens in enumerate(self.responses[:ROWS]):
            count = _count(len(tokens), "token")
            written = f"ids {tokens[:12]}" + "..." * (len(tokens) > 12)
            written = cut(self.text[i]) if self.text is not None else written
            value = "" if self.slots is None else f", slot {self.slots.flatten()[i]}"
            value += "" if self.values is None else f", value {self.values.flatten()[i]:.4g}"
            value += "" if self.weights is None else f", weight {self.weights.flatten()[i]:.3g}"
            lines.append(f"{i}: {count}, {self._why_over(i)}{value}: {written}")
        lines += _more(len(self.lengths))
        rows = _count(len(self.lengths), "row")
        name = type(self).__name__
        return "\n  ".join([f"{name}({rows}, {self.stats.summary})", *lines])

    def _why_over(self, row: int) -> str:
        """Why a row has no more tokens, for people."""
        if self.failed[row]:
            return "failed"
        if self.finished[row]:
            return "finished"
        return "at its limit" if self.ended[row] else "cut short"

    def __getitem__(self, key: Any) -> NoReturn:
        """There are no items: a tensor of tokens, as Hugging Face's `generate` gives, has them."""
        raise TypeError(
            f"an Output has no item {key!r}: sequences[i] are the tokens of row i, text[i] is its "
            "text, responses[i] are its new tokens"
        )

    @property
    def responses(self) -> list[list[int]]:
        """The new tokens of each row, EOS included, without padding."""
        new = self.sequences[:, self.prompt_length :].tolist()
        return [row[:n] for row, n in zip(new, self.lengths.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probs of given responses under a blend.

    Attributes:
        logprobs: ``[requests, tokens]`` float32, nats; 0 past the end; NaN where the blend is bad.
        ranks: ``[requests, tokens]`` int64: how many tokens the blend prefers to each token, those
            of a higher log-prob and those of an equal one with a lower id. So 0 is the token that
            greedy decoding takes; 0 past the end, too; -1 where the blend is bad.
        lengths: ``[requests]`` int64: tokens of each response.
        stats: what it cost: of each model the forwards and the tokens that it read, without those
            that several texts share and that are read once.
        term_logprobs: ``[requests, tokens, terms]`` float32: under each term alone; on demand.
        kl: ``[requests, tokens]`` float32, nats: KL(blend || `kl_to`) at each token; on demand.
        top_tokens, top_logprobs: ``[requests, tokens, n]``: the n tokens that the blend likes best
            at each place, the best first, and their log-probs; on demand.
    """

    logprobs: Tensor
    ranks: Tensor
    lengths: Tensor
    stats: Stats
    term_logprobs: Tensor | None = None
    kl: Tensor | None = None
    top_tokens: Tensor | None = None
    top_logprobs: Tensor | None = None

    def __repr__(self) -> str:
        """For people: the log-prob of each response, cut after some of them."""
        lines = [
            f"{i}: {_count(n, 'token')}, log-prob {total:.4g}, perplexity {perplexity:.4g}"
            for i, (n, total, perplexity) in enumerate(
                zip(*(x[:ROWS].tolist() for x in self._figures), strict=True)
            )
        ]
        lines += _more(len(self.lengths))
        return "\n  ".join([f"Scores({_count(len(self.lengths), 'response')})", *lines])

    @property
    def _figures(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.lengths, self.totals, self.perplexity

    @property
    def greedy(self) -> Tensor:
        """``[requests]`` bool: whether greedy decoding writes the whole response."""
        return (self.ranks == 0).all(dim=1)

    @property
    def totals(self) -> Tensor:
        """``[requests]``: the log-prob of each whole response."""
        return self.logprobs.sum(dim=1)

    @property
    def perplexity(self) -> Tensor:
        """``[requests]``: exp of the mean negative log-prob of a token."""
        return (-self.totals / self.lengths).exp()
