"""Tiny random models of several shapes, and a tokenizer of a few words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 61  # a prime, so that no row is aligned by chance
EOS, PAD, BOS = 1, 0, 2
SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
LONG = {"max_position_embeddings": 512}
# With tied weights a random model would repeat its last token for ever.
UNTIED = {"tie_word_embeddings": False}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **LONG, **IDS))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=512, **IDS, **UNTIED
        )
    )


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **HEADS, **LONG, **IDS))


def gemma3() -> PreTrainedModel:
    """One layer has a window, which is shorter than the prompts so that it matters."""
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SIZES, **HEADS, **LONG, **IDS, **UNTIED, layer_types=layers, sliding_window=4
    )
    return Gemma3ForCausalLM(config)


SHAPES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen3": qwen3,
    "gemma3": gemma3,
}


def make(shape: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random model with logits spread enough that no two tokens are near a tie."""
    torch.manual_seed(seed)
    model = SHAPES[shape]().eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = 0.6 if "embed" in name or "wte" in name or "lm_head" in name else 0.3
            torch.nn.init.normal_(weight, std=scale)
    return model


def lora(
    seed: int,
    model: Any,
    name: str,
    rank: int = 2,
    modules: Sequence[str] = ("q_proj", "down_proj"),
    **options: object,
) -> Any:
    """Add an adapter with weights that matter (LoRA's own start is the identity)."""
    from peft import LoraConfig, PeftModel, get_peft_model  # PEFT may be missing

    config = LoraConfig(r=rank, target_modules=list(modules), task_type="CAUSAL_LM", **options)
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    torch.manual_seed(seed)
    for key, weight in model.named_parameters():
        if name in key:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def spread(head: torch.nn.Module, seed: int = 0) -> None:
    """Fill a value head with numbers that matter (its own start is 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


class Doubled(LlamaForCausalLM):
    def forward(self, *args: Any, **options: Any) -> Any:
        output = super().forward(*args, **options)
        output.logits = 2 * output.logits
        return output


def doubled() -> PreTrainedModel:
    """A model that does more to its logits than its config says."""
    model = Doubled(llama().config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    return model


WORDS = ["great", "awful", "film", "the", "a", "was", "plot", "cast", "very", "dull", "bright"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with `VOCAB` words and a chat template that shows every role."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "system", "user", "assistant", ":"]
    words = [*special, *WORDS]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<bos> {{ m['role'] }} : {{ m['content'] }} "
        "{% if not (loop.last and continue_final_message) %}<eos> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bos> assistant : {% endif %}"
    )
    return tokenizer


def make_letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters and pairs of them, for tests of texts that join without spaces."""
    special = ["<pad>", "<eos>", "<bos>"]
    letters = [chr(ord("a") + i) for i in range(26)]
    pairs = [(a, b) for a in "abcdeinotu" for b in "dehn"][: VOCAB - len(special) - len(letters)]
    words = [*special, *letters, *("".join(p) for p in pairs)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, pairs))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
