"""The ops under pytest-benchmark: pytest bench/test_ops.py --benchmark-group-by=param:case

`crossfade bench ops` measures the same contenders in turns, which is what the tables are made of.
"""

import functools
import itertools
from dataclasses import astuple

import pytest
import torch
from crossfade import bench
from crossfade.bench.contenders import contenders
from crossfade.bench.timing import prepared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
kept = functools.lru_cache(maxsize=1)(contenders)


@pytest.mark.parametrize("contender", ["read", "ours", "torch chain"])
@pytest.mark.parametrize(
    "case", bench.cases(DEVICE, quick=False), ids=lambda c: "-".join(map(str, astuple(c)))
)
def test_blend_sample(benchmark, case, contender):
    ways, turns = kept(case, DEVICE)[contender], itertools.count()

    def setup():
        turn = next(turns)
        call = prepared(ways, turn, cold=True) if DEVICE == "cpu" else ways[turn % len(ways)]
        return (call,), {}

    def target(call):
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(target, setup=setup, rounds=20, warmup_rounds=3)
