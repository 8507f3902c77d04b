"""The bench of coupling: its closed forms are what the formulas say, and what draws come to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import coupling


def by_the_formula(p: Tensor, q: Tensor) -> float:
    """sum_v 1 / sum_u max(p_u / p_v, q_u / q_v), term by term."""
    total = 0.0
    for p_v, q_v in zip(p, q, strict=True):
        if p_v > 0 and q_v > 0:
            total += 1 / float(torch.maximum(p / p_v, q / q_v).sum())
    return total


def pair(vocab: int, removed: int) -> tuple[Tensor, Tensor]:
    """Distributions of which each, and at some tokens both, are 0 at some tokens."""
    generator = torch.Generator().manual_seed(vocab)
    p, q = torch.randn(2, vocab, generator=generator, dtype=torch.float64).mul(2).exp()
    p[:removed], q[removed // 2 : 2 * removed] = 0, 0
    return p / p.sum(), q / q.sum()


@pytest.mark.parametrize("removed", [0, 5])
def test_one_level(removed: int) -> None:
    p, q = pair(40, removed)
    assert float(coupling.one_level(p, q)) == pytest.approx(by_the_formula(p, q), rel=1e-9)
    assert float(coupling.one_level(p, p)) == pytest.approx(1)
    assert float(coupling.one_level(p[None], q[None])) == float(coupling.one_level(p, q))


@pytest.mark.parametrize("removed", [0, 5])
def test_two_levels(removed: int) -> None:
    """Groups of 8, one of them cut short. Groups of one token, or one group, are one level."""
    p, q = pair(43, removed)
    total = 0.0
    mass_p, mass_q = (torch.stack([x.sum() for x in y.split(8)]) for y in (p, q))
    for j, (x, y) in enumerate(zip(p.split(8), q.split(8), strict=True)):
        if mass_p[j] > 0 and mass_q[j] > 0:
            group = 1 / float(torch.maximum(mass_p / mass_p[j], mass_q / mass_q[j]).sum())
            total += group * by_the_formula(x / mass_p[j], y / mass_q[j])
    assert float(coupling.two_levels(p, q, 8)) == pytest.approx(total, rel=1e-9)
    one = float(coupling.one_level(p, q))
    assert total != pytest.approx(one, rel=1e-3)
    assert float(coupling.two_levels(p, q, 1)) == pytest.approx(one)
    assert float(coupling.two_levels(p, q, 64)) == pytest.approx(one)


def test_draws_come_to_the_closed_forms() -> None:
    """Of a blend of two terms under temperature and top-p, over three groups."""
    generator = torch.Generator().manual_seed(0)
    a, b = (2 * torch.randn(6, 700, generator=generator) for _ in range(2))
    settings = {"temperature": 1.5, "top_p": 0.97}
    part = coupling.measure([a, b], [0.8, 0.2], a, settings, 10, 80, 40, "reference")
    found = coupling.gathered([part], 80, 40)
    assert found["positions"] == 6
    assert not coupling.far_off(found)
    assert found["bound"] < found["one level"] < found["optimum"]
    assert abs(found["groups of 256"] - found["one level"]) > 1e-3
    assert found["groups of 1024"] == found["one level"], "one group"
    other = {**part, "drawn": part["drawn"] - 0.3}
    assert coupling.far_off(coupling.gathered([other], 80, 40))


def test_the_table_has_a_line_for_each_pair() -> None:
    row = {"target": "t", "draft": "d", "drawn, interval": 0.01} | dict.fromkeys(
        ["optimum", "drawn", "one level", "bound", "argmax"], 0.5
    )
    row |= {f"groups of {size}": 0.25 for size in coupling.SIZES}
    report = {"rows": [row], "machine": {"device": "a CPU", "threads": 2}, "command": "c"}
    report |= {"group": 256, "noise": coupling.noise_of_rows()}
    lines = coupling.render(report).splitlines()
    assert "| t | d | 0.500 | 0.500 ± 0.010 | 0.250 | 0.500 | 0.500 | 0.500 |" in lines
    assert "| t; d | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | 0.500 |" in lines
    assert "| calls of Philox, 49,152 tokens | 208 | 128 | 112 | 152 | 268 | 12,288 |" in lines
    assert lines[-1] == "a CPU, 2 threads; `c`."


def test_a_pair_is_named_by_its_weights() -> None:
    pair = coupling.Pair({"neutral": 1.0, "happy": 0.8, "bitter": -0.8}, "happy", {"top_p": 0.9})
    assert pair.name == "neutral +0.8 happy -0.8 bitter, top_p 0.9"
