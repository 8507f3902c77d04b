"""Tiny models of a few words, saved as the command line loads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<eos>", "<unk>", "system", "user", "assistant", *"abcdefghijklmnopqrstuvwxyz"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
ANSWERS = (  # the template of an instruct model, which ends an answer with EOS
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}{{ '<eos> ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
PROMPTS = ["a b c", "d", "e f g h i j", "k l"]


def random_model(words: Sequence[str], seed: int = 0) -> LlamaForCausalLM:
    """A model of one layer over these words, whose weights are large enough to matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 24},
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None},
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def make_tokenizer(words: Sequence[str], template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are these words, of which the first three are the special ones."""
    pad, eos, unknown = words[:3]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token=eos, unk_token=unknown
    )
    tokenizer.chat_template = template
    return tokenizer


def save_model(
    folder: Path, seed: int, words: Sequence[str] = WORDS, template: str = TEMPLATE
) -> str:
    """Save a random model and its tokenizer, and give back the folder as an option names it."""
    random_model(words, seed).save_pretrained(folder)
    make_tokenizer(words, template).save_pretrained(folder)
    return str(folder)


def save_reward_model(folder: Path, classes: Sequence[str] = ("score",)) -> str:
    """Save a random sequence classifier and its tokenizer."""
    torch.manual_seed(5)
    config = random_model(WORDS).config
    config.num_labels = len(classes)
    config.id2label = dict(enumerate(classes))
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer(WORDS).save_pretrained(folder)
    return str(folder)


def loaded(path: str) -> LlamaForCausalLM:
    """A saved model as Hugging Face loads it, without the command line."""
    return LlamaForCausalLM.from_pretrained(path).eval()


def trio(paths: dict[str, str]) -> list[str]:
    """The options that name the three models, and the blend of them."""
    models = [f"--model={name}={path}" for name, path in paths.items()]
    return [*models, "--blend", "base + 0.8 * (tuned - ref)"]
