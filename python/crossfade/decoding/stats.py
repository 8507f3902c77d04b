"""What a call cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..blends.printing import short


@dataclass(frozen=True)
class ModelStats:
    """What one model of the blend did.

    Attributes:
        names: the terms and values that it computed, as rows of one batch.
        forwards: how often it ran.
        tokens: how many tokens it read for all of them, without padding.
    """

    names: tuple[str, ...]
    forwards: int
    tokens: int


@dataclass(frozen=True)
class Stats:
    """What a call cost.

    Attributes:
        tokens: how many tokens were generated, in all rows that are returned, or scored.
        seconds: how long it took, from the first forward to the last token.
        models: an entry for each model and adapter, in the order of their first terms; then for
            those of a search's value. Rows that a search dropped are counted too.
        cache_bytes: the size of all caches at the end.
        peak_bytes: on GPUs torch's peak on the first term's device since it was last reset; on CPUs
            the size of caches and results at their largest.
        notes: what the engine left out, and why.
        interrupted: whether Ctrl-C cut the call short.
        rounds: with a draft, how many steps checked guesses.
        guessed: how many tokens it guessed, those past an end or a limit not counted.
        right: how many of these were drawn.
        step_seconds: the median time of a step, by how many tokens of each row it read: 1 in plain
            ones. `crossfade.drafts.speedup` says from them what a draft is worth.
        guess_seconds: the median time of a guess, where models make them.
    """

    tokens: int
    seconds: float
    models: tuple[ModelStats, ...]
    cache_bytes: int
    peak_bytes: int
    notes: tuple[str, ...] = ()
    interrupted: bool = False
    rounds: int = 0
    guessed: int = 0
    right: int = 0
    step_seconds: Mapping[int, float] = field(default_factory=dict)
    guess_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Of the tokens that a draft guessed, the share that was drawn; 0.0 if it guessed none."""
        return self.right / self.guessed if self.guessed else 0.0

    @property
    def drafted(self) -> str:
        """What a draft has guessed, for people."""
        if not self.guessed:
            return "no token was guessed"
        share = f"{self.acceptance:.0%} of {self.guessed} guessed tokens were drawn"
        return f"{share}, in {self.rounds} round{'' if self.rounds == 1 else 's'}"

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second, of all rows together; 0.0 where no time has passed."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def summary(self) -> str:
        """The tokens, the seconds and what the two make, for people."""
        rate = (
            f"{self.tokens} tokens in {self.seconds:.3g} s, {self.tokens_per_second:.3g} tokens/s"
        )
        return f"{rate}, interrupted" if self.interrupted else rate

    def __repr__(self) -> str:
        memory = f"caches {short(self.cache_bytes)}B, peak {short(self.peak_bytes)}B"
        read = [
            f"{', '.join(m.names)}: {m.forwards} forwards, {m.tokens} tokens read"
            for m in self.models
        ]
        notes = [f"note: {note}" for note in self.notes]
        if self.guessed:
            read.append(f"draft: {self.drafted}")
        return "\n  ".join([f"Stats({self.summary}; {memory})", *read, *notes])


def together(each: Sequence[Stats], *, interrupted: bool = False) -> Stats:
    """What several calls, one after the other, cost together."""
    return Stats(
        tokens=sum(s.tokens for s in each),
        seconds=sum(s.seconds for s in each),
        models=summed(m for s in each for m in s.models),
        cache_bytes=each[-1].cache_bytes,
        peak_bytes=max(s.peak_bytes for s in each),
        notes=tuple(dict.fromkeys(n for s in each for n in s.notes)),
        interrupted=interrupted,
        rounds=sum(s.rounds for s in each),
        guessed=sum(s.guessed for s in each),
        right=sum(s.right for s in each),
    )


def summed(each: Iterable[ModelStats]) -> tuple[ModelStats, ...]:
    """Each model's work over several batches, in the order in which models first appear."""
    total: dict[tuple[str, ...], ModelStats] = {}
    for s in each:
        old = total.get(s.names, ModelStats(s.names, 0, 0))
        total[s.names] = ModelStats(s.names, old.forwards + s.forwards, old.tokens + s.tokens)
    return tuple(total.values())


def since(before: Iterable[ModelStats], now: Iterable[ModelStats]) -> tuple[ModelStats, ...]:
    """Each model's work between two moments, of models that did some."""
    undone = (ModelStats(s.names, -s.forwards, -s.tokens) for s in before)
    return tuple(s for s in summed([*now, *undone]) if s.forwards)
