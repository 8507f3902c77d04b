"""Whether the models of a blend speak of the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from .blend import Blend, Model, ValueHead
from .terms import text_config

# Columns by which models of one vocabulary may differ. They are padded to multiples of 64, 128 or
# 512, and a few tokens are added to some: Qwen2's 151,936 and 152,064, Pythia's 50,304 and 50,688.
# Vocabularies that were extended differ by more: Mistral's 32,000 and 32,768 share no ids.
PADDING = 512


class Vocabulary(NamedTuple):
    length: int  # len(tokenizer) when it was read: adding tokens changes it
    size: int  # the highest id and one
    digest: bytes


# Reading 150,000 tokens takes some 100 ms: once a tokenizer, not once a call.
_read: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def check_vocabularies(blend: Blend, tokenizer: Any = None) -> int:
    """The vocabulary that all terms and values of a blend share: the number of columns to decode.

    Where terms have tokenizers of their own, their tokens are compared one by one with those of
    `tokenizer` (or of the first term that has one), as far as every model has columns. An id that
    one of them does not define is padding there. Terms without a tokenizer are trusted that their
    ids mean the same: this cannot be checked, but for their numbers of columns.

    The vocabulary ends with the tokenizers' highest id or, if none is given, with the smallest
    model's ``config.vocab_size``. Columns past it are padding, which models of one family have in
    different numbers. Where no tokenizer vouches for a model, it may have up to `PADDING` columns
    more or fewer than the others. A tokenizer may have as many tokens more than a model has
    columns, and half as many at least.

    Args:
        blend: what is decoded.
        tokenizer: the tokenizer of the inputs, if there is one.

    Raises:
        TypeError: a tokenizer has no `get_vocab`.
        ValueError: two tokenizers differ; names the first token that does, its id and both terms.
            The sizes of two models, or of a model and a tokenizer, differ by more than padding.
            Or nothing says how large the vocabulary is.
    """
    members: tuple[Model | ValueHead, ...] = (*blend.terms, *blend.values)
    sizes: list[Size] = []  # of the models
    tokenizers = [("the inputs", tokenizer)] if tokenizer is not None else []
    for name, m in zip((*blend.names, *blend.value_names), members, strict=True):
        columns = getattr(text_config(m.model), "vocab_size", None)
        if columns is not None:
            sizes.append(Size(name, columns, m.tokenizer is not None))
        if m.tokenizer is not None:
            tokenizers.append((name, m.tokenizer))
    least = min(sizes, key=lambda s: s.columns, default=None)
    if not tokenizers and least is None:
        raise ValueError(
            f"the config of {blend.names[0]} has no vocab_size and no term has a tokenizer; one of "
            "them must say how large the vocabulary is"
        )
    _check_padding(sizes)
    for name, one in tokenizers[:1]:
        for other_name, other in tokenizers[1:]:
            if other is not one and vocabulary(other).digest != vocabulary(one).digest:
                _compare(name, one, other_name, other, None if least is None else least.columns)
    known = min((vocabulary(t).size for _, t in tokenizers), default=None)
    if known is None or least is None:
        return known if least is None else least.columns  # type: ignore[return-value]
    if known - least.columns > PADDING or least.columns - known > max(PADDING, known):
        raise ValueError(
            f"the tokenizer of {tokenizers[0][0]} has {known:,} tokens and the model of "
            f"{least.name} {least.columns:,} columns, more or fewer than padding explains; give "
            "the tokenizer of that model"
        )
    return min(known, least.columns)


class Size(NamedTuple):
    name: str
    columns: int
    vouched: bool  # by a tokenizer of its own


def _check_padding(sizes: Sequence[Size]) -> None:
    """Models whose tokens nobody compares have as many columns, but for padding."""
    for a in sizes:
        for b in sizes:
            alike = abs(a.columns - b.columns) <= PADDING or (a.vouched and b.vouched)
            if not alike:
                raise ValueError(
                    f"vocabularies differ: {a.name} has {a.columns:,} columns and {b.name} "
                    f"{b.columns:,}, more than padding explains ({PADDING}); a blend's models must "
                    "share their vocabulary. If their tokens are the same, give both "
                    "Model(..., tokenizer=...), which are then compared token by token"
                )


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
    for i in sorted(a_tokens.keys() & b_tokens.keys()):
        if columns is not None and i >= columns:
            return
        if a_tokens[i] != b_tokens[i]:
            raise ValueError(
                f"vocabularies differ: token {i} is {a_tokens[i]!r} for {a_name} and "
                f"{b_tokens[i]!r} for {b_name}; a blend's models must share their vocabulary. If "
                f"the difference does not matter, leave the tokenizer of {b_name} out: its ids are "
                "then taken to mean the same"
            )
