"""What the demo prints and draws: its plan, texts side by side, figures in plain words, a plot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..extras import require
from .fader import FORMULA, MOODS, PROMPTS, Position, Settings

LIMIT = 2.0  # times the perplexity of the base's own texts: a line of the plot
PROSE = 80  # characters of a line
SLOWER = 2.0  # times the base's seconds: what a position of three terms takes
SHOWN = 3  # prompts, or answers to a single one, that are printed side by side
TABLE = f"{'':<21}{'mood':>9}{'words':>16}{'surprise':>16}{'variety':>18}"
MEANINGS = {
    "mood": "How positive the words are, from -1 to 1, by VADER, a list of words with rules.",
    "words": "How many words a text has.",
    "surprise": "How hard each next word, or part of one, is to guess for the base: as hard as a "
    "choice among so many equally likely ones (perplexity). Broken English surprises it far more "
    "than its own texts.",
    "variety": "How many of the pairs of neighbouring words, in all texts of a position, are "
    "different pairs: 1 is all of them, and near 0 the texts repeat themselves.",
}


def plan(settings: Settings) -> str:
    """What the demo is about to do."""
    texts = len(settings.prompts) * settings.samples
    meanings = {"base": "the model as it is"}
    meanings |= {name: f'the model when it is told "{said}"' for name, said in MOODS.items()}
    return "\n".join(
        [
            "A fader w between two moods of one small model, SmolLM2 (135 million weights):",
            f"\n    {FORMULA}\n",
            *(_item(name, meaning) for name, meaning in meanings.items()),
            "",
            _folded(
                "Before each word, all three say how likely they find every word that might come "
                "next, and the formula combines what they say. Above 0, w favours what the "
                "cheerful one finds likelier than the gloomy one does; below 0, the reverse."
            ),
            "",
            f"{_count(texts, 'text')} at each of {_count(len(settings.positions), 'position')} of "
            "w. Ctrl-C stops, and shows what is finished.\n",
        ]
    )


def first_answer(base: Position, settings: Settings) -> str:
    """The first prompt, what the base answers to it, and how long the other positions take."""
    lines = [_item("prompt", settings.prompts[0]), _item("base", _shown(base.texts[0])), ""]
    if others := len(settings.positions) - 1:
        seconds = max(1, round(others * base.seconds * SLOWER))
        said = "The other position takes" if others == 1 else f"The other {others} positions take"
        long = _count(seconds, "second") if seconds < 100 else _count(round(seconds / 60), "minute")
        lines.append(f"{said} about {long}.\n")
    return "\n".join(lines)


def results(found: Sequence[Position], settings: Settings, width: int = 110) -> str:
    """All that is known once the texts are written; `found` is in the order of the weights."""
    lines = [side_by_side(found, settings, width), table(found), ""]
    lines += [_item(name, meaning) for name, meaning in MEANINGS.items()]
    texts = len(found[0].texts)
    if texts > 1:
        chance = (
            f"With other random draws, a figure moves about so much ({texts} texts a position)."
        )
        lines.append(_item("±", f"{chance} It is half of a 95 % interval."))
    if settings.prompts != PROMPTS:
        lines += ["", _folded(_caveat(len(settings.prompts), texts))]
    else:
        lines += ["", 'For a prompt of your own: crossfade demo --prompt "..."']
    return "\n".join(lines)


def side_by_side(found: Sequence[Position], settings: Settings, width: int = 110) -> str:
    """A text to each of the first prompts, or several to a single one, a column a position."""
    gap = 3
    longest = max(len(name(p.weight)) for p in found)
    column = max(longest, (width - gap * (len(found) - 1)) // len(found))

    def row(cells: Sequence[str]) -> str:
        return (" " * gap).join(cell.ljust(column) for cell in cells).rstrip()

    shown = [(prompt, i * settings.samples) for i, prompt in enumerate(settings.prompts[:SHOWN])]
    if len(settings.prompts) == 1:
        answers = range(1, min(SHOWN, settings.samples))
        shown += [("the same, drawn anew", answer) for answer in answers]
    lines = [row([name(p.weight) for p in found])]
    for prompt, text in shown:
        lines.append(f"-- {textwrap.shorten(prompt, width - 3, placeholder='…')}")
        cells = [textwrap.wrap(_shown(p.texts[text]), column) for p in found]
        lines += [
            row([cell[i] if i < len(cell) else "" for cell in cells])
            for i in range(max(map(len, cells)))
        ]
        lines.append("")
    return "\n".join(lines)


def table(found: Sequence[Position]) -> str:
    """The figures of the positions, each on a line."""
    lines = [TABLE]
    lines += [
        f"{name(p.weight):<21}"
        + _figure(p.sentiment, p.sentiment_interval, "+.2f")
        + _figure(p.words, p.words_interval, ".1f")
        + _figure(p.perplexity, p.perplexity_interval, ".1f")
        + _figure(p.distinct_2, math.nan, ".2f").rstrip().rjust(11)
        for p in found
    ]
    return "\n".join(lines)


def report(found: Sequence[Position], settings: Settings) -> dict[str, Any]:
    """All figures and texts, for JSON. What could not be found, which is NaN, is None."""
    found_or_none = [
        {key: None if value != value else value for key, value in asdict(p).items()} for p in found
    ]
    return {
        "formula": FORMULA,
        "moods": MOODS,
        "settings": asdict(settings),
        "positions": found_or_none,
    }


def name(weight: float) -> str:
    """What a position is called."""
    mood = "base" if weight == 0 else "cheerful" if weight > 0 else "gloomy"
    return f"w = {weight:g} ({mood})"


def plot(found: Sequence[Position], settings: Settings, path: Path) -> None:
    """Save a PNG of the mood and the surprise of the texts at each position. Needs "plot".

    Lines at the base's own figures, and at the perplexity that would be twice its own, run across.
    """
    require("matplotlib", "plot").use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, (mood, surprise) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 7), layout="constrained"
    )
    base = next(p for p in found if p.weight == 0)
    weights = [p.weight for p in found]
    across = max(weights) - min(weights) or 1.0
    mood.set_xlim(min(weights) - 0.06 * across, max(weights) + 0.36 * across)
    for axes, figures, color in (
        (mood, [(p.sentiment, p.sentiment_interval) for p in found], "C0"),
        (surprise, [(p.perplexity, p.perplexity_interval) for p in found], "C3"),
    ):
        values, intervals = zip(*figures, strict=True)
        axes.errorbar(weights, values, intervals, color=color, marker="o", capsize=4, linewidth=2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes, height, text in (
        (mood, base.sentiment, "base's own"),
        (surprise, base.perplexity, "base's own"),
        (surprise, LIMIT * base.perplexity, "twice the base's"),
    ):
        axes.axhline(height, color="0.35", linestyle="--", linewidth=1)
        beside = axes.get_yaxis_transform()  # x is a part of the axes' width, y a figure
        axes.text(1, height, text, transform=beside, ha="right", va="bottom", color="0.35")
    mood.set_ylim(-1, 1)
    mood.set_ylabel("mood of the words\n(-1 bitter, 1 enthusiastic)")
    surprise.set_ylim(0, 1.15 * max(LIMIT * base.perplexity, *(p.perplexity for p in found)))
    surprise.set_ylabel("surprise to the base\n(perplexity)")
    surprise.set_xticks(weights, [name(w).replace(" (", "\n(") for w in weights])
    surprise.set_xlabel(f"bars: 95 % intervals over {len(found[0].texts)} texts a position")
    about = "" if settings.prompts == PROMPTS else f"\n{_prompts(settings)}"
    figure.suptitle(f"SmolLM2-135M-Instruct:  {FORMULA}{about}")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _prompts(settings: Settings) -> str:
    """The prompts on a line, cut where it would not fit."""
    return textwrap.shorten(" | ".join(settings.prompts), 70, placeholder=" …")


def _caveat(prompts: int, texts: int) -> str:
    whose = "one prompt" if prompts == 1 else f"{prompts} prompts"
    return (
        f"These are {_count(texts, 'text')} to {whose}: what differs by less than its ± is "
        "chance, and other prompts may fade otherwise. The mood is found by counting English "
        "words; it says little of texts that voice no opinion, and nothing of whether an answer is "
        "true, useful or keeps to its prompt. Read the texts for that."
    )


def _figure(value: float, half: float, form: str) -> str:
    """A figure with half of its interval, 16 characters wide; what is NaN could not be found."""
    found = "-" if math.isnan(value) else f"{value:{form}}"
    return found.rjust(9) + ("" if math.isnan(half) else f" ± {half:{form.lstrip('+')}}").ljust(7)


def _shown(text: str) -> str:
    return text or "(empty)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _item(name: str, meaning: str) -> str:
    """A name and, beside it, what is said of it, over several lines if need be."""
    return _folded(meaning, f"{name:<10}", " " * 10)


def _folded(text: str, first: str = "", others: str = "") -> str:
    return textwrap.fill(text, PROSE, initial_indent=first, subsequent_indent=others)
