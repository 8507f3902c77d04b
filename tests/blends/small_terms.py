"""Terms over the smallest models that a blend can be made of: A, B, C and a value Q."""

from __future__ import annotations

from copy import deepcopy

import pytest
from crossfade.blends.blend import Model, ValueHead
from transformers import LlamaConfig, LlamaForCausalLM

SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
CONFIG = LlamaConfig(**SIZE, num_attention_heads=2, num_key_value_heads=1)


def llama(path: str = "") -> LlamaForCausalLM:
    model = LlamaForCausalLM(deepcopy(CONFIG))
    model.config.name_or_path = path
    return model


LMS = [llama() for _ in range(4)]
A, B, C = (Model(lm, name=name) for lm, name in zip(LMS[:3], "abc", strict=True))
Q = ValueHead(LMS[3], name="q")


def weights(blend) -> dict[str, float]:
    return dict(
        zip(
            (*blend.names, *blend.value_names),
            (*blend.weights, *blend.value_weights),
            strict=True,
        )
    )


def lora(*names: str):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(llama("org/base"), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model
