"""With one term, `crossfade.generate` is `model.generate`; with three, a loop written by hand."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import EOS, SHAPES, make
from transformers import GenerationConfig, PreTrainedModel

Batch = dict[str, torch.Tensor]


@pytest.mark.parametrize("shape", SHAPES)
def test_one_term_greedy_is_model_generate(shape: str, batch: Batch) -> None:
    model = make(shape)
    theirs = model.generate(**batch, max_new_tokens=24)
    ours = cf.generate(model, batch, max_new_tokens=24)
    assert torch.equal(ours.sequences, theirs)
    assert len(set(theirs[0, 9:].tolist())) > 4, "a model that repeats itself tests nothing"


def test_the_sliding_window_matters(batch: Batch) -> None:
    # Otherwise the parity above would hold for a cache that forgets the window too.
    model = make("gemma3")
    theirs = model.generate(**batch, max_new_tokens=24)
    wide = make("gemma3")
    wide.config.sliding_window = 64
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = 64 if layer.self_attn.sliding_window else None
    assert not torch.equal(wide.generate(**batch, max_new_tokens=24), theirs)


@pytest.mark.parametrize(
    "arguments",
    [
        {"eos_token_id": [7, 12, 30], "pad_token_id": 4},
        {"eos_token_id": 39},  # EOS pads too if nothing else is named.
        {"eos_token_id": 39, "min_new_tokens": 6},
        {"min_length": 15, "eos_token_id": [39, 53]},
        {"max_length": 20},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[39], [53, 5]]},
        {"suppress_tokens": [39, 53], "begin_suppress_tokens": [5, 7]},
        {"forced_bos_token_id": 2, "forced_eos_token_id": EOS},
        {"sequence_bias": [[[39], -10.0], [[20], 3.0]]},
        {"exponential_decay_length_penalty": (3, 1.5)},
        {"renormalize_logits": True},
        {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3)},
        {"prefix_allowed_tokens_fn": lambda row, ids: range(10 + row, 40)},
    ],
    ids=lambda a: "+".join(a),
)
def test_arguments_mean_what_they_mean_there(
    arguments: dict[str, Any], base: PreTrainedModel, batch: Batch
) -> None:
    if not {"max_length", "generation_config"} & set(arguments):
        arguments = {"max_new_tokens": 16, **arguments}
    theirs = base.generate(**batch, **arguments)
    ours = cf.generate(base, batch, **arguments)
    assert torch.equal(ours.sequences, theirs)
    if not {"renormalize_logits", "max_length"} & set(arguments):
        plain = base.generate(**batch, max_new_tokens=16)
        assert not torch.equal(theirs, plain), "an argument without effect tests nothing"


def test_saved_generation_config_is_used(batch: Batch) -> None:
    model = make("llama")
    model.generation_config.update(max_new_tokens=7, repetition_penalty=1.5, eos_token_id=[3, 5])
    assert torch.equal(cf.generate(model, batch).sequences, model.generate(**batch))


def test_default_length_is_theirs(base: PreTrainedModel, batch: Batch) -> None:
    with pytest.warns(UserWarning, match="max_new_tokens"):
        theirs = base.generate(**batch)
    with pytest.warns(UserWarning, match="max_new_tokens"):
        ours = cf.generate(base, batch)
    assert torch.equal(ours.sequences, theirs)


def by_hand(
    models: list[PreTrainedModel], weights: list[float], ids: list[int], steps: int
) -> tuple[list[int], list[float]]:
    """Decode one unpadded request greedily, reading the whole sequence anew at every step."""
    new: list[int] = []
    scores = []
    for _ in range(steps):
        sequence = torch.tensor([ids + new])
        z = [m(sequence).logits[0, -1].double().log_softmax(-1) for m in models]
        log_p = sum(w * p for w, p in zip(weights, z, strict=True)).log_softmax(-1)
        token = int(log_p.argmax())
        new.append(token)
        scores.append(float(log_p[token]))
        if token == EOS:
            break
    return new, scores


@torch.no_grad()
def test_three_terms_are_a_loop_by_hand(trio: list[PreTrainedModel], batch: Batch) -> None:
    base, tuned, ref = map(cf.Model, trio)
    out = cf.generate(base + 0.8 * (tuned - ref), batch, max_new_tokens=16)
    for i, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        new, scores = by_hand(trio, [1.0, 0.8, -0.8], ids[mask.bool()].tolist(), 16)
        assert out.responses[i] == new
        torch.testing.assert_close(out.logprobs[i, : len(new)], torch.tensor(scores))
        assert not out.logprobs[i, len(new) :].any()


@torch.no_grad()
@pytest.mark.parametrize("power", [1.0, -1.0])
def test_power_means_are_their_formula(
    power: float, trio: list[PreTrainedModel], batch: Batch
) -> None:
    a, b = trio[:2]
    out = cf.generate(cf.power_mean([a, b], [0.3, 0.7], r=power), batch, max_new_tokens=1)
    p = [m.generate(**batch, max_new_tokens=1, **LOGITS).logits[0].softmax(-1) for m in (a, b)]
    mean = (0.3 * p[0] ** power + 0.7 * p[1] ** power) ** (1 / power)
    best = (mean / mean.sum(-1, keepdim=True)).log().max(dim=-1)
    assert torch.equal(out.sequences[:, -1], best.indices)
    torch.testing.assert_close(out.logprobs[:, 0], best.values)


LOGITS = {"output_logits": True, "return_dict_in_generate": True}


@torch.no_grad()
def test_values_and_support(trio: list[PreTrainedModel], batch: Batch) -> None:
    a, q = trio[:2]
    blend = (cf.Model(a) + 0.5 * cf.ValueHead(q)).within(cf.Support(top_k=3))
    out = cf.generate(blend, batch, max_new_tokens=1)
    z, v = (m.generate(**batch, max_new_tokens=1, **LOGITS).logits[0] for m in (a, q))
    z = z.masked_fill(z < z.topk(3).values[:, -1:], -float("inf"))
    best = (z + 0.5 * v).log_softmax(-1).max(dim=-1)
    assert torch.equal(out.sequences[:, -1], best.indices)
    torch.testing.assert_close(out.logprobs[:, 0], best.values)


def test_weights_of_each_request(trio: list[PreTrainedModel], batch: Batch) -> None:
    a, b = map(cf.Model, trio[:2])
    each = torch.tensor([0.0, 0.3, 0.7, 1.0])
    together = cf.generate((1 - each) * a + each * b, batch, max_new_tokens=8)
    for i, w in enumerate(each.tolist()):
        alone = cf.generate((1 - w) * a + w * b, one(batch, i), max_new_tokens=8)
        assert together.responses[i] == alone.responses[0]


def one(batch: Batch, i: int) -> list[int]:
    """What request i gets alone and unpadded."""
    return batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()


def test_terms_of_other_dtypes(trio: list[PreTrainedModel], batch: Batch) -> None:
    half = make("gpt2", 1).to(torch.bfloat16)
    out = cf.generate(0.5 * cf.Model(trio[0]) + 0.5 * cf.Model(half), batch, max_new_tokens=4)
    assert out.logprobs.dtype == torch.float32
    assert out.logprobs.isfinite().all()
