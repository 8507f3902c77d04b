"""`model.generate(..., custom_generate=cf.decode, blend=...)` is `cf.generate`."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.settings import Sampling, split_processors
from tiny_models import make
from transformers import (
    DynamicCache,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def blend(trio: list[PreTrainedModel]) -> cf.Blend:
    base, tuned, ref = map(cf.Model, trio)
    return base + 0.8 * (tuned - ref)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"eos_token_id": [20, 30], "pad_token_id": 4},
        {"do_sample": True, "seed": 3, "top_k": 0},
        {"do_sample": True, "seed": 3, "top_k": 5, "top_p": 0.8, "temperature": 0.7, "min_p": 0.05},
        {"do_sample": True, "seed": [3, 4, 5, 6], "top_k": 9, "repetition_penalty": 1.4},
        {"do_sample": True, "seed": 3, "top_k": 0, "num_return_sequences": 3},
        {"do_sample": True, "seed": 3, "top_k": 7, "typical_p": 0.8},
        {"do_sample": True, "seed": 3, "top_k": 7, "renormalize_logits": True},
    ],
    ids=lambda a: "+".join(a) or "greedy",
)
def test_hook_is_generate(
    arguments: dict[str, Any], blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    theirs = base.generate(
        **batch, custom_generate=cf.decode, blend=blend, max_new_tokens=12, **arguments
    )
    ours = cf.generate(blend, batch, max_new_tokens=12, **arguments)
    assert torch.equal(theirs, ours.sequences)


def test_weights_of_each_request(
    base: PreTrainedModel, trio: list[PreTrainedModel], batch: Batch
) -> None:
    blend = cf.Model(base) + torch.tensor([0.0, 0.5, 1.0, 1.5]) * cf.Model(trio[1])
    arguments: dict[str, Any] = {"do_sample": True, "seed": 1, "top_k": 0, "max_new_tokens": 6}
    theirs = base.generate(
        **batch, custom_generate=cf.decode, blend=blend, num_return_sequences=2, **arguments
    )
    ours = cf.generate(blend, batch, num_return_sequences=2, **arguments)
    assert torch.equal(theirs, ours.sequences)


def test_hugging_faces_default_top_k_stays(base: PreTrainedModel) -> None:
    arguments: dict[str, Any] = {
        "do_sample": True,
        "temperature": 50.0,
        "num_return_sequences": 400,
        "max_new_tokens": 1,
        "seed": 1,
    }
    drawn = base.generate(
        torch.tensor([[5, 6]]), custom_generate=cf.decode, blend=base, **arguments
    )
    assert len(set(drawn[:, -1].tolist())) == 50


def test_returns_what_generate_returns(
    blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    out = base.generate(
        **batch,
        custom_generate=cf.decode,
        blend=blend,
        max_new_tokens=3,
        return_dict_in_generate=True,
    )
    assert isinstance(out, GenerateDecoderOnlyOutput)
    plain = base.generate(**batch, custom_generate=cf.decode, blend=blend, max_new_tokens=3)
    assert torch.equal(out.sequences, plain)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_beams": 2}, NotImplementedError, "num_beams=2"),
        ({"use_cache": False}, NotImplementedError, "use_cache"),
        ({"cache_implementation": "static"}, NotImplementedError, "cache_implementation"),
        ({"output_attentions": True}, NotImplementedError, "output_attentions"),
        ({"output_scores": True, "return_dict_in_generate": True}, NotImplementedError, "output_"),
        ({"blend": None}, TypeError, "blend is None"),
        ({"blend": 7}, TypeError, "blend is a int"),
        ({"seed": -2}, ValueError, "seed is -2"),
    ],
)
def test_refusals(
    arguments: dict[str, Any],
    error: type[Exception],
    match: str,
    blend: cf.Blend,
    base: PreTrainedModel,
    batch: Batch,
) -> None:
    arguments = {"blend": blend, "max_new_tokens": 2, **arguments}
    with pytest.raises(error, match=match):
        base.generate(**batch, custom_generate=cf.decode, **arguments)


def test_refuses_what_only_the_caller_knows(
    blend: cf.Blend, base: PreTrainedModel, batch: Batch
) -> None:
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="no term of the blend"):
        make("llama", 8).generate(**batch, **hook)
    with pytest.raises(ValueError, match="attention_mask of request 1 is 0 after"):
        base.generate(batch["input_ids"], attention_mask=batch["attention_mask"].flip(1), **hook)
    with pytest.raises(ValueError, match="system of strict"):
        base.generate(**batch, **{**hook, "blend": cf.Model(base, system="a", name="strict")})
    with pytest.raises(NotImplementedError, match="position_ids"):
        base.generate(**batch, **hook, position_ids=torch.arange(9).expand(4, 9) + 3)
    cache = DynamicCache(config=base.config)
    base(batch["input_ids"][:1, :2], past_key_values=cache, attention_mask=torch.ones(1, 2))
    with pytest.raises(NotImplementedError, match="past_key_values"):
        base.generate(batch["input_ids"][:1], past_key_values=cache, **hook)


def test_inputs_embeds_are_refused_by_name(blend: cf.Blend, base: PreTrainedModel) -> None:
    ids = torch.tensor([[5, 6, 7]])
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, "max_new_tokens": 2}
    hook["inputs_embeds"] = base.get_input_embeddings()(ids)
    for inputs in ({}, {"input_ids": ids}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(NotImplementedError, match=r"inputs_embeds is not .*pass input_ids"):
            base.generate(**inputs, **hook)


WARPERS = [
    TemperatureLogitsWarper(0.5),
    TopKLogitsWarper(5),
    TopPLogitsWarper(0.9),
    MinPLogitsWarper(0.1),
]


@pytest.mark.parametrize(
    ("processors", "kept", "taken"),
    [
        (WARPERS, 0, Sampling(True, 0.5, 5, 0.9, 0.1)),
        ([*WARPERS, LogitNormalization()], 0, Sampling(True, 0.5, 5, 0.9, 0.1)),
        (WARPERS[1:2], 0, Sampling(True, top_k=5)),
        # The kernel has one order: what stands before one that is out of order runs as it is.
        ([WARPERS[2], WARPERS[1]], 1, Sampling(True, top_k=5)),
        ([WARPERS[1], WARPERS[1]], 1, Sampling(True, top_k=5)),
        # Typical sampling reads what the others have left, so that they stay before it.
        ([*WARPERS[:2], TypicalLogitsWarper(0.9)], 3, Sampling(True)),
        # The kernel knows neither a minimum of tokens to keep nor a finite filter value.
        ([TopPLogitsWarper(0.9, min_tokens_to_keep=2)], 1, Sampling(True)),
        ([MinPLogitsWarper(0.1, filter_value=-1e4)], 1, Sampling(True)),
    ],
)
def test_warpers_go_to_the_kernel(processors: list[Any], kept: int, taken: Sampling) -> None:
    rest, sampling = split_processors(LogitsProcessorList(processors), do_sample=True)
    assert len(rest) == kept
    assert sampling == taken
