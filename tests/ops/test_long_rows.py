"""Rows of many groups: thresholds are searched in a part of a row, which a sample may misjudge."""

from typing import Any

import pytest
import torch
from cases import INF, Backend, Problem, assert_samples_agree, normal
from sweeps import every
from torch import Tensor

VOCAB = 20_011
RAMP = torch.arange(float(VOCAB)) / VOCAB


def spiked(places: slice, height: float) -> Tensor:
    """A flat row with spikes, as where only what is sampled is large, or all else is."""
    row = normal(1, VOCAB, 5, scale=0.5)[0]
    row[places] += height
    return row


def misjudged(lanes: int, height: float) -> Tensor:
    """A row that is flat but for the tokens that a CPU with vectors of so many lanes samples."""
    row = normal(1, VOCAB, 11, scale=0.3)[0]
    vectors = 256 // lanes
    for group in range(0, VOCAB // 256, max(1, 32 // vectors)):
        first = 256 * group + (5 * group + 3) % vectors * lanes
        row[first : first + lanes] += height
    return row


def rows() -> dict[str, Tensor]:
    rank = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).float() + 1
    return {
        "flat": normal(1, VOCAB, 1, scale=0.3)[0],
        "normal": normal(1, VOCAB, 2, scale=3.0)[0],
        "real": -1.6 * rank.log() + normal(1, VOCAB, 3, scale=0.3)[0],
        "ascending": 5 * RAMP,
        "descending": -9 * RAMP,
        "all tie": torch.full((VOCAB,), 1.5),
        "two levels": (torch.arange(VOCAB) % 3 == 0).float(),
        "ties everywhere": normal(1, VOCAB, 4, scale=2.0)[0].round(),
        "levels by groups": (torch.arange(VOCAB) // 256 % 5).float(),
        "half of each group": (torch.arange(VOCAB) % 256 < 128).float() * 3 + 0.1 * RAMP,
        "period of 16": spiked(slice(3, None, 16), 6.0),
        "period of 256": spiked(slice(48, None, 256), 6.0),
        "but for a period": spiked(slice(48, None, 256), -30.0),
        **{
            f"misjudged by {lanes} lanes, {height}": misjudged(lanes, height)
            for lanes in (4, 8, 16)
            for height in (-1.5, 1.5)
        },
        "one of 0.9": torch.where(torch.arange(VOCAB) == 777, 12.1, 0.01 * RAMP),
        "around zero": normal(1, VOCAB, 6, scale=1e-3)[0],
        "denormal": normal(1, VOCAB, 7, scale=1e-40)[0],
        "1e30": normal(1, VOCAB, 8, scale=1e30)[0],
        "few are left": torch.where(torch.arange(VOCAB) % 997 == 5, 3 * RAMP, -INF),
        "a tail of -inf": torch.where(RAMP < 0.3, normal(1, VOCAB, 9, scale=1.0)[0], -INF),
    }


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.0},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_p": 0.8, "min_p": 0.05},
    {"top_p": 0.95, "min_p": 0.9},
    {"min_p": 0.2},
    {"top_k": 30},
    {"top_k": 79},  # more than half of the groups
    {"top_k": 3000, "top_p": 0.7},
    {"top_k": VOCAB - 1, "top_p": 0.99, "min_p": 1e-4, "temperature": 1.3},
]


@pytest.mark.parametrize("cut", every(2, CUTS, keep=CUTS[-3:]), ids=str)
def test_thresholds(kernel: Backend, cut: dict[str, Any]) -> None:
    """Every row draws the reference's tokens, with noise that differs from row to row."""
    named = rows()
    if kernel.interpreted:
        named = {name: named[name] for name in ("normal", "two levels")}
    z = torch.stack(list(named.values())).to(kernel.device)
    steps = torch.arange(len(z), device=kernel.device)
    assert_samples_agree(kernel, Problem([z], [1.0]), seed=4, stream=7, step=steps, **cut)


@pytest.mark.parametrize("cut", every(2, CUTS[::3]), ids=str)
def test_any_number_of_threads(cut: dict[str, Any]) -> None:
    """A team's tokens and log-probs are those of one thread, to the last bit."""
    native = Backend("native", "cpu")
    z = torch.stack(list(rows().values()))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for step, row in enumerate(z):
                call = {"seed": 4, "step": step, **cut}
                results.append(native.blend_sample([row[None]], [1.0], **call))
    finally:
        torch.set_num_threads(before)
    for b in range(len(z)):
        one, *others = results[b :: len(z)]
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(one[:3], other[:3], strict=True))
