"""A rank of `bench/scale.py shards`, which starts it by torchrun; writes what it measured as JSON.

Steps of a model in shards, with heads in shards and with logits that are gathered, and how long a
round between ranks takes for some sizes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import crossfade as cf
import torch
from crossfade.decoding.job import Job
from torch import distributed
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

ROUNDS = 5


def seconds_of(call: Callable[[], Any], times: int) -> float:
    """The median of rounds of so many calls, a call; all ranks call it together."""
    call()
    each = []
    for _ in range(ROUNDS):
        distributed.barrier()
        start = time.perf_counter()
        for _ in range(times):
            call()
        each.append((time.perf_counter() - start) / times)
    return statistics.median(each)


def step_of(model: Any, rows: int, tokens: int) -> float:
    """Seconds a token of each of `rows`, without the prompt."""
    prompts = [[5 + i, 9, 100, 7] for i in range(rows)]
    options: dict[str, Any] = {"seed": 1, "do_sample": True, "eos_token_id": None}

    def write(count: int) -> float:
        start = time.perf_counter()
        cf.generate(cf.Model(model), prompts, max_new_tokens=count, **options)
        return time.perf_counter() - start

    write(tokens + 2)  # It checks the model, and records what it can.
    each = [(write(tokens + 2) - write(2)) / tokens for _ in range(ROUNDS)]
    return statistics.median(each)


def main(folder: Path, batches: list[int], tokens: int) -> None:
    distributed.init_process_group("gloo")
    ranks = distributed.get_world_size()
    config = DistributedConfig(tp_size=ranks)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=config).eval()
    width, vocab = model.config.hidden_size, model.config.vocab_size
    gather = cf.ops.all_gather()
    found: dict[str, Any] = {"steps": {}, "sums": {}, "small": {}, "rows": {}}
    for rows in batches:
        hidden, small = torch.zeros(rows, 1, width), torch.zeros(1, rows, 3, 8, dtype=torch.float64)
        part = torch.zeros(rows, vocab // ranks)
        found["sums"][rows] = seconds_of(lambda x=hidden: distributed.all_reduce(x), 50)
        found["small"][rows] = seconds_of(lambda x=small: gather(x), 50)
        found["rows"][rows] = seconds_of(lambda x=part: gather(x[None]), 20)
        whole = patch.object(Job, "why_whole", "it is measured so")
        found["steps"][rows] = {"in shards": step_of(model, rows, tokens)}
        with whole:
            found["steps"][rows]["gathered"] = step_of(model, rows, tokens)
    if distributed.get_rank() == 0:
        (folder / "measured.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
