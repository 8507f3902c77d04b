"""`Output.pushes`: what each term and value did for each token, against torch on both paths."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from draw_settings import DRAW, Only
from torch import Tensor
from transformers import PreTrainedModel

ENGINES = pytest.mark.parametrize(
    "engine", [None, cf.Engine(simple=True)], ids=["engine", "simple"]
)
PROMPTS = [[5, 9, 12, 30], [7], [8, 8, 14]]


def logits(model: Any, prompt: list[int], written: list[int]) -> Tensor:
    """``[V]`` float64: what the model says of the next token."""
    with torch.no_grad():
        return model(torch.tensor([prompt + written])).logits[0, -1].double()


def pushes(score: Tensor, weights: list[float], each: list[Tensor], token: int) -> Tensor:
    """``w (x - E x)`` of a token, for every x; the expectation is under softmax(score)."""
    p = score.softmax(-1)
    return torch.stack([w * (x[token] - (p * x).sum()) for w, x in zip(weights, each, strict=True)])


def check(out: cf.Output, prompts: list[list[int]], weights: Any, models: Any) -> None:
    """All pushes of a blend of models alone, from the full distributions of these."""
    found = out.pushes
    assert found is not None
    assert found.shape == (*out.logprobs.shape, len(models))
    assert found.dtype == torch.float32
    for i, prompt in enumerate(prompts):
        own = weights[i] if isinstance(weights[0], list) else weights
        for t, token in enumerate(out.responses[i]):
            z = [logits(m, prompt, out.responses[i][:t]) for m in models]
            score = sum(w * x for w, x in zip(own, z, strict=True))
            want = pushes(score, own, [x - z[0] for x in z], token)
            torch.testing.assert_close(found[i, t].double(), want, atol=1e-4, rtol=1e-4)


@ENGINES
def test_pushes_are_those_of_full_distributions(
    engine: cf.Engine | None, trio: list[PreTrainedModel]
) -> None:
    base, tuned, ref = map(cf.Model, trio)
    blend = base + 0.5 * (tuned - ref)
    draw = {**DRAW, "top_k": 8, "temperature": 1.3}
    out = cf.generate(blend, PROMPTS, seed=1, return_pushes=True, engine=engine, **draw)
    check(out, PROMPTS, [1.0, 0.5, -0.5], trio)
    assert out.pushes is not None
    assert out.pushes.abs().max() > 0.01
    plain = cf.generate(blend, PROMPTS, seed=1, engine=engine, **draw)
    assert plain.responses == out.responses
    assert plain.pushes is None


@ENGINES
def test_weights_of_one_in_all_share_out_the_departure(
    engine: cf.Engine | None, trio: list[PreTrainedModel]
) -> None:
    """sum = log(pi / p_0)(y) - E log(pi / p_0), where the expectation is the divergence to p_0."""
    base, tuned, ref = map(cf.Model, trio)
    out = cf.generate(
        base + 0.8 * (tuned - ref),
        PROMPTS,
        seed=2,
        return_pushes=True,
        return_term_logprobs=True,
        return_kl_to_base=True,
        engine=engine,
        **DRAW,
    )
    want = out.logprobs - out.term_logprobs[..., 0] - out.kl_to_base
    torch.testing.assert_close(out.pushes.sum(dim=-1), want, atol=1e-4, rtol=1e-4)


@ENGINES
def test_weights_of_each_request(engine: cf.Engine | None, trio: list[PreTrainedModel]) -> None:
    """Of which some are 0, in a batch whose rows come and go."""
    base, tuned = cf.Model(trio[0]), cf.Model(trio[1])
    w = torch.tensor([0.9, 0.0, -0.4])
    out = cf.generate(
        (1 - w) * base + w * tuned,
        PROMPTS,
        seed=3,
        return_pushes=True,
        max_batch=2,
        progress=False,
        engine=engine,
        **{**DRAW, "max_new_tokens": [4, 9, 6]},
    )
    check(out, PROMPTS, [[1 - x, x] for x in w.tolist()], trio[:2])
    past = torch.arange(9) >= out.lengths[:, None]
    assert not out.pushes[past].any()
    assert not out.pushes[1].any()


@ENGINES
def test_values_follow_terms(engine: cf.Engine | None, trio: list[PreTrainedModel]) -> None:
    """They are no distributions, and are not measured from the first term."""
    base, tuned = cf.Model(trio[0]), cf.Model(trio[1])
    blend = base + 0.5 * (tuned - base) + 0.3 * cf.ValueHead(trio[2])
    out = cf.generate(blend, PROMPTS, seed=4, return_pushes=True, engine=engine, **DRAW)
    assert out.pushes is not None
    for i, prompt in enumerate(PROMPTS):
        for t, token in enumerate(out.responses[i]):
            z0, z1, q = (logits(m, prompt, out.responses[i][:t]) for m in trio)
            score = 0.5 * z0 + 0.5 * z1 + 0.3 * q
            want = pushes(score, [0.5, 0.5, 0.3], [0 * z0, z1 - z0, q], token)
            torch.testing.assert_close(out.pushes[i, t].double(), want, atol=1e-4, rtol=1e-4)


@ENGINES
def test_a_processor_changes_the_token_and_not_the_blend(
    engine: cf.Engine | None, trio: list[PreTrainedModel]
) -> None:
    base, tuned, ref = map(cf.Model, trio)
    only = Only(20, 21, 22)
    out = cf.generate(
        base + 0.5 * (tuned - ref),
        PROMPTS,
        logits_processor=[only],
        seed=2,
        return_pushes=True,
        engine=engine,
        **DRAW,
    )
    assert {token for written in out.responses for token in written} <= {20, 21, 22}
    check(out, PROMPTS, [1.0, 0.5, -0.5], trio)


@ENGINES
def test_a_search_keeps_those_of_the_rows_that_stay(
    engine: cf.Engine | None, trio: list[PreTrainedModel]
) -> None:
    base, tuned, ref = map(cf.Model, trio)
    search = cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref))
    out = cf.generate(
        base + 0.5 * tuned,
        PROMPTS,
        search=search,
        seed=5,
        return_pushes=True,
        engine=engine,
        **DRAW,
    )
    check(out, PROMPTS, [1.0, 0.5], trio[:2])


def test_models_that_share_a_head_keep_theirs_apart(base: PreTrainedModel) -> None:
    """Hidden states are not blended, as the push of each term needs its logits."""
    prompted = cf.Model(base, prompt=[9, 8])
    out = cf.generate(cf.Model(base) + 0.5 * prompted, PROMPTS, seed=6, return_pushes=True, **DRAW)
    assert out.pushes is not None
    for i, prompt in enumerate(PROMPTS):
        for t, token in enumerate(out.responses[i]):
            z = [logits(base, p, out.responses[i][:t]) for p in (prompt, [9, 8])]
            want = pushes(z[0] + 0.5 * z[1], [1.0, 0.5], [0 * z[0], z[1] - z[0]], token)
            torch.testing.assert_close(out.pushes[i, t].double(), want, atol=1e-4, rtol=1e-4)


def test_a_guide_is_asked_at_every_step(trio: list[PreTrainedModel]) -> None:
    """Under a support guides may rest. Removed tokens have no part in the mean."""
    base, guide = cf.Model(trio[0]), cf.Model(trio[1])
    blend = (base + 0.7 * guide).within(cf.Support(top_k=4))
    out = cf.generate(blend, PROMPTS, seed=7, return_pushes=True, **DRAW)
    assert out.pushes is not None
    for i, prompt in enumerate(PROMPTS):
        for t, token in enumerate(out.responses[i]):
            z = [logits(m, prompt, out.responses[i][:t]) for m in trio[:2]]
            out_of_reach = z[0] < z[0].topk(4).values[-1]
            score = (z[0] + 0.7 * z[1]).masked_fill(out_of_reach, -torch.inf)
            want = pushes(score, [1.0, 0.7], [0 * z[0], z[1] - z[0]], token)
            torch.testing.assert_close(out.pushes[i, t].double(), want, atol=1e-4, rtol=1e-4)


def test_what_has_no_pushes(trio: list[PreTrainedModel]) -> None:
    a, b = map(cf.Model, trio[:2])
    with pytest.raises(NotImplementedError, match=r"return_pushes is True and power is 1"):
        cf.generate(cf.power_mean([a, b], [0.5, 0.5], 1.0), PROMPTS, return_pushes=True)
    for part in ((b - a).clamp(-1, 1), 0.5 * cf.union(a, b)):
        with pytest.raises(NotImplementedError, match="return_pushes is True and parts has 1"):
            cf.generate(a + part, PROMPTS, return_pushes=True)
