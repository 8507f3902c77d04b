"""The noise of draws and the draw on two levels, written a second time, in numpy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

GROUP = 256  # tokens


def philox4x32(counter: Sequence[Any], key: Sequence[Any]) -> list[np.ndarray]:
    """Philox-4x32-10 (Salmon et al., SC 2011) on numpy arrays of 32-bit words."""
    mask = np.uint64(0xFFFFFFFF)
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, dtype=np.uint64) for k in key)
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ k0,
            product1 & mask,
            (product0 >> np.uint64(32)) ^ c3 ^ k1,
            product0 & mask,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return [c0, c1, c2, c3]


def noise_words(seed: int, stream: Any, step: int, count: int, first: int = 0) -> np.ndarray:
    """The 32-bit words `[streams, count]` of a row's noise from counter `first` on."""
    stream = np.atleast_1d(np.asarray(stream, dtype=np.uint64))[:, None]
    low = np.uint64(0xFFFFFFFF)
    nth = first + np.arange((count + 3) // 4)[None, :]
    counter = (nth, step, stream & low, stream >> np.uint64(32))
    words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    shape = np.broadcast_shapes(*(w.shape for w in words))
    stacked = np.stack([np.broadcast_to(w, shape) for w in words], axis=-1)
    return stacked.reshape(shape[0], -1)[:, :count]


def group_words(seed: int, stream: Any, step: int, groups: int) -> np.ndarray:
    """The 32-bit words `[streams, groups]` of the noise of the first groups."""
    return noise_words(seed, stream, step, groups, first=2**31)


def gumbel_max(x: np.ndarray, seed: int, stream: Any, step: int) -> np.ndarray:
    """Tokens `[streams]` drawn from softmax(x), x `[V]`: a group by its mass, then one of its
    tokens."""
    groups = -(-len(x) // GROUP)
    mass = np.array([np.logaddexp.reduce(x[j * GROUP : (j + 1) * GROUP]) for j in range(groups)])
    group = (mass + gumbel(group_words(seed, stream, step, groups))).argmax(axis=1)
    noisy = x + gumbel(noise_words(seed, stream, step, len(x)))
    noisy[group[:, None] != np.arange(len(x)) // GROUP] = -np.inf
    return noisy.argmax(axis=1)


def gumbel(words: np.ndarray) -> np.ndarray:
    """-log(-log u), u = (word + 1/2) / 2^32, which float64 holds exactly."""
    return -np.log(-np.log((words.astype(np.float64) + 0.5) / 2.0**32))


@functools.cache
def forcing_streams(vocab: int, seed: int, step: int) -> tuple[list[int], np.ndarray]:
    """A stream for each token whose noise favours it most, and the noise `[vocab, vocab]`.

    For vocabularies of one group, in which the noise of groups decides nothing.

    Out of 2^14: row v of the noise is that of token v's stream, where v leads all others by several
    nats. Drawn with it, a token that is kept comes out unless it is far below the best, and one
    that truncation should have removed has its best chance to show that it was not.
    """
    assert vocab <= GROUP
    noise = gumbel(noise_words(seed, np.arange(2**14), step, vocab))
    best_two = np.partition(noise, vocab - 2, axis=1)[:, -2:]
    leader = noise.argmax(axis=1)
    lead = best_two[:, 1] - best_two[:, 0]
    streams = [int(np.where(leader == v, lead, -1.0).argmax()) for v in range(vocab)]
    return streams, noise[streams]
