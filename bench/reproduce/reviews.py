"""The task of the reproductions: opinions of movies in one sentence, and two rewards that compete.

Subjects and circumstances of the held-out prompts are in none of the training prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from crossfade import metrics

QUESTION = "In one sentence: what did you think of the movie, {}?"
TRAINED = (
    (
        "a western",
        "a courtroom drama",
        "a musical",
        "a superhero sequel",
        "a film about a lost dog",
        "a romantic comedy set in Paris",
        "a documentary about bees",
        "a new space adventure",
        "a mystery on a train",
        "a cartoon about two cats",
        "a war film",
        "a story of two sisters",
        "a film about a chess player",
        "a pirate film",
        "a film about a small town",
        "a ghost story",
    ),
    (
        "you saw last night",
        "that won the prize",
        "with the famous cast",
        "your neighbour made",
        "from the eighties",
        "with the long ending",
        "that everybody talks about",
        "you saw on a plane",
        "with the loud music",
        "that had a sequel",
        "your sister chose",
        "at the old cinema",
        "that was filmed in one room",
        "with no dialogue",
        "about a true story",
    ),
)
HELD_OUT = (
    (
        "a heist film",
        "a film about a lighthouse",
        "a silent comedy",
        "a spy thriller",
        "a wedding comedy",
        "a film about mountain climbers",
        "a fairy tale",
        "a boxing drama",
        "a road movie",
        "a puppet film",
        "a film about a jazz band",
        "a film about a school play",
        "a robot story",
        "a royal drama",
    ),
    (
        "your friend recommended",
        "on television yesterday",
        "from the festival",
        "in black and white",
        "with the strange title",
        "that was remade twice",
        "by the young director",
        "you watched in the rain",
        "with the happy ending",
        "that lasted three hours",
        "at the open-air cinema",
        "from the sixties",
        "with the big budget",
        "that made the news",
        "your grandmother likes",
    ),
)


def prompts(split: tuple[Sequence[str], Sequence[str]]) -> list[list[dict[str, str]]]:
    """Chats in an order that mixes subjects, so that any beginning of the list has most of them."""
    subjects, circumstances = split
    both = [
        (s, c)
        for shift in range(len(circumstances))
        for i, s in enumerate(subjects)
        for c in [circumstances[(i + shift) % len(circumstances)]]
    ]
    return [[{"role": "user", "content": QUESTION.format(f"{s} {c}")}] for s, c in both]


def sentiment(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """VADER's compound score, which says how positive a text is, within [-1, 1]."""
    return metrics.sentiment(responses)


def brevity(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """One less a twentieth for each word: 0 at 20 words. Praise takes words, so the two compete."""
    return [1 - len(text.split()) / 20 for text in responses]


REWARDS: dict[str, Callable[[Sequence[Any], Sequence[str]], list[float]]] = {
    "sentiment": sentiment,
    "brevity": brevity,
}
