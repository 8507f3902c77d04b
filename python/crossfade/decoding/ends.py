"""Checks the token ids that a call names against the vocabulary that it decodes.

A blend decodes the tokens that all its models share. A token that only some of them have, such as
the one by which a chat model ends its answers, can then not be written, and a caller who waits for
it must be told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import GenerationConfig

from ..blends.blend import Blend
from ..checks import warn
from ..models.hf import text_config, underlying

# Fields of GenerationConfig that name tokens to be written, kept back or biased.
NAMED = (
    *("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens"),
)


def check_ids(
    config: GenerationConfig, vocabulary: int, blend: Blend, tokenizer: Any, *, ends_asked: bool
) -> None:
    """Refuse what cannot be done with `vocabulary` tokens, and leave out ends that are not in it.

    Args:
        config: of the call. Ids outside the vocabulary are removed from its `eos_token_id`.
        ends_asked: whether the caller named the ends, and so knows them. If not, a warning names
            those of the blend's models and of the tokenizer that no row can write.

    Raises:
        TypeError, ValueError: names the argument and the id.
    """
    for name in NAMED:
        for token in _flat(name, getattr(config, name)):
            if not 0 <= token < vocabulary:
                raise ValueError(
                    f"{name} has token {token}; ids must be within [0, {vocabulary}), the tokens "
                    "that all models of the blend share"
                )
    if config.watermarking_config is not None:
        columns = text_config(underlying(blend.terms[0].model)).vocab_size
        if columns != vocabulary:
            raise NotImplementedError(
                f"watermarking_config counts on the {columns:,} columns of {blend.names[0]}, of "
                f"which {vocabulary:,} are decoded"
            )
    ends = list(_flat("eos_token_id", config.eos_token_id))
    within = [token for token in ends if token < vocabulary]
    if ends_asked and len(within) < len(ends):
        raise ValueError(
            f"eos_token_id has token {next(t for t in ends if t not in within)}, which no row can "
            f"write: ids must be within [0, {vocabulary}), the tokens that all models of the blend "
            "share; name one of these, the end as a text by stop_strings, or None for no end"
        )
    if config.exponential_decay_length_penalty is not None and (not ends or within != ends):
        raise ValueError(
            f"exponential_decay_length_penalty favours the ends {ends}; eos_token_id must name "
            f"tokens within [0, {vocabulary}), which all models of the blend share"
        )
    if not ends_asked:
        _warn_of_ends(config, vocabulary, blend, tokenizer)
    for text in _texts(config.stop_strings):
        added: dict[str, int] = tokenizer.get_added_vocab() if tokenizer is not None else {}
        token = added.get(text, 0)
        if token >= vocabulary:
            warn(
                f"stop_strings has {text!r}, token {token}, which no row can write: all models of "
                f"the blend share {vocabulary:,} tokens. It ends a row that spells it otherwise",
                RuntimeWarning,
            )
    if len(within) < len(ends):
        config.eos_token_id = within or None


def _warn_of_ends(config: GenerationConfig, vocabulary: int, blend: Blend, tokenizer: Any) -> None:
    """Warn of the ends, as saved with models and tokenizers, that no row can write."""
    if config.stop_strings:
        return  # The caller knows how rows end.
    saved: dict[str, Any] = {}
    for name, term in zip(blend.names, blend.terms, strict=True):
        own = getattr(underlying(term.model), "generation_config", None)
        saved[name] = getattr(own, "eos_token_id", None)
        saved[f"the tokenizer of {name}"] = getattr(term.tokenizer, "eos_token_id", None)
    saved["the tokenizer"] = getattr(tokenizer, "eos_token_id", None)
    found: dict[int, str] = {}
    for name, ends in saved.items():
        for token in _flat("eos_token_id", ends):
            if token >= vocabulary:
                found.setdefault(token, name)
    for token, name in found.items():
        warn(
            f"{name} ends texts by token {token}, which no row can write: all models of the blend "
            f"share {vocabulary:,} tokens. Pass eos_token_id= or stop_strings= with an end that "
            "they share, or give the other models that token (resize_token_embeddings)",
            RuntimeWarning,
        )


def _flat(name: str, ids: Any) -> Iterator[int]:
    """The ids in a field of a config: a number, or numbers in lists, tuples, tensors or keys."""
    if ids is None or (isinstance(ids, float) and name == "sequence_bias"):  # the bias itself
        return
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, bool) or not isinstance(ids, (int, Iterable)) or isinstance(ids, str):
        raise TypeError(f"{name} has {ids!r}; it must be token ids")
    if isinstance(ids, int):
        yield ids
        return
    for each in ids:
        yield from _flat(name, each)


def _texts(x: Any) -> list[str]:
    return [x] if isinstance(x, str) else [] if x is None else list(x)
