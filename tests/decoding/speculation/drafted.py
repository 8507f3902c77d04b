"""What tests of drafts share: models, requests, and calls with and without a draft that agree."""

from __future__ import annotations

import functools
import random
from typing import Any, NamedTuple

import crossfade as cf
import torch
from crossfade.decoding.output import Output
from tiny_models import VOCAB, make
from transformers import PreTrainedModel

PROMPTS = [
    [7, 9, 30, 12, 8, 7, 9, 30, 12],
    [40],
    [11, 12, 13, 14, 15, 16, 17, 18, 19, 11, 12, 13],
    [33, 6],
    [21, 22, 21, 22, 21],
]
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 5, "progress": False, "eos_token_id": None}
GREEDY: dict[str, Any] = {"do_sample": False, "progress": False, "eos_token_id": None}
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@functools.cache
def model(shape: str = "llama", seed: int = 0) -> PreTrainedModel:
    return make(shape, seed)


def blend(first: str = "llama", second: str = "gpt2") -> Any:
    return cf.Model(model(first, 0)) + 0.5 * cf.Model(model(second, 1))


class Both(NamedTuple):
    """The outputs of a call without a draft and with one, which are the same."""

    plain: Output
    drafted: Output


def both(
    target: Any, prompts: Any, draft: cf.Draft, plain: Output | None = None, **arguments: Any
) -> Both:
    """Decode with and without a draft, and check that both give the same.

    Args:
        plain: what the call without one gave, if it is known.
    """
    plain = plain or cf.generate(target, prompts, **arguments)
    found = Both(plain, cf.generate(target, prompts, draft=draft, **arguments))
    check_same(found.drafted, plain)
    return found


def check_same(ours: Output, theirs: Output) -> None:
    """Two outputs have the same tokens, and the same numbers within rounding."""
    assert ours.responses == theirs.responses
    for name in ("sequences", "lengths", "finished", "ended", "failed"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.text == theirs.text
    for name in (
        *("logprobs", "sampled_logprobs", "term_logprobs", "kl", "kl_to_base", "entropies"),
        *("values", "value_parts", "weights", "pushes"),
    ):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, **CLOSE, equal_nan=True, msg=name)


def noise(rows: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Texts that nobody would write."""
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(tokens)] for _ in range(rows)]


def changed(ids: list[int], at: int) -> list[int]:
    """A text with another token at one place."""
    return [*ids[:at], (ids[at] + 1) % VOCAB, *ids[at + 1 :]] if at < len(ids) else list(ids)
