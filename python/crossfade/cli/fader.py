"""What `crossfade demo` decodes and measures: texts at several positions of one fader.

The fader stands between two adapters of a small model, both of which ship with crossfade. One was
trained to praise movies, the other to be short; they compete, because praise takes words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import metrics, models
from ..blends.blend import Blend, Model
from ..decoding import generate
from ..progress import OnStep, progress_bar

FORMULA = "(1 - w) * sentiment + w * brevity"
GUIDES = ("sentiment", "brevity")
QUESTION = "In one sentence: what did you think of the movie, {}?"
MOVIES = (  # the guides were trained on none of these
    "a heist film your friend recommended",
    "a wedding comedy from the sixties",
    "a fairy tale with the strange title",
    "a boxing drama in black and white",
    "a spy thriller with the big budget",
    "a film about a jazz band from the festival",
    "a robot story that made the news",
    "a silent comedy your grandmother likes",
)


@dataclass(frozen=True)
class Settings:
    """What the demo decodes. All positions draw with the same random numbers, from `seed`."""

    weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 8  # texts about each movie at each position
    max_new_tokens: int = 40
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("weights is empty; it must have at least one number")
        if not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights are {self.weights}; they must be finite")
        for name, value in (("samples", self.samples), ("max_new_tokens", self.max_new_tokens)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be within [0, 2**64)")


@dataclass(frozen=True)
class Position:
    """The texts at one position of the fader, and what was measured of them.

    Attributes:
        weight: the position.
        sentiment: the mean over the texts of VADER's compound score, which is within [-1, 1].
        words: the mean number of words of a text.
        kl: the mean over the texts of KL(blend || base) at temperature 1, in nats a token.
        sentiment_interval, words_interval, kl_interval: half of the 95 % interval of that mean.
        perplexity: of all texts together, under the base.
        distinct_2: the number of different word pairs over the number of all word pairs.
    """

    weight: float
    sentiment: float
    sentiment_interval: float
    words: float
    words_interval: float
    kl: float
    kl_interval: float
    perplexity: float
    distinct_2: float
    tokens: int
    tokens_per_second: float
    texts: tuple[str, ...]


def terms(model: Any, tokenizer: Any) -> tuple[Model, Model, Model]:
    """The base, the sentiment guide and the brevity guide, which share the weights of `model`."""
    wrapped = models.with_adapters(model, {name: models.guide(name) for name in GUIDES})
    base, sentiment, brevity = (
        Model(wrapped, tokenizer=tokenizer, adapter=name, name=name or "base")
        for name in (None, *GUIDES)
    )
    return base, sentiment, brevity


def fade(base: Model, sentiment: Model, brevity: Model, w: float) -> Blend:
    """`FORMULA`, with the base as a first term of weight 0: divergences are from the first term."""
    return 0 * base + (1 - w) * sentiment + w * brevity


def chats() -> list[list[dict[str, str]]]:
    """The prompts: a message about each movie."""
    return [[{"role": "user", "content": QUESTION.format(movie)}] for movie in MOVIES]


def measure(
    blend: Blend, weight: float, settings: Settings, on_step: Callable[[], object]
) -> Position:
    """Decode and measure one position of the fader.

    Args:
        blend: what writes the texts; its first term is the base.
        on_step: called after each step of the decoding.
    """
    out: Any = generate(
        blend,
        chats(),
        num_return_sequences=settings.samples,
        max_new_tokens=settings.max_new_tokens,
        do_sample=True,
        temperature=settings.temperature,
        seed=settings.seed,
        return_term_logprobs=True,
        return_kl_to_base=True,
        streamer=OnStep(on_step),
    )
    texts = [
        text.strip() if finished else f"{text.strip()}…"
        for text, finished in zip(out.text, out.finished.tolist(), strict=True)
    ]
    kls = (out.kl_to_base.sum(dim=1) / out.lengths).tolist()
    sentiment, sentiment_interval = metrics.mean_interval(metrics.sentiment(texts))
    words, words_interval = metrics.mean_interval([float(len(text.split())) for text in texts])
    kl, kl_interval = metrics.mean_interval(kls)
    return Position(
        weight=weight,
        sentiment=sentiment,
        sentiment_interval=sentiment_interval,
        words=words,
        words_interval=words_interval,
        kl=kl,
        kl_interval=kl_interval,
        perplexity=metrics.perplexity(
            float(out.term_logprobs[:, :, 0].double().sum()), out.stats.tokens
        ),
        distinct_2=metrics.distinct_n(texts, 2),
        tokens=out.stats.tokens,
        tokens_per_second=out.stats.tokens / out.stats.seconds,
        texts=tuple(texts),
    )


def positions(model: Any, tokenizer: Any, settings: Settings) -> Iterator[Position]:
    """The positions of `settings`, one after the other, with a progress bar on stderr."""
    base, sentiment, brevity = terms(model, tokenizer)
    steps = settings.max_new_tokens
    with progress_bar(steps * len(settings.weights), "step") as bar:
        for i, weight in enumerate(settings.weights):
            bar.set_description(f"w = {weight:g}")
            blend = fade(base, sentiment, brevity, weight)
            position = measure(blend, weight, settings, bar.update)
            bar.update((i + 1) * steps - bar.n)  # the steps that no text needed any more
            yield position
