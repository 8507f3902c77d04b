"""What value heads over the policy's backbone cost in a search, for search.py.

Each search is set against plain sampling of as many rows, which draws as many tokens: what is above
1 is the value, the selection and the forks. Contenders take turns; their processor seconds are
compared, round by round.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import crossfade as cf
import torch
from crossfade.models.value_heads import value_head, value_model
from decode_peers import Wrong
from reports.search import APART, FOUR, ONE, PLAIN, SCALAR, over_plain
from search_peers import TEMPERATURE, Shape
from torch import Tensor
from tqdm import tqdm

GOALS = {ONE: 1.1, FOUR: 1.3}  # times plain sampling
TOLERANCE = 1e-3  # of values, which are sums of hundreds of products
Run = Callable[[], cf.Output]


def head_over(model: Any, kind: str, seed: int) -> Any:
    """A value model with numbers that no training gave."""
    found = value_model(model, kind)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in value_head(found).parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    return found.eval()


class Heads:
    """Contenders over one policy: plain sampling, and searches by heads over its backbone."""

    def __init__(self, model: Any, ids: Tensor, shape: Shape) -> None:
        self.model, self.ids, self.shape = model, ids, shape
        self.heads = [head_over(model, "q", seed) for seed in range(4)]
        self.scalar = head_over(model, "scalar", 4)
        one, *others = map(cf.ValueHead, self.heads)
        self.runs: dict[str, Run] = {
            PLAIN: lambda: self._generate(num_return_sequences=shape.rows),
            ONE: lambda: self._search(one),
            FOUR: lambda: self._search(sum(others, start=one)),
            SCALAR: lambda: self._search(cf.ValueHead(self.scalar)),
            APART: lambda: self._search(one, engine=cf.Engine(share_weights=False)),
        }
        self.values = {ONE: self.heads[:1], FOUR: self.heads, APART: self.heads[:1]}

    def _search(self, value: Any, **settings: Any) -> cf.Output:
        w, n, chunk = self.shape.width, self.shape.samples, self.shape.chunk_length
        return self._generate(search=cf.ChunkBeamSearch(w, n, chunk, value), **settings)

    def _generate(self, **settings: Any) -> cf.Output:
        return cf.generate(
            self.model,
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            max_new_tokens=self.shape.new,
            do_sample=True,
            temperature=TEMPERATURE,
            seed=0,
            **settings,
        )

    @torch.inference_mode()
    def check(self, name: str, out: cf.Output) -> None:
        """Check that a search's best row is whole and has the value that its heads give it.

        Raises:
            Wrong: names the contender.
        """
        response = out.responses[0]
        if len(response) != self.shape.new:
            raise Wrong(f"{name} wrote {len(response)} tokens of {self.shape.new}")
        if name == PLAIN:
            return
        text = torch.cat([self.ids, self.ids.new_tensor([response])], dim=1)
        if name == SCALAR:
            truth = self.scalar(text).logits[0, -1, 0].item()
        else:
            truth = sum(m(text).logits[0, -2, response[-1]].item() for m in self.values[name])
        if not abs(out.values[0].item() - truth) <= TOLERANCE * max(1.0, abs(truth)):
            raise Wrong(f"{name}: the best row's value is {out.values[0].item()}, and is {truth}")


def measure(
    model: Any, ids: Tensor, shape: Shape, rounds: int, limit: float
) -> list[dict[str, Any]]:
    """The row of each contender's figures, from rounds in which each has its turn."""
    heads = Heads(model, ids, shape)
    for name, run in heads.runs.items():  # untimed: models are looked at when they are first run
        heads.check(name, run())
    found: dict[str, list[float]] = {name: [] for name in heads.runs}
    outs: dict[str, cf.Output] = {}
    end = time.monotonic() + limit
    for _ in tqdm(range(rounds), desc=f"heads {dataclasses.astuple(shape)}", file=sys.stderr):
        for name, run in heads.runs.items():
            start = time.process_time()
            outs[name] = run()
            found[name].append(time.process_time() - start)
            heads.check(name, outs[name])
        if time.monotonic() > end:
            break
    return [
        {
            "shape": dataclasses.asdict(shape),
            "contender": name,
            "processor_s": [round(s, 3) for s in seconds],
            "forwards": [m.forwards for m in outs[name].stats.models],
        }
        for name, seconds in found.items()
    ]


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that were not reached."""
    for row in rows:
        goal = GOALS.get(row["contender"])
        over = over_plain(rows, row)
        if goal is not None and over is not None and over > goal:
            yield (
                f"{row['contender']}, {row['shape']}: {over:.2f} times plain sampling; the goal is "
                f"{goal}"
            )
