"""What the tests of searches share: prompts, the settings of a draw, and a model of few words."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import torch
from tiny_models import EOS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIMPLE = cf.Engine(simple=True)
EOS_IDS = [EOS, *range(20, 30)]
PROMPTS = [[7, 9, 30, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17, 18, 19], [33, 6]]
DRAW: dict[str, Any] = {
    "max_new_tokens": 13,
    "temperature": 1.2,
    "seed": 5,
    "eos_token_id": EOS_IDS,
}
TEXTS = ["the film was", "plot very", "great cast the plot"]


def few_words(seed: int, words: int = 5) -> PreTrainedModel:
    """A model whose every token is often drawn."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=words, num_attention_heads=2, **sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model
