"""Whether a model answers chats, by what is saved with it."""

from __future__ import annotations

from typing import Any

from .hf import underlying

ANSWER = "crossfade"  # stands for what a model answers


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer, which may be None, has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def is_instruct(model: Any, tokenizer: Any) -> bool:
    """Whether a model was tuned to answer in the form of its tokenizer's chat template.

    It was if the template closes an answer with a token at which the model ends its texts, as its
    generation config says. A base model may come with the chat template of the models that were
    tuned from it, but it ends its texts with another token.
    """
    if not has_template(tokenizer):
        return False
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # A template is a program, which may raise whatever it likes.
        return False
    end = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    ends = getattr(getattr(underlying(model), "generation_config", None), "eos_token_id", None)
    return not set(end).isdisjoint([ends] if isinstance(ends, int) else ends or ())
