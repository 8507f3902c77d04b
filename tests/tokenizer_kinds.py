"""A small tokenizer of each kind that models have, trained here on a few sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The answer is yes, and the film was a very bright one.",
    "hello world, hello there! It's fine; don't worry about the plot.",
    "A cast of dull players: walking, talking, singing, playing, and so on. The end.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|answer|>"]
MARK = "\u2581"  # SentencePiece's space


def _train(core: Tokenizer, kind: Any, size: int = 200, **options: Any) -> Tokenizer:
    core.train_from_iterator(
        TEXTS, kind(vocab_size=size, special_tokens=SPECIAL, show_progress=False, **options)
    )
    return core


def _wrap(core: Tokenizer, *, bos: bool = False) -> PreTrainedTokenizerFast:
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=SPECIAL[3:],
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def _sentencepiece(scheme: str, *, split: bool) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's and Mistral's, of pieces of words, and bytes for all else."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    learned = json.loads(_train(core, trainers.BpeTrainer).to_str())["model"]
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    words = [*learned["vocab"], *(f"<0x{i:02X}>" for i in range(256))]
    core.model = models.BPE(
        {word: i for i, word in enumerate(words)},
        [tuple(pair) for pair in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace(MARK, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrap(core, bos=True)


def _unigram() -> PreTrainedTokenizerFast:
    """A tokenizer like T5's and XGLM's, in which whole words are likelier than their parts."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return _wrap(_train(core, trainers.UnigramTrainer, unk_token="<unk>"), bos=True)


def _bytes(prefix: bool) -> PreTrainedTokenizerFast:
    """A tokenizer like GPT-2's and Qwen's, of bytes: a character may be several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _wrap(_train(core, trainers.BpeTrainer, 400, initial_alphabet=alphabet))


def _wordpiece() -> PreTrainedTokenizerFast:
    """A tokenizer like BERT's: ``##`` begins a token that goes on with a word."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##")
    return _wrap(_train(core, trainers.WordPieceTrainer))


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "sentencepiece-always": lambda: _sentencepiece("always", split=False),
    "sentencepiece-first": lambda: _sentencepiece("first", split=True),
    "unigram": _unigram,
    "bytes": lambda: _bytes(False),
    "bytes-prefix-space": lambda: _bytes(True),
    "wordpiece": _wordpiece,
}
SENTENCEPIECE = ["sentencepiece-always", "sentencepiece-first", "unigram"]


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()
