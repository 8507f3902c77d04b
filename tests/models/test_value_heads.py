"""Value heads give the same values in the engine and by hand, and leave their base as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.saved_value_heads import save_value_head
from crossfade.models.value_heads import LowRankHead, token_values, value_head, value_model
from sweeps import product
from tiny_models import SHAPES, VOCAB, doubled, lora, make
from torch import nn
from value_head_cases import DRAW, HEADS, PROMPTS, equal, fill, state

# PEFT asks transformers for an attribute that this version of it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@torch.no_grad()
def by_hand(base: Any, model: Any, ids: list[int]) -> torch.Tensor:
    """Values ``[tokens, V or 1]`` at every position, in float64 from the hidden states on."""
    hidden = base.base_model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]
    head = value_head(model)
    weights = {k: v.double() for k, v in head.state_dict().items()}
    if isinstance(head, LowRankHead):
        return hidden.double() @ weights["a"].T @ weights["b"].T
    if head.weight.dtype is not hidden.dtype:
        hidden = hidden.to(head.weight.dtype)
    return hidden.double() @ weights["weight"].T + weights.get("bias", 0.0)


def last(model: Any, values: torch.Tensor, ids: list[int]) -> float:
    scalar = model.value_kind == "scalar"
    return float(values[-1, 0] if scalar else values[-2, ids[-1]])


@pytest.mark.parametrize(("head", "shape"), product(list(HEADS), list(SHAPES), together=1))
def test_searches_see_the_values(shape: str, head: str) -> None:
    options = HEADS[head]
    base = make(shape)
    model = fill(value_model(base, **options))
    search = cf.ChunkBeamSearch(2, 3, 4, cf.ValueHead(model))
    outs = [
        cf.generate(base, PROMPTS, search=search, engine=cf.Engine(simple=simple), **DRAW)
        for simple in (False, True)
    ]
    assert not outs[0].stats.notes
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    # Where a head gives bfloat16, a number that is summed for one token alone is less rounded.
    rough = {"atol": 0.05, "rtol": 0.02} if options.get("dtype") else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(outs[0].values, outs[1].values, **rough)
    for i, (prompt, response) in enumerate(zip(PROMPTS, outs[0].responses, strict=True)):
        ids = prompt + response
        truth = last(model, by_hand(base, model, ids), ids)
        torch.testing.assert_close(float(outs[0].values[i]), truth, **rough)


@pytest.mark.parametrize("options", [HEADS["full"], HEADS["low rank"]], ids=["full", "low rank"])
@pytest.mark.parametrize("within", [None, cf.Support(top_k=3)], ids=["all", "support"])
def test_blends_add_the_values(options: dict[str, Any], within: cf.Support | None) -> None:
    base, guide = make("llama"), make("qwen3", 2)
    model = fill(value_model(base, **options))
    blend = cf.Model(base) + 0.2 * cf.Model(guide) + 0.7 * cf.ValueHead(model)
    blend = blend if within is None else blend.within(within)
    outs = [
        cf.generate(blend, PROMPTS, engine=cf.Engine(simple=simple), **DRAW)
        for simple in (False, True)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    torch.testing.assert_close(outs[0].logprobs, outs[1].logprobs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(PROMPTS, outs[0].responses, strict=True)):
            ids = torch.tensor([prompt + response])
            logits = base(ids).logits[0].double()
            mixed = logits.log_softmax(-1) + 0.2 * guide(ids).logits[0].double().log_softmax(-1)
            mixed += 0.7 * by_hand(base, model, ids[0].tolist())
            if within is not None:
                mixed[logits < logits.topk(3).values[:, -1:]] = -torch.inf
            at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
            truth = mixed.log_softmax(-1)[at, torch.tensor(response)]
            found = outs[0].logprobs[i, : len(response)].double()
            torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_of_tokens(options: dict[str, Any]) -> None:
    base = make("gpt2")
    model = fill(value_model(base, **options))
    assert model(torch.tensor([[5, 6]])).logits.dtype is torch.float32
    ids = [9, 4, 33, 60, 7]
    values = by_hand(base, model, ids)
    hidden = base.base_model(input_ids=torch.tensor([ids]))[0].detach()
    if model.value_kind == "scalar":
        found, truth = token_values(value_head(model), hidden, torch.tensor([ids]))[0], values[:, 0]
    else:
        tokens = torch.tensor([ids[1:]])
        found = token_values(value_head(model), hidden[:, :-1], tokens)[0]
        truth = values[:-1].gather(1, tokens.T)[:, 0]
    assert found.dtype is torch.float32
    # a full head rounds hidden states to its own dtype
    rough = 0.03 if options.get("dtype") and "rank" not in options else 1e-4
    torch.testing.assert_close(found.double(), truth, atol=rough, rtol=rough)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_begin_at_zero(options: dict[str, Any]) -> None:
    model = value_model(make("qwen3"), **options)
    assert model(torch.tensor([[5, 6, 50]])).logits.abs().max() == 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"lm_head.{n}" for n, _ in value_head(model).named_parameters()}


def test_the_base_stays_as_it_is() -> None:
    """Base and value model share weights, but no modes, dtypes, adapters or configs."""
    base = make("llama").train()
    before, config = state(base), base.config.to_dict()
    model = value_model(base, "scalar")
    own = dict(base.named_parameters())
    for name, p in model.named_parameters():
        if not name.startswith("lm_head"):
            assert p.data_ptr() == own[name].data_ptr()
    assert model.training
    model.eval()
    lora(0, model, "tone")
    fill(model.to(torch.bfloat16))
    model.tie_weights()
    assert base.training
    assert base.config.to_dict() == config
    assert all(p.requires_grad for p in base.parameters())
    assert equal(state(base), before)
    assert type(base.lm_head) is nn.Linear
    assert all(type(m) in (nn.Linear,) for n, m in base.named_modules() if n.endswith("q_proj"))


def test_tied_embeddings_and_soft_caps() -> None:
    """A head tied to the embeddings is replaced, so they stay; and values are not capped."""
    from transformers import Gemma3ForCausalLM

    config = make("gemma3").config
    config.final_logit_softcapping, config.tie_word_embeddings = 2.0, True
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(config).eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = fill(value_model(base))
    with torch.no_grad():
        value_head(model).weight.mul_(10)
    model.tie_weights()
    assert value_head(model).weight is not model.model.embed_tokens.weight
    values = by_hand(base, model, [5, 6, 7])
    assert values.abs().max() > 4
    found = model(torch.tensor([[5, 6, 7]])).logits[0].double()
    torch.testing.assert_close(found, values, atol=1e-4, rtol=1e-4)
    assert base.config.final_logit_softcapping == 2.0


BAD_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "kind": (lambda: value_model(make(), "v"), ValueError, "kind is 'v'; it must be 'q' or"),
    "rank of a scalar": (lambda: value_model(make(), "scalar", rank=2), ValueError, "only a Q-"),
    "rank 0": (lambda: value_model(make(), rank=0), ValueError, r"rank is 0; .* within \[1, 16\]"),
    "rank 17": (lambda: value_model(make(), rank=17), ValueError, "rank is 17"),
    "rank 2.0": (lambda: value_model(make(), rank=2.0), TypeError, "rank is 2.0; it must be an"),  # type: ignore[arg-type]
    "dtype": (lambda: value_model(make(), dtype=torch.int8), ValueError, "dtype is torch.int8"),
    "no model": (lambda: value_model(3), TypeError, "model is a int"),
    "backbone": (lambda: value_model(make().model), TypeError, "no language modelling head"),
    "adapter": (lambda: value_model(lora(0, make(), "x")), TypeError, "with PEFT adapters; it"),
    "inside": (
        lambda: value_model(lora(0, make(), "x").get_base_model()),
        TypeError,
        "LlamaForCausalLM with PEFT adapters",
    ),
    "save": (lambda: save_value_head(make(), "x"), TypeError, "a LlamaForCausalLM; it must be"),
    "save dtype": (
        lambda: save_value_head(value_model(make()), "x", dtype=torch.int8),
        ValueError,
        "dtype is torch.int8",
    ),
}


@pytest.mark.parametrize("bad", BAD_MODELS.values(), ids=BAD_MODELS)
def test_what_is_wrong_is_named(bad: tuple[Callable[[], Any], type[Exception], str]) -> None:
    with pytest.raises(bad[1], match=bad[2]):
        bad[0]()


def test_logits_that_are_more_than_the_heads_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="computes something between"):
        value_model(doubled())


def test_a_blend_counts_shared_weights_once() -> None:
    base = make()
    blend = cf.Model(base, name="base") + cf.ValueHead(value_model(base, rank=2), name="q")
    shared, head = blend.models
    assert shared.parameters == sum(p.numel() for p in base.parameters())
    assert head.parameters == 2 * (16 + VOCAB)
