"""A warning where a blend writes what none of its terms would."""

from __future__ import annotations

import math
import warnings
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding import strays
from crossfade.decoding.strays import Strays
from tiny_models import lora, make
from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PROMPTS = [[5, 6, 7], [8, 9]]
SAYS = "has left what its terms would write"


def sharp(seed: int) -> PreTrainedModel:
    """A model whose likely tokens are few, so that others are far from it."""
    model = make("llama", seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6)
    return model


def terms() -> list[cf.Model]:
    return [cf.Model(sharp(seed), name=n) for seed, n in enumerate(("base", "tuned", "ref"))]


def adapters() -> list[cf.Model]:
    """Three terms over one model, whose head they share."""
    model = lora(1, lora(0, sharp(0), "tuned"), "ref")
    return [cf.Model(model, adapter=n, name=n or "base") for n in (None, "tuned", "ref")]


def far(blend: Any, **how: Any) -> list[str]:
    """What `generate` warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cf.generate(blend, PROMPTS, **{"max_new_tokens": 16, "min_new_tokens": 16} | how)
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize("made", [terms, adapters])
@pytest.mark.parametrize(
    "how", [{}, {"engine": cf.Engine(simple=True)}, {"do_sample": True, "seed": 1}]
)
def test_it_says_how_far_and_what_to_do(made: Any, how: dict[str, Any]) -> None:
    base, a, b = made()
    (says,) = far(base + 20 * (a - b), **how)
    assert says.startswith(f"base + 20*tuned - 20*ref {SAYS}")
    assert "make its weights smaller" in says
    assert "within(crossfade.Support(min_p=0.1))" in says


@pytest.mark.parametrize("made", [terms, adapters])
def test_what_it_measures(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figure of the tokens that it looks at, as `generate` gives them with each term's."""
    base, a, b = made()
    blend = base + 2 * (a - b)
    how: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    judged: list[float] = []
    monkeypatch.setattr(Strays, "_judge", lambda self, far: judged.append(far))
    monkeypatch.setattr(strays, "NEAR", -math.inf)  # all eight tokens are looked at
    out = cf.generate(blend, PROMPTS, return_term_logprobs=True, **how)
    each = out.logprobs - out.term_logprobs.amax(dim=2)
    judged.clear()
    cf.generate(blend, PROMPTS, **how)  # a shared head is run again here
    first = each[:, : 2 * 4 : 2]  # four steps, every second one, have eight tokens of two rows
    assert judged == pytest.approx([first.clamp(-strays.MOST, strays.MOST).mean().item()], rel=1e-4)


def test_it_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (terms, adapters):
        base, a, b = made()
        blend, how = base + 2 * (a - b), {"max_new_tokens": 16, "do_sample": True, "seed": 3}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = cf.generate(blend, PROMPTS, **how)
            monkeypatch.setattr(strays, "_reaches", lambda blend: False)
            assert torch.equal(first.sequences, cf.generate(blend, PROMPTS, **how).sequences)
        monkeypatch.undo()


def test_it_is_said_once_a_call() -> None:
    base, a, b = terms()
    assert len(far(base + 20 * (a - b), max_batch=1, max_new_tokens=40, min_new_tokens=40)) == 1


@pytest.mark.parametrize("weights", [1.0, 0.5, [0.2, 0.9]])
def test_between_its_terms_a_blend_is_never_far(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it looked at, as in a power mean or within a support, so that it costs nothing."""
    monkeypatch.setattr(Strays, "look", lambda *a: pytest.fail("looked at"))
    base, a, b = terms()
    w = torch.tensor(weights)
    for blend in (
        w * base + (1 - w) * a,
        2 * base,
        cf.power_mean([a, b], [0.5, 0.5], r=-1),
        (base + 20 * (a - b)).within(cf.Support(min_p=0.1)),
    ):
        assert far(blend) == []


def test_weights_of_requests_are_looked_at() -> None:
    base, a, b = terms()
    assert len(far(base + torch.tensor([0.1, 20.0]) * (a - b))) == 1
    assert Strays(0.5 * base + [0.5, 0.6] * a, 61).possible
    assert not Strays(0.5 * base + [0.5, 0.4] * a, 61).possible


def test_values_can_lead_away() -> None:
    base, _, b = terms()
    assert len(far(base + 20 * cf.ValueHead(b.model))) == 1
