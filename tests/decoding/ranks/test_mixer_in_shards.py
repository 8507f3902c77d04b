"""A mixer draws from the columns of its rank. Ranks are threads here, and no model is there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import ops
from crossfade.decoding.mixer import Mixer
from crossfade.decoding.ranks import Shard
from tiny_models import make
from torch import Tensor


class Meeting:
    """Where the threads of all ranks give what they have to each other."""

    def __init__(self, size: int) -> None:
        self.barrier, self.given = threading.Barrier(size, timeout=30), [torch.empty(0)] * size

    def gather(self, rank: int, own: Tensor) -> Tensor:
        self.given[rank] = own
        self.barrier.wait()
        found = torch.cat(self.given)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Columns(Shard):
    rank: int = 0

    @property
    def reduce(self) -> ops.Reduce:
        return lambda own: self.ranks.gather(self.rank, own)


DRAWS: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"do_sample": False}]
BLENDS: dict[str, Callable[[cf.Model, cf.Model], cf.Blend]] = {
    "a difference": lambda a, b: 1.5 * a - 0.5 * b,
    "a support": lambda a, b: (1.5 * a - 0.5 * b).within(cf.Support(1, top_k=3)),
    "a power mean": lambda a, b: cf.power_mean([a, b], [0.3, 0.7], 1.0),
}


@pytest.mark.parametrize("vocabulary", [1000, 700, 300])
@pytest.mark.parametrize(
    ("kind", "draw"), [*(("a difference", x) for x in DRAWS), *((k, {}) for k in BLENDS)], ids=str
)
def test_tokens_are_those_of_whole_rows(vocabulary: int, kind: str, draw: dict[str, Any]) -> None:
    """The second term's logits are whole on each rank. With few tokens the last ranks have padding
    alone, where the second term has no column at all: nothing may be counted there."""
    blend = BLENDS[kind](cf.Model(make()), cf.Model(make(seed=1)))
    weights: list[Any] = [tuple(blend.weights), (), (), ()]
    made = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(4, 1002, generator=made)
    second = 3 * torch.randn(4, vocabulary, generator=made)
    second[:, 0] = 9.0  # a token whose mass would be seen where it is counted twice
    draw = {"seed": 3, "stream": torch.arange(4), "step": 0, **draw}
    whole = Mixer(blend, weights, vocabulary).sample([first, second], draw)

    meeting = Meeting(3)

    def on_rank(rank: int) -> ops.BlendSample:
        shard = Columns(meeting, 334 * rank, 334 * (rank + 1), 1002, rank)  # type: ignore[arg-type]
        mixer = Mixer(blend, weights, vocabulary, shard=shard)
        return mixer.sample([first[:, shard.first : shard.end], second], draw)

    with ThreadPoolExecutor(3) as threads:
        for sample in threads.map(on_rank, range(3)):
            assert sample.tokens.tolist() == whole.tokens.tolist()
            torch.testing.assert_close(sample.logprobs, whole.logprobs, atol=1e-5, rtol=0)
