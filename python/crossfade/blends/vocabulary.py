"""The check that the models of a blend share one vocabulary: that equal ids are equal tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from ..models.hf import text_config
from .blend import Blend, Model, ValueHead

# Two models of one vocabulary may differ by so many columns. Their numbers are rounded up to
# multiples of 64, 128 or 512, and a few tokens are added to some: Qwen2 has 151,936 or 152,064 and
# Pythia 50,304 or 50,688. Different vocabularies differ by more: of Mistral's two, one has 32,000
# columns and the other 32,768, and their ids mean different tokens.
PADDING = 512


class Vocabulary(NamedTuple):
    """What is remembered of a tokenizer's vocabulary."""

    length: int  # len(tokenizer) when it was read; it changes when tokens are added
    size: int  # one more than the highest id
    digest: bytes  # a hash of all ids and tokens


# To read 150,000 tokens takes some 100 ms, so each tokenizer is read once, not at every call.
_read: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()


def check_vocabularies(blend: Blend, tokenizer: Any = None) -> int:
    """Check that all terms and values of a blend share a vocabulary, and return its size.

    The size is the number of columns of the logits that are decoded. It is one more than the
    tokenizers' highest id or, if there is no tokenizer, the smallest ``config.vocab_size`` of the
    models. Columns past it are padding; models of one family have different numbers of them.

    Where terms have tokenizers of their own, the tokens of each are compared one by one with those
    of `tokenizer` (or of the first term that has one), up to the columns of the smallest model. An
    id that one of the two does not define is padding there. The ids of a term without a tokenizer
    are taken to mean the same; only its number of columns can be checked, which may differ from
    those of the others by `PADDING`. A tokenizer may have up to `PADDING` tokens more than the
    smallest model has columns. The model may have twice as many columns as there are tokens, or
    `PADDING` more where that is more.

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
    """How many columns the logits of a term have."""

    name: str
    columns: int
    vouched: bool  # whether the term has a tokenizer, whose tokens are compared with the others'


def _check_padding(sizes: Sequence[Size]) -> None:
    """Raise an error if two models differ by more than padding and a tokenizer is missing."""
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
    """What is to be known of a tokenizer's vocabulary, remembered as long as the tokenizer lives.

    Raises:
        TypeError: it has no `get_vocab`.
    """
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
    """Raise an error for the first id that stands for different tokens in two tokenizers.

    Args:
        columns: ids from here on are not compared, as some model cannot write them; None compares
            all.
    """
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
