"""Unions, intersections and clamps against loops written by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import EOS
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

LogP = list[Tensor]
NEW = 10

BLENDS: dict[str, tuple[str, Callable[[LogP], Tensor]]] = {
    "union": ("union(a, b, c)", lambda p: torch.stack(p).amax(0)),
    "intersection": ("intersection(a, b)", lambda p: torch.minimum(p[0], p[1])),
    "a clamp": (
        "a + (2 * (b - c)).clamp(min=-0.3, max=0.4)",
        lambda p: p[0] + (2 * (p[1] - p[2])).clamp(-0.3, 0.4),
    ),
    "a union among others": (
        "a - 0.9 * union(b, a) + (c - a).clamp(min=0)",
        lambda p: p[0] - 0.9 * torch.maximum(p[0], p[1]) + (p[2] - p[0]).clamp(min=0),
    ),
    "a clamp within a support": (
        "(a + (b - c).clamp(max=0.2)).within(Support(term=0, top_k=9))",
        lambda p: (p[0] + (p[1] - p[2]).clamp(max=0.2)).masked_fill(
            p[0] < p[0].topk(9).values[-1], -torch.inf
        ),
    ),
}


@pytest.fixture(scope="module")
def models(trio: list[PreTrainedModel]) -> dict[str, PreTrainedModel]:
    return dict(zip("abc", trio, strict=True))


def log_p(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def by_hand(models: dict[str, PreTrainedModel], prompt: list[int], rule: Any) -> Any:
    """The greedy response under a rule, and the log-probs of its tokens."""
    written: list[int] = []
    log_probs: list[float] = []
    while len(written) < NEW and EOS not in written:
        rows = [log_p(m, prompt + written) for m in models.values()]
        row = rule(rows).log_softmax(-1)
        written.append(int(row.argmax()))
        log_probs.append(float(row.max()))
    return written, log_probs


@pytest.mark.parametrize("name", BLENDS)
def test_greedy(name: str, models: dict[str, PreTrainedModel]) -> None:
    """Tokens and log-probs of both paths, and of `score`, are those of the loop."""
    text, rule = BLENDS[name]
    blend = cf.parse(text, **models)
    prompts = [[5, 9, 33], [12, 40]]
    want = [by_hand(models, p, rule) for p in prompts]
    for engine in (cf.Engine(), cf.Engine(simple=True)):
        out = cf.generate(blend, prompts, max_new_tokens=NEW, engine=engine)
        assert out.responses == [ids for ids, _ in want]
        for i, (ids, each) in enumerate(want):
            assert out.logprobs[i, : len(ids)].tolist() == pytest.approx(each, abs=1e-4)
    scores = cf.score(blend, prompts, [ids for ids, _ in want])
    torch.testing.assert_close(scores.logprobs, out.logprobs, atol=1e-4, rtol=0)


def test_weights_of_each_request(models: dict[str, PreTrainedModel]) -> None:
    """Requests with weights of their own are as they would be alone."""
    a, b, c = (cf.Model(m, name=n) for n, m in models.items())
    prompts, w = [[5, 9, 33], [12, 40], [7]], [0.5, 1.0, 3.0]

    def blend(w: Any) -> cf.Blend:
        return a + (w * (b - c)).clamp(-0.5, 0.5) - 0.3 * cf.union(a, b)

    options = {"max_new_tokens": 8, "do_sample": True, "return_term_logprobs": True, "max_batch": 2}

    out = cf.generate(blend(w), prompts, seed=[1, 2, 3], **options)
    for i, one in enumerate(w):
        alone = cf.generate(blend(one), prompts[i : i + 1], seed=[i + 1], **options)
        assert out.responses[i] == alone.responses[0]
        n = len(alone.responses[0])
        torch.testing.assert_close(out.term_logprobs[i, :n], alone.term_logprobs[0])

    with pytest.raises(ValueError, match=r"the weight of b is a tensor \[3\]; it must be \[2\]"):
        cf.generate(blend(w), prompts[:2], max_new_tokens=2)


def test_divergence_to_a_union(models: dict[str, PreTrainedModel]) -> None:
    a, b = cf.Model(models["a"], name="a"), cf.Model(models["b"], name="b")
    target = a + (b - a).clamp(max=0.5)
    out = cf.generate(cf.union(a, b), [[5, 9]], max_new_tokens=1, kl_to=target)
    p = [log_p(models[n], [5, 9]) for n in "ab"]
    log_pi = torch.maximum(*p).log_softmax(-1)
    log_q = (p[0] + (p[1] - p[0]).clamp(max=0.5)).log_softmax(-1)
    want = (log_pi.exp() * (log_pi - log_q)).sum()
    assert out.kl[0, 0].item() == pytest.approx(want.item(), abs=1e-5)


def test_processors_see_log_probs(models: dict[str, PreTrainedModel]) -> None:
    class Keeps(LogitsProcessor):
        seen: Tensor

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen = scores.clone()
            return scores

    keeps = Keeps()
    blend = cf.parse("a + (b - c).clamp(max=0.2)", **models)
    cf.generate(blend, [[5, 9]], max_new_tokens=1, logits_processor=[keeps])
    p = [log_p(m, [5, 9]) for m in models.values()]
    want = (p[0] + (p[1] - p[2]).clamp(max=0.2)).log_softmax(-1)
    torch.testing.assert_close(keeps.seen[0].double(), want, atol=1e-4, rtol=0)


def test_an_intersection_that_is_empty(models: dict[str, PreTrainedModel]) -> None:
    """The row fails, with the reason; the other goes on."""
    a, b = models["a"], models["b"]
    hooks = []
    for model, first in ((a, 0), (b, 1)):

        def exclude(module: Any, args: Any, out: Tensor, first: int = first) -> Tensor:
            out = out.clone()
            rows = out.view(-1, out.shape[-1])
            rows[-1, first::2] = -torch.inf
            return out

        hooks.append(model.get_output_embeddings().register_forward_hook(exclude))
    try:
        with pytest.warns(RuntimeWarning, match=r"each is excluded by one of .*intersection\("):
            out = cf.generate(
                cf.intersection(a, b),
                [[5, 9], [7, 8]],
                max_new_tokens=3,
                engine=cf.Engine(simple=True),
            )
    finally:
        for hook in hooks:
            hook.remove()
    assert out.failed.tolist() == [False, True]
    assert len(out.responses[0]) == 3
