"""Models that read pictures too, used for text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import HEADS, IDS, LONG, SIZES, VOCAB
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

TEXT: dict[str, Any] = {**SIZES, **HEADS, **LONG, **IDS}
VISION: dict[str, Any] = {
    **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 1, "image_size": 8, "patch_size": 4},
}


def llava() -> PreTrainedModel:
    vision = CLIPVisionConfig(**VISION, projection_dim=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**TEXT), vision_config=vision, image_token_index=VOCAB - 1
        )
    )


def gemma3() -> PreTrainedModel:
    layers = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**TEXT, **layers},
            vision_config=VISION,
            image_token_index=VOCAB - 1,
            boi_token_index=VOCAB - 2,
            eoi_token_index=VOCAB - 3,
            mm_tokens_per_image=4,
        )
    )


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 1, "patch_size": 4}
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=VOCAB - 1,
            video_token_id=VOCAB - 2,
            vision_start_token_id=VOCAB - 3,
            vision_end_token_id=VOCAB - 4,
        )
    )


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl], ids=lambda f: f.__name__)
def test_text_alone(make: Callable[[], PreTrainedModel], batch: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    arguments: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": 1, "pad_token_id": 0}
    expected = model.generate(**batch, **arguments)
    assert torch.equal(cf.generate(model, batch, **arguments).sequences, expected)
    # Transformers and processors add these to a text that comes alone.
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": model, **arguments}
    assert torch.equal(model.generate(**batch, **hook), expected)
    zeros = torch.zeros_like(batch["input_ids"])
    for more in ({"mm_token_type_ids": zeros}, {"token_type_ids": zeros}, {"pixel_values": None}):
        assert torch.equal(cf.generate(model, {**batch, **more}, **arguments).sequences, expected)
    with pytest.raises(NotImplementedError, match="mm_token_type_ids"):
        cf.generate(model, {**batch, "mm_token_type_ids": zeros + 1}, **arguments)
    torch.testing.assert_close(
        cf.score(model, {**batch, "token_type_ids": zeros}, [[5, 6]] * 4).logprobs,
        cf.score(model, batch, [[5, 6]] * 4).logprobs,
    )


def test_a_picture_is_refused_by_name() -> None:
    model = llava().eval()
    picture = {"pixel_values": torch.zeros(1, 3, 8, 8)}
    inputs = {"input_ids": torch.tensor([[5, *[VOCAB - 1] * 4, 6]])}
    with pytest.raises(NotImplementedError, match="pixel_values"):
        cf.generate(model, {**inputs, **picture}, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match=r"mm_encoder_outputs|pixel_values"):
        model.generate(
            **inputs, **picture, custom_generate=cf.decode, blend=model, max_new_tokens=2
        )
