"""What `crossfade demo` decodes and measures: texts at several positions of one fader.

The fader moves a small model between two moods of its own. Each mood is nothing but a system prompt
that one more term of the blend reads; at 0 the fader leaves the model as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .. import metrics
from ..blends.blend import Blend, Model
from ..decoding import generate
from ..progress import OnStep

FORMULA = "base + w * (cheerful - gloomy)"
MOODS = {  # the system prompts
    "cheerful": "You are cheerful. You love everything and praise it warmly.",
    "gloomy": "You are gloomy. You hate everything and complain about it bitterly.",
}
QUESTION = "How was the {}? Answer in one sentence."
SUBJECTS = (  # the moods and positions were chosen on other ones: see bench/reproduce/moods.py
    "museum",
    "coffee shop",
    "bus ride",
    "jazz festival",
    "beach",
    "village fair",
    "cooking class",
    "football match",
)
PROMPTS = tuple(QUESTION.format(subject) for subject in SUBJECTS)


@dataclass(frozen=True)
class Settings:
    """What the demo decodes. All positions draw with the same random numbers, from `seed`.

    Attributes:
        weights: the positions of the fader. Position 0, the base, is always added.
        samples: how many texts are written to each prompt at each position.
        prompts: what the user asks; each is a chat of its own.
    """

    weights: tuple[float, ...] = (-2.0, -1.0, 0.0, 1.0, 2.0)
    samples: int = 6
    max_new_tokens: int = 40
    temperature: float = 0.5
    seed: int = 0
    prompts: tuple[str, ...] = PROMPTS

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
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ValueError(f"prompts are {self.prompts}; each must have a word")

    @property
    def positions(self) -> tuple[float, ...]:
        """The weights, the base's first and none twice: the order in which they are decoded."""
        return tuple(dict.fromkeys((0.0, *self.weights)))


@dataclass(frozen=True)
class Position:
    """The texts at one position of the fader, and what was measured of them.

    Attributes:
        weight: the position. At 0 stands the base.
        sentiment: the mean over the texts of VADER's compound score, which is within [-1, 1].
        words: the mean number of words of a text.
        perplexity: of all texts together, under the base at temperature 1.
        kl: the mean over the texts of KL(blend || base) at temperature 1, in nats a token.
        sentiment_interval, words_interval, perplexity_interval, kl_interval: half of the 95 %
            interval of that figure.
        distinct_2: the number of different word pairs over the number of all word pairs.
        seconds: how long the decoding took.
        texts: those to the first prompt, then those to the second, and so on. "…" ends one that was
            cut at the limit of tokens.
    """

    weight: float
    sentiment: float
    sentiment_interval: float
    words: float
    words_interval: float
    perplexity: float
    perplexity_interval: float
    kl: float
    kl_interval: float
    distinct_2: float
    tokens: int
    seconds: float
    texts: tuple[str, ...]


def terms(model: Any, tokenizer: Any) -> tuple[Model, Model, Model]:
    """The base, and the same model in its two moods. They share the weights of `model`."""
    base = Model(model, tokenizer=tokenizer, name="base")
    cheerful, gloomy = (
        Model(model, tokenizer=tokenizer, system=system, name=name)
        for name, system in MOODS.items()
    )
    return base, cheerful, gloomy


def fade(base: Model, cheerful: Model, gloomy: Model, w: float) -> Blend:
    """`FORMULA` at one position."""
    return base + w * (cheerful - gloomy)


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
        [[{"role": "user", "content": prompt}] for prompt in settings.prompts],
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
    sentiment, sentiment_interval = metrics.mean_interval(metrics.sentiment(texts))
    words, words_interval = metrics.mean_interval([float(len(text.split())) for text in texts])
    perplexity, perplexity_interval = metrics.perplexity_interval(
        out.term_logprobs[:, :, 0].double().sum(dim=1).tolist(), out.lengths.tolist()
    )
    kl, kl_interval = metrics.mean_interval((out.kl_to_base.sum(dim=1) / out.lengths).tolist())
    return Position(
        weight=weight,
        sentiment=sentiment,
        sentiment_interval=sentiment_interval,
        words=words,
        words_interval=words_interval,
        perplexity=perplexity,
        perplexity_interval=perplexity_interval,
        kl=kl,
        kl_interval=kl_interval,
        distinct_2=metrics.distinct_n(texts, 2),
        tokens=out.stats.tokens,
        seconds=out.stats.seconds,
        texts=tuple(texts),
    )


def positions(
    model: Any, tokenizer: Any, settings: Settings, on_step: Callable[[], object]
) -> Iterator[Position]:
    """The positions of `settings`, one after the other, the base first.

    Args:
        on_step: called after each step of the decoding, of which a position has at most
            `settings.max_new_tokens`.
    """
    base, cheerful, gloomy = terms(model, tokenizer)
    for weight in settings.positions:
        yield measure(fade(base, cheerful, gloomy, weight), weight, settings, on_step)
