"""The engine on a GPU: one captured graph a step, and the same tokens as without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.value_heads import value_model
from tiny_models import EOS, SHAPES, lora, make, spread

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
SIMPLE, EAGER = cf.Engine(simple=True), cf.Engine(cuda_graph=False)
DRAW: dict[str, Any] = {
    "max_new_tokens": 40,
    "do_sample": True,
    "seed": 5,
    "eos_token_id": [EOS, 20],
    "progress": False,
}
PROMPTS = [[7, 9, 30, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17, 18, 19], [33, 6], [5, 5, 21]]


def on_gpu(shape: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return make(shape, seed).to("cuda", dtype)


def blend_of(shape: str, dtype: torch.dtype = torch.float32) -> cf.Blend:
    base, tuned, ref = (cf.Model(on_gpu(shape, seed, dtype)) for seed in range(3))
    return base + 0.8 * (tuned - ref)


def same(ours: cf.Output, theirs: cf.Output) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_step(shape: str, most: int | None) -> None:
    """Three models run on forked streams, rows join, and the host does not look at every step."""
    blend = blend_of(shape)
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    same(cf.generate(blend, PROMPTS, max_batch=most, engine=EAGER, **DRAW), theirs)
    ours = cf.generate(blend, PROMPTS, max_batch=most, **DRAW)
    same(ours, theirs)
    assert not ours.stats.notes, "it was captured"


@pytest.mark.parametrize("share", [True, False])
def test_adapters_and_a_shared_head(share: bool) -> None:
    pytest.importorskip("peft")
    model: Any = make()
    for seed, name in enumerate(("tuned", "ref")):
        model = lora(seed, model, name, 8, ["q_proj", "v_proj", "down_proj"])
    model = model.eval().to("cuda")
    base, tuned, ref = (cf.Model(model, adapter=a) for a in (None, "tuned", "ref"))
    weights = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0])
    blend = base + weights * (tuned - ref)
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    engine = cf.Engine(share_weights=share, share_head=share)
    ours = cf.generate(blend, PROMPTS, max_batch=3, engine=engine, **DRAW)
    same(ours, theirs)
    assert not ours.stats.notes


def test_mixes_of_adapters_in_a_captured_step() -> None:
    """Rows join a captured step, each with its own mix."""
    pytest.importorskip("peft")
    model: Any = make()
    for seed, name in enumerate(("kind", "brief")):
        model = lora(seed, model, name, 8, ["q_proj", "v_proj", "down_proj"])
    weights = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0], device="cuda")
    term = cf.Model(model.eval().to("cuda"), adapter={"kind": weights, "brief": 1 - weights})
    theirs = cf.generate(term, PROMPTS, engine=SIMPLE, **DRAW)
    ours = cf.generate(term, PROMPTS, max_batch=2, **DRAW)
    same(ours, theirs)
    assert not ours.stats.notes


def test_caches_that_move_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossfade.decoding.engine.group.AHEAD", 4)
    monkeypatch.setattr("crossfade.decoding.engine.kv_cache.STEP", 4)
    blend = blend_of("llama")
    arguments = {**DRAW, "eos_token_id": None, "max_new_tokens": 100}
    ours = cf.generate(blend, PROMPTS, **arguments)
    same(ours, cf.generate(blend, PROMPTS, engine=SIMPLE, **arguments))
    assert not ours.stats.notes


def test_a_conversation_goes_on() -> None:
    blend = blend_of("qwen3")
    first = cf.generate(blend, PROMPTS, return_cache=True, **DRAW)
    longer = [[*p, *r, 25, 26] for p, r in zip(PROMPTS, first.responses, strict=True)]
    ours = cf.generate(blend, longer, cache=first.cache, **DRAW)
    same(ours, cf.generate(blend, longer, engine=SIMPLE, **DRAW))


@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["read", "drawn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_search(shape: str, weight: float) -> None:
    """Values come from models of their own, or from terms of the captured step."""
    base, tuned, ref = (cf.Model(on_gpu(shape, seed)) for seed in range(3))
    blend = base + weight * (tuned - ref)
    arguments = {**DRAW, "search": cf.ChunkBeamSearch(2, 3, 4, cf.LogRatio(tuned, ref))}
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **arguments)
    for most in (None, 12):
        ours = cf.generate(blend, PROMPTS, max_batch=most, **arguments)
        same(ours, theirs)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-3, rtol=1e-3)
        assert not ours.stats.notes, "it was captured"


def test_a_bad_row_is_named_after_the_steps_that_nobody_saw() -> None:
    base, guide = on_gpu("llama"), on_gpu("llama", 1)
    with torch.no_grad():
        guide.model.embed_tokens.weight[60] = float("nan")
    prompts = [[3], [3], [60], [3], [3]]
    blend = cf.Model(base) + 0.1 * cf.Model(guide, prompt=prompts, name="guide")
    arguments = {**DRAW, "eos_token_id": [EOS, 60]}
    with pytest.warns(RuntimeWarning, match="request 2 was ended at its token 0: guide gave"):
        out = cf.generate(blend, PROMPTS, **arguments)
    assert out.failed.tolist() == [False, False, True, False, False]


def test_bfloat16_by_teacher_forcing() -> None:
    blend, exact = blend_of("llama", torch.bfloat16), blend_of("llama")
    out = cf.generate(blend, PROMPTS, **DRAW)
    truth = cf.score(exact, PROMPTS, out.responses).logprobs
    forced = cf.score(blend, PROMPTS, out.responses).logprobs
    assert (out.logprobs - truth).abs().mean() <= 1.5 * (forced - truth).abs().mean() + 0.01


def test_peak_memory_is_stated() -> None:
    blend = blend_of("llama")
    torch.cuda.reset_peak_memory_stats()
    out = cf.generate(blend, PROMPTS, **DRAW)
    assert out.stats.peak_bytes == torch.cuda.max_memory_allocated()
    assert out.stats.peak_bytes > out.stats.cache_bytes


@pytest.mark.parametrize("kinds", [("q",), ("scalar",), ("q", "scalar")])
def test_heads_ride_on_captured_steps(kinds: Sequence[str]) -> None:
    """Scalar heads wait for a step, after which rows go on from its logits: the graph stays."""
    base = on_gpu("llama")
    value: Any = 0
    for seed, kind in enumerate(kinds):
        model = value_model(base, kind)
        spread(model.get_output_embeddings(), seed)
        value = value + cf.ValueHead(model.eval())
    search = cf.ChunkBeamSearch(2, 3, 8, value)
    ours = cf.generate(base, PROMPTS, search=search, **DRAW)
    assert len(ours.stats.models) == 1
    assert not ours.stats.notes, "it was captured"
    apart = cf.Engine(share_weights=False, cuda_graph=False)
    theirs = cf.generate(base, PROMPTS, search=search, engine=apart, **DRAW)
    same(ours, theirs)
    torch.testing.assert_close(ours.values, theirs.values, atol=1e-3, rtol=1e-3)
