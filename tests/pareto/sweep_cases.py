"""The prompts and rewards of the sweeps."""

from __future__ import annotations

from typing import Any

PROMPTS = ["the film was", "the plot", "a very dull cast"]


def short(prompts: list[Any], responses: list[str]) -> list[float]:
    return [-float(len(text.split())) for text in responses]


def ones(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(text.count("w1")) for text in responses]


REWARDS: dict[str, Any] = {"short": short, "ones": ones}
