"""The log-prob bench: every contender has the same gradients, and its products are what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import logp

SIZES = logp.Sizes(tokens=20, hidden=8, vocab=60)


@pytest.mark.parametrize("kind", logp.KINDS)
@pytest.mark.parametrize("name", logp.losses())
def test_contenders_agree(kind: str, name: str) -> None:
    logp.check(kind, SIZES, name)


@pytest.mark.parametrize("kind", logp.KINDS)
def test_bare_products(kind: str) -> None:
    """Of raw logits in place of gradients: z W, and of a trained head z^T h."""
    case = logp.case_of(kind, SIZES)
    hidden, weight = case.hidden.detach(), case.weight.detach()
    of_hidden, of_weight = logp.products(case)
    z = hidden @ weight.T
    torch.testing.assert_close(of_hidden, z @ weight)
    if kind == "trained":
        torch.testing.assert_close(of_weight, z.T @ hidden)
    else:
        assert of_weight is None
