"""Whether the models of a blend speak of the same tokens."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from .blend import Blend, Model, ValueHead
from .terms import text_config


class Vocabulary(NamedTuple):
    length: int  # len(tokenizer) when it was read: adding tokens changes it
    size: int  # the highest id and one
    digest: bytes


# Reading 150,000 tokens takes some 100 ms: once a tokenizer, not once a call.
_read: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def check_vocabularies(blend: Blend, tokenizer: Any = None) -> int:
    """The vocabulary that all terms and values of a blend share: the number of columns to decode.

    Where terms have tokenizers of their own, their tokens are compared one by one with those of
    `tokenizer` (or of the first term that has one), as far as every model has columns. Terms
    without a tokenizer are trusted that their ids mean the same: this cannot be checked.

    The vocabulary ends with the tokenizers' highest id or, if none is given, with the smallest
    model's ``config.vocab_size``. Columns past it are padding, which models of one family have in
    different numbers.

    Args:
        blend: what is decoded.
        tokenizer: the tokenizer of the inputs, if there is one.

    Raises:
        TypeError: a tokenizer has no `get_vocab`.
        ValueError: two tokenizers differ; names the first token that does, its id and both terms.
            Or nothing says how large the vocabulary is.
    """
    members: tuple[Model | ValueHead, ...] = (*blend.terms, *blend.values)
    names = (*blend.names, *blend.value_names)
    sizes = [getattr(text_config(m.model), "vocab_size", None) for m in members]
    columns = min((n for n in sizes if n is not None), default=None)
    tokenizers = [("the inputs", tokenizer)] if tokenizer is not None else []
    tokenizers += [
        (name, m.tokenizer)
        for name, m in zip(names, members, strict=True)
        if m.tokenizer is not None
    ]
    if not tokenizers:
        if columns is None:
            raise ValueError(
                f"the config of {names[0]} has no vocab_size and no term has a tokenizer; one of "
                "them must say how large the vocabulary is"
            )
        return columns

    first, one = tokenizers[0]
    for name, other in tokenizers[1:]:
        if other is not one and vocabulary(other).digest != vocabulary(one).digest:
            _compare(first, one, name, other, columns)
    size = min(vocabulary(t).size for _, t in tokenizers)
    return size if columns is None else min(size, columns)


def vocabulary(tokenizer: Any) -> Vocabulary:
    """A tokenizer's size and a digest of its ids and tokens, kept while the tokenizer lives."""
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; it must be a Hugging Face tokenizer"
        )
    known = _read.get(tokenizer)
    if known is None or known.length != len(tokenizer):
        tokens = _tokens(tokenizer)
        digest = hashlib.sha256("\0".join(f"{i} {t}" for i, t in sorted(tokens.items())).encode())
        known = Vocabulary(len(tokenizer), max(tokens, default=-1) + 1, digest.digest())
        _read[tokenizer] = known
    return known


def _tokens(tokenizer: Any) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}


def _compare(a_name: str, a: Any, b_name: str, b: Any, columns: int | None) -> None:
    """Raise for the first id with different tokens. Ids that no model can write do not matter."""
    a_tokens, b_tokens = _tokens(a), _tokens(b)
    for i in sorted(a_tokens.keys() | b_tokens.keys()):
        if columns is not None and i >= columns:
            return
        if a_tokens.get(i) != b_tokens.get(i):
            raise ValueError(
                f"vocabularies differ: token {i} is {a_tokens.get(i)!r} for {a_name} and "
                f"{b_tokens.get(i)!r} for {b_name}; a blend's models must share their vocabulary"
            )
