"""A mixer draws from the columns of its rank. Ranks are threads here, and no model is there."""

from __future__ import annotations

import threading
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


@pytest.mark.parametrize("vocabulary", [1000, 700, 300])
@pytest.mark.parametrize("draw", [{}, {"top_p": 0.9}, {"do_sample": False}])
def test_tokens_are_those_of_whole_rows(vocabulary: int, draw: dict[str, Any]) -> None:
    """The second term's logits are whole on each rank. With few tokens the last ranks have padding
    alone, where the second term has no column at all."""
    blend = 1.5 * cf.Model(make()) - 0.5 * cf.Model(make(seed=1))
    weights: list[Any] = [(1.5, -0.5), (), (), ()]
    made = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(4, 1002, generator=made)
    second = 3 * torch.randn(4, vocabulary, generator=made)
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
