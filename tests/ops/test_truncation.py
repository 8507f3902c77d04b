"""Temperature, top-k, top-p and min-p: the tokens that stay and their distribution, as Hugging Face
has them. Draws show what stays: each token of each row is drawn with noise in its favour.
"""

import math
from typing import NamedTuple

import pytest
import torch
from cases import EPS, INF, Backend, normal
from numpy_noise import forcing_streams
from sweeps import every
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB = 32
SEED, STEP = 2**63 + 5, 17


class Cut(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


CUTS = [
    Cut(),
    Cut(temperature=0.5),
    Cut(temperature=1.7),
    Cut(top_k=1),
    Cut(top_k=5),
    Cut(top_k=VOCAB),
    Cut(top_k=10**12),
    Cut(top_p=0.0),
    Cut(top_p=0.1),
    Cut(top_p=0.5),
    Cut(top_p=0.75),
    Cut(top_p=0.999),
    Cut(min_p=0.02),
    Cut(min_p=0.3),
    Cut(min_p=1.0),
    Cut(top_k=6, top_p=0.8),
    Cut(top_p=0.9, min_p=0.2),
    Cut(temperature=0.7, top_k=12, top_p=0.9, min_p=0.01),
    Cut(temperature=2.5, top_k=7, top_p=0.6, min_p=0.1),
]


def rows() -> dict[str, list[float]]:
    """Random rows and those that break samplers, as float32 holds them."""
    half = math.log(2)
    return {
        "normal": normal(1, VOCAB, 1, scale=1.5)[0].tolist(),
        "peaked": normal(1, VOCAB, 2, scale=6.0)[0].tolist(),
        "flat": normal(1, VOCAB, 3, scale=0.01)[0].tolist(),
        "all equal": [2.5] * VOCAB,
        "one-hot": [3.0 if v == 11 else -INF for v in range(VOCAB)],
        "one peak": [20.0 if v == 30 else 0.0 for v in range(VOCAB)],
        "masked with -inf": [-INF if v % 3 else float(v) / 8 for v in range(VOCAB)],
        "ties at the threshold": [float(-(v // 4)) for v in range(VOCAB)],
        "two levels": [float(v % 2) for v in range(VOCAB)],
        "halving": [-half * v for v in range(VOCAB)],  # mass lands on top_p = 0.5 and 0.75
        "1e4": [1e4 - 0.5 * v for v in range(VOCAB)],
        "of 1e4 each way": [1e4 if v == 3 else -1e4 + v for v in range(VOCAB)],
        "denormal": [(v + 1) * 1e-41 for v in range(VOCAB)],
        "both zeros": [0.0 if v % 2 else -0.0 for v in range(VOCAB)],
    }


def truncate(score: Tensor, cut: Cut) -> tuple[Tensor, Tensor]:
    """Hugging Face's processors on float64 scores, but for ties: every token equal to top-p's
    threshold stays. And the tokens so close to a threshold that rounding decides."""
    ids = torch.zeros(len(score), 1, dtype=torch.long)
    score = TemperatureLogitsWarper(cut.temperature)(ids, score)
    if cut.top_k:
        score = TopKLogitsWarper(cut.top_k)(ids, score)
    close = torch.zeros_like(score, dtype=torch.bool)
    if cut.top_p < 1:
        mass = score.softmax(dim=-1)
        higher = score[:, None, :] > score[:, :, None]
        above = (higher * mass[:, None, :]).sum(dim=-1)
        close |= ((above - cut.top_p).abs() < 1e-6) & (above > 0)
        kept = TopPLogitsWarper(cut.top_p)(ids, score)
        score = score.masked_fill(score < kept.masked_fill(kept.isinf(), INF).amin(-1, True), -INF)
    if cut.min_p > 0:
        threshold = score.amax(dim=-1, keepdim=True) + math.log(cut.min_p)
        close |= ((score - threshold).abs() < 1e-6) & (score < score.amax(-1, True))
        score = MinPLogitsWarper(cut.min_p)(ids, score)
    return score, close


def assert_draws(backend: Backend, z: Tensor, blend: Tensor, weights: object, cut: Cut) -> None:
    """Draw from each row with noise in favour of each token. `blend` is z weighted in float64."""
    streams, noise = forcing_streams(VOCAB, SEED, STEP)
    count = blend.shape[0]
    row = torch.arange(count).repeat_interleave(VOCAB)
    token = torch.arange(VOCAB).repeat(count)
    if backend.interpreted:
        some = slice(CUTS.index(cut), None, 73)  # no divisor of 32: other tokens of each row
        row, token = row[some], token[some]
    score, close = truncate(blend, cut)
    out = backend.blend_sample(
        [t[row].to(backend.device) for t in z],
        weights,
        **cut._asdict(),
        seed=SEED,
        stream=torch.tensor(streams, device=backend.device)[token.to(backend.device)],
        step=STEP,
    )
    drawn = out.tokens.cpu()
    assert (drawn >= 0).all()
    noisy = score[row] + torch.from_numpy(noise)[token]
    best = noisy.argmax(dim=-1)
    at = torch.arange(len(row)), drawn
    rounding = 1e-5 + 8 * EPS * z.abs().nan_to_num(0, 0, 0).amax() / cut.temperature
    lost = noisy.amax(dim=-1) - noisy[at]  # inf for a token that should be gone
    wrong = (drawn != best) & ~(lost < rounding) & ~close[row].any(dim=-1)
    assert not wrong.any(), [
        f"row {row[i]}: {drawn[i]} for {best[i]}, {lost[i]:.3g} better" for i in wrong.nonzero()
    ][:5]
    exact = ~close[row].any(dim=-1)
    gone = score[row].isinf()[at] & ~close[row][at]
    assert not gone.any(), "a removed token was drawn"
    error = (out.sampled_logprobs.cpu() - score[row].log_softmax(dim=-1)[at])[exact].abs()
    assert (error <= rounding).all(), f"sampled_logprobs are off by {error.max():.3g}"
    error = (out.logprobs.cpu() - blend[row].log_softmax(dim=-1)[at]).abs()
    assert (error <= rounding).all(), f"logprobs are off by {error.max():.3g}"


@pytest.mark.parametrize("cut", every(2, CUTS, keep=[Cut(top_k=1), Cut(top_p=0.0)]), ids=str)
def test_one_term(backend: Backend, cut: Cut) -> None:
    logits = torch.tensor(list(rows().values()))
    # the largest logits' rounding would hide all else: on their own
    large = logits.abs().nan_to_num(0, 0, 0).amax(dim=-1) > 1e3
    for z in (logits[~large], logits[large]):
        assert_draws(backend, z[None], z.double(), [1.0], cut)


@pytest.mark.parametrize("cut", CUTS[-4:], ids=str)
def test_blend_of_three(backend: Backend, cut: Cut) -> None:
    z = torch.stack([normal(3, VOCAB, 20 + k, scale=1.5) for k in range(3)])
    weights = (1.0, 0.75, -0.75)
    blend = sum(w * t.double().log_softmax(dim=-1) for w, t in zip(weights, z, strict=True))
    assert isinstance(blend, Tensor)
    assert_draws(backend, z, blend, weights, cut)


def test_forcing_reaches_tokens() -> None:
    """The tests above would see a token that should be removed, as its noise leads by nats."""
    _, noise = forcing_streams(VOCAB, SEED, STEP)
    assert (noise.argmax(axis=1) == range(VOCAB)).all()
    ordered = noise.copy()
    ordered.sort(axis=1)
    assert (ordered[:, -1] - ordered[:, -2]).min() > 4


def test_truncation_follows_the_values_and_the_mask(backend: Backend) -> None:
    """The blend is cut with its values and after the mask: top-k counts allowed tokens only."""
    score = normal(1, VOCAB, 5)
    value = normal(1, VOCAB, 6, scale=4.0)
    allowed = torch.arange(VOCAB) % 2 == 0
    blend = (score.double() + 0.5 * value.double()).masked_fill(~allowed, -INF)
    kept = set(blend[0].topk(4).indices.tolist())
    count = 16 if backend.interpreted else 64
    out = backend.blend_sample(
        [score.to(backend.device).expand(count, -1)],
        [1.0],
        [value.to(backend.device).expand(count, -1)],
        [0.5],
        temperature=50.0,
        top_k=4,
        mask=allowed.to(backend.device),
        seed=1,
        step=torch.arange(count, device=backend.device),
    )
    assert set(out.tokens.tolist()) == kept
