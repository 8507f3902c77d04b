"""Biases and penalties of one row, beside rows that have none."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from served import FADED, PROMPT, apart
from transformers import LogitsProcessor

ASKED: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": None, "do_sample": True}
WEIGHTS = {"w": 0.7}


class ByHand(LogitsProcessor):
    """OpenAI's formula, token by token."""

    def __init__(self, presence: float, frequency: float, bias: dict[int, float]) -> None:
        self.presence, self.frequency, self.bias = presence, frequency, bias

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found = scores.clone()
        written = ids[0, len(PROMPT) :].tolist()
        for token in range(scores.shape[1]):
            count = written.count(token)
            found[0, token] += self.bias.get(token, 0.0) - self.frequency * count
            found[0, token] -= self.presence if count else 0.0
        return found


OWN: list[dict[str, Any]] = [
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.6},
    {"presence_penalty": -0.5, "frequency_penalty": 0.9, "logit_bias": {5: 4.0, 9: -100.0}},
    {"logit_bias": {11: 3.5}, "repetition_penalty": 1.4},
    {"logit_bias": {7: float(100)}},
]


@pytest.fixture(scope="module")
def session() -> Any:
    with cf.Session(apart(), weights=WEIGHTS, max_batch=12) as session:
        yield session


def test_as_by_hand_and_others_as_alone(session: cf.Session) -> None:
    plain = [session.submit(PROMPT, blend=FADED, seed=i, **ASKED) for i in range(3)]
    bits = [r.result(30) for r in plain]
    own = [session.submit(PROMPT, blend=FADED, seed=3, **ASKED, **o) for o in OWN]
    beside = [session.submit(PROMPT, blend=FADED, seed=i, **ASKED) for i in range(3)]
    blend = cf.parse(FADED, **session._asking.terms, **WEIGHTS)
    for o, r in zip(OWN, own, strict=True):
        by_hand = ByHand(
            o.get("presence_penalty", 0.0),
            o.get("frequency_penalty", 0.0),
            o.get("logit_bias", {}),
        )
        rest = {n: x for n, x in o.items() if n == "repetition_penalty"}
        want = cf.generate(
            blend, [PROMPT], seed=3, logits_processor=[by_hand], progress=False, **rest, **ASKED
        )
        assert r.result(30).responses == want.responses, o
        torch.testing.assert_close(r.result().logprobs, want.logprobs, atol=1e-4, rtol=1e-4)
    for alone, r in zip(bits, beside, strict=True):
        assert r.result(30).responses == alone.responses
        assert torch.equal(r.result().logprobs, alone.logprobs), "bit by bit"
        assert torch.equal(r.result().sampled_logprobs, alone.sampled_logprobs)


def test_settings_of_a_saved_config(session: cf.Session) -> None:
    """Greedy rows beside rows that sample: what is told of them is what `cf.generate` tells."""
    blend = cf.parse(FADED, **session._asking.terms, **WEIGHTS)
    for own in ({"do_sample": False}, {"temperature": 0.0}, {"temperature": 1.3, "top_k": 4}):
        asked = ASKED | own
        got = session.submit(PROMPT, blend=FADED, seed=1, **asked).result(30)
        want = cf.generate(blend, [PROMPT], seed=1, progress=False, **asked)
        assert got.responses == want.responses
        for name in ("logprobs", "sampled_logprobs"):
            torch.testing.assert_close(
                getattr(got, name), getattr(want, name), atol=1e-4, rtol=1e-4
            )
