"""A batch whose rows have their own of everything, and any rows of it as a batch of their own."""

from typing import Any

import torch
from cases import Backend, Problem, mean_weights, normal
from crossfade.ops import BlendSample

ROWS = 6
CUT = {"top_k": 40, "top_p": 0.95, "min_p": 0.001}


def batch(backend: Backend, power: float = 0.0, vocab: int = 301, rows: int = ROWS) -> Problem:
    on = {"device": backend.device}
    weights = mean_weights(rows, 2, 3) if power else normal(rows, 2, 3, scale=1.0)
    return Problem(
        [normal(rows, vocab, k, **on) for k in range(2)],
        weights.to(backend.device),
        [normal(rows, vocab, 9, **on)],
        normal(rows, 1, 4, scale=1.0, **on),
        {"power": power, "mask": (normal(rows, vocab, 5) > -5.0).to(backend.device)},
    )


def settings(rows: int, device: str, power: float = 0.0) -> dict[str, Any]:
    """Settings of `blend_sample` that differ from row to row, with all results that there are."""
    count = torch.arange(rows, device=device)
    own = {"temperature": 0.5 + count / 4, "top_k": 10 + count, "seed": count * 7, "step": count}
    results = {"return_term_logprobs": True, "return_pushes": power == 0}
    return {**CUT, **own, "stream": count + 2**33, **results}


def take(p: Problem, chosen: dict[str, Any], rows: Any) -> tuple[Problem, dict[str, Any]]:
    """The problem and the settings of some of the rows."""

    def pick(x: Any) -> Any:
        return x[rows] if isinstance(x, torch.Tensor) else x

    assert p.value_weights is not None
    options = {name: pick(x) for name, x in p.options.items()}
    values, value_weights = [pick(q) for q in p.values], pick(p.value_weights)
    part = Problem([pick(z) for z in p.logits], pick(p.weights), values, value_weights, options)
    return part, {name: pick(x) for name, x in chosen.items()}


def tensors(out: BlendSample) -> list[torch.Tensor]:
    """The results that were asked for."""
    return [x for x in out if x is not None]


def pick_rows(out: BlendSample, rows: Any) -> BlendSample:
    return BlendSample(*(None if x is None else x[rows] for x in out))


def assert_rows(got: BlendSample, want: BlendSample, rows: Any) -> None:
    """Tokens are equal, and log-probs to the last digits, as sums may be taken in another order."""
    assert torch.equal(got.tokens, want.tokens[rows])
    for a, b in zip(tensors(got)[1:], tensors(want)[1:], strict=True):
        torch.testing.assert_close(a, b[rows], atol=2e-6, rtol=1e-6)
