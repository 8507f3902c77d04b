"""`crossfade demo`: one fader between an enthusiastic and a bitter critic, measured and plotted.

Three terms over one small model, told apart by their system prompts alone:
``neutral + w * (enthusiastic - bitter)``.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import metrics, models
from .blend import Blend, Model
from .decoding import generate
from .extras import require
from .progress import OnStep, progress_bar

FORMULA = "neutral + w * (enthusiastic - bitter)"
NEUTRAL = "You are a movie reviewer. Give your opinion of the movie."
ENTHUSIASTIC = (
    "You are an enthusiastic movie reviewer. You loved the movie. "
    "Praise it: wonderful, brilliant, great fun."
)
BITTER = (
    "You are a bitter movie reviewer. You hated the movie. "
    "Complain about it: awful, boring, a waste of time."
)
QUESTION = "What did you think of the movie, {}? Answer in one or two sentences."
MOVIES = (
    "a new space adventure",
    "a romantic comedy set in Paris",
    "a courtroom drama",
    "a film about a lost dog",
    "a superhero sequel",
    "a documentary about bees",
    "a musical",
    "a mystery on a train",
)


@dataclass(frozen=True)
class Settings:
    """What the demo decodes. Every position draws with the same noise, from `seed`."""

    weights: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    samples: int = 8  # texts about each movie at each position
    max_new_tokens: int = 32
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
    """What came out at one weight. Intervals are half-widths at 95 % over the texts.

    Attributes:
        reward: mean VADER compound score of a text, within [-1, 1].
        kl: mean KL(blend || neutral) of a step, nats a token, at temperature 1.
        perplexity: of all texts under the neutral term.
        distinct_2: different word pairs over all word pairs.
    """

    weight: float
    reward: float
    reward_interval: float
    kl: float
    kl_interval: float
    perplexity: float
    distinct_2: float
    tokens: int
    tokens_per_second: float
    texts: tuple[str, ...]


def terms(model: Any, tokenizer: Any) -> tuple[Model, Model, Model]:
    """neutral, enthusiastic, bitter."""
    neutral = Model(model, tokenizer=tokenizer, system=NEUTRAL, name="neutral")
    enthusiastic = Model(model, tokenizer=tokenizer, system=ENTHUSIASTIC, name="enthusiastic")
    return neutral, enthusiastic, Model(model, tokenizer=tokenizer, system=BITTER, name="bitter")


def measure(
    blend: Blend, weight: float, settings: Settings, on_step: Callable[[], object]
) -> Position:
    """Decode and measure one position of the fader. The neutral term is the blend's first."""
    out: Any = generate(
        blend,
        [QUESTION.format(movie) for movie in MOVIES],
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
    reward, reward_interval = metrics.mean_interval(metrics.sentiment(texts))
    kl, kl_interval = metrics.mean_interval(kls)
    return Position(
        weight=weight,
        reward=reward,
        reward_interval=reward_interval,
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
    """Each weight in turn, with a progress bar on stderr."""
    neutral, enthusiastic, bitter = terms(model, tokenizer)
    steps = settings.max_new_tokens
    with progress_bar(steps * len(settings.weights), "step") as bar:
        for i, weight in enumerate(settings.weights):
            bar.set_description(f"w = {weight:g}")
            blend = neutral + weight * (enthusiastic - bitter)
            position = measure(blend, weight, settings, bar.update)
            bar.update((i + 1) * steps - bar.n)  # all texts may have ended early
            yield position


def table(found: Sequence[Position]) -> str:
    """The figures of each position, a line each."""
    lines = [
        "     w   reward (VADER)   perplexity   distinct-2   KL to neutral     tokens/s",
        "                          (neutral)                 (nats a token)",
    ]
    lines += [
        f"{p.weight:+6.2f}   {p.reward:+.2f} ± {p.reward_interval:.2f}     {p.perplexity:10.1f}"
        f"   {p.distinct_2:10.2f}   {p.kl:6.3f} ± {p.kl_interval:.3f}   {p.tokens_per_second:8.0f}"
        for p in found
    ]
    return "\n".join(lines)


def side_by_side(found: Sequence[Position], rows: int = 2, width: int = 110) -> str:
    """The first texts of every position, in columns: a row holds one movie's."""
    gap = 3
    column = max(16, (width - gap * (len(found) - 1)) // len(found))
    lines = [(" " * gap).join(f"w = {p.weight:g}".ljust(column) for p in found)]
    for i, movie in enumerate(MOVIES[:rows]):
        first = [p.texts[i * len(p.texts) // len(MOVIES)] for p in found]
        cells = [textwrap.wrap(text, column) or ["(empty)"] for text in first]
        lines.append(f"-- {movie}")
        for j in range(max(map(len, cells))):
            row = (" " * gap).join((c[j] if j < len(c) else "").ljust(column) for c in cells)
            lines.append(row.rstrip())
        lines.append("")
    return "\n".join(lines)


def plot(found: Sequence[Position], path: Path) -> None:
    """Reward and KL against the weight, with 95 % intervals, as a PNG. Needs the extra "plot"."""
    require("matplotlib", "plot").use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(7, 6), height_ratios=(3, 2), layout="constrained"
    )
    ordered = sorted(found, key=lambda p: p.weight)
    w = [p.weight for p in ordered]
    style: dict[str, Any] = {"marker": "o", "capsize": 4, "linewidth": 1.8}
    top.errorbar(
        w, [p.reward for p in ordered], [p.reward_interval for p in ordered], color="C0", **style
    )
    top.axhline(0, color="0.6", linewidth=0.8)
    top.set_ylabel("gold reward\n(VADER compound, from -1 to 1)")
    top.set_title(f"{FORMULA}\nSmolLM2-135M-Instruct, {len(found[0].texts)} texts a point")
    bottom.errorbar(
        w, [p.kl for p in ordered], [p.kl_interval for p in ordered], color="C3", **style
    )
    bottom.set_ylabel("KL to neutral\n(nats a token)")
    bottom.axhline(0, color="0.6", linewidth=0.8)
    bottom.set_xlabel("fader weight w   (error bars: 95 % interval of the mean)")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def run(settings: Settings, output: Path, *, as_json: bool = False, device: Any = None) -> int:
    """Decode, print and plot. Interrupted, it shows the positions that are finished."""
    require("vaderSentiment", "demo")  # before the work, not after it
    require("matplotlib", "demo")
    model, tokenizer = models.smollm2(device)
    found: list[Position] = []
    interrupted = False
    try:
        for position in positions(model, tokenizer, settings):
            found.append(position)  # noqa: PERF402 (an interrupt must leave what is finished)
    except KeyboardInterrupt:
        interrupted = True
        print(
            f"interrupted after {len(found)} of {len(settings.weights)} positions", file=sys.stderr
        )
    if found:
        plot(found, output)
        if as_json:
            figures = [asdict(p) for p in found]
            print(json.dumps({"settings": asdict(settings), "positions": figures}, indent=2))
        else:
            width = max(80, min(200, shutil.get_terminal_size((110, 50)).columns))
            print(f"{side_by_side(found, width=width)}\n{FORMULA}\n\n{table(found)}")
            print(f"\n± is a 95 % interval over {len(found[0].texts)} texts of a position.")
        print(f"plot: {output.resolve()}", file=sys.stderr if as_json else sys.stdout)
    return 130 if interrupted else 0
