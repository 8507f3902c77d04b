"""KTO and supervised fine-tuning against their formulas."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from crossfade import losses
from pair_cases import EXTREMES, assert_near, make, sigma
from torch import Tensor


def kto_case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    pairs = make(dtype=dtype)
    assert pairs.ref_chosen is not None
    return pairs.chosen, pairs.ref_chosen, torch.arange(64) % 3 == 0


def test_kto() -> None:
    log_probs, refs, labels = kto_case()
    s, good = (log_probs - refs).numpy(), labels.numpy()
    for z0 in (0.0, 2.5, torch.tensor(2.5, dtype=torch.float64)):
        z = float(z0)
        want = np.where(good, 1.3 * (1 - sigma(0.3 * (s - z))), 0.7 * (1 - sigma(0.3 * (z - s))))
        assert_near(losses.kto(log_probs, refs, labels, z0, 0.3, 1.3, 0.7), want)
        narrow = [x.float() for x in (log_probs, refs)]
        got = losses.kto(*narrow, labels, z, 0.3, 1.3, 0.7)
        assert got.dtype is torch.float32
        assert_near(got, want, rtol=1e-5, atol=1e-6)


def test_kto_balance() -> None:
    """At z0 each label costs half its weight, with equal gradients; the two always sum to 1."""
    s = torch.tensor([3.0, 3.0], requires_grad=True)
    zero, labels = torch.zeros(2), torch.tensor([True, False])
    loss = losses.kto(s, zero, labels, 3.0, 0.1, 2.0, 1.0)
    assert loss.tolist() == [1.0, 0.5]
    loss.sum().backward()
    assert s.grad is not None
    assert_near(s.grad, np.array([-0.05, 0.025]), rtol=1e-6)
    log_probs, refs, labels = kto_case()
    both = losses.kto(log_probs, refs, labels, 1.0) + losses.kto(log_probs, refs, ~labels, 1.0)
    assert_near(both, 1.0)


def test_kto_gradients() -> None:
    log_probs, refs, labels = kto_case()
    z0 = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    refs.requires_grad_()

    def loss(log_probs: Tensor) -> Tensor:
        return losses.kto(log_probs, refs, labels, z0, 0.2, 1.3, 0.7)

    assert torch.autograd.gradcheck(loss, (log_probs.requires_grad_(),))
    loss(log_probs).sum().backward()
    assert refs.grad is None
    assert z0.grad is None


def test_kto_extremes() -> None:
    s = (torch.tensor(EXTREMES) / 0.1).repeat(2).requires_grad_()
    labels = torch.arange(len(s)) < len(EXTREMES)
    got = losses.kto(s, torch.zeros_like(s), labels, 0.0)
    x = 0.1 * s.detach().double().numpy()
    assert_near(got, np.where(labels.numpy(), sigma(-x), sigma(x)), rtol=1e-5, atol=1e-30)
    (grad,) = torch.autograd.grad(got.sum(), s)
    size = 0.1 * sigma(x) * sigma(-x)
    assert_near(grad, np.where(labels.numpy(), -size, size), rtol=1e-4, atol=1e-8)


def test_kto_z0() -> None:
    log_probs, refs, _ = kto_case()
    log_probs.requires_grad_()
    up = losses.kto_z0(log_probs, refs - 20)
    assert_near(up, float((log_probs.detach() - refs + 20).mean()))
    assert up.shape == ()
    assert not up.requires_grad
    assert losses.kto_z0(log_probs, refs + 20).item() == 0.0
    assert losses.kto_z0(log_probs.bfloat16(), refs.bfloat16() - 20).dtype is torch.float32


def test_sft_is_cross_entropy() -> None:
    """Log-probs are summed over the tokens of each response; padding is left out."""
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    lengths = torch.tensor([5, 1, 3])
    live = torch.arange(5) < lengths[:, None]
    token = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    got = losses.sft((token * live).sum(-1))
    want = F.cross_entropy(logits[live], targets[live])
    torch.testing.assert_close(got.sum() / lengths.sum(), want)
    assert losses.sft(torch.tensor([-1.0, -2.0]).bfloat16()).dtype is torch.float32
