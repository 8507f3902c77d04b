"""The tokenizer of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL = {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>"}  # of SmolLM2


def of_file(path: Path, fields: Any, max_length: int) -> Any:
    """The tokenizer, with the chat template of the file. It pads on the left."""
    pre = fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        return smollm2(fields, max_length)
    tokenizer = AutoTokenizer.from_pretrained(
        path.parent,
        gguf_file=path.name,
        padding_side="left",
        trust_remote_code=False,
        local_files_only=True,
    )
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        tokenizer.chat_template = template.contents()
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def smollm2(fields: Any, max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that the fields of a SmolLM2's GGUF file describe.

    It is put together here, because releases of Transformers read such files in different ways,
    some with a wrong end-of-text token. None of them splits numbers into digits: the only sign of
    that rule in the file is the name "smollm".
    """
    tokens = fields["tokenizer.ggml.tokens"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    core = Tokenizer(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        unk_token="<|endoftext|>",
        **{f"{name}_token": token for name, token in SPECIAL.items()},
    )
