"""Functions that are recorded on some tensors and replayed on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from crossfade.decoding.engine.kv_cache import KVCache
from crossfade.decoding.engine.tape.program import Program, Recording, program_of
from crossfade.decoding.engine.tape.recording import Recorder, storage
from torch import Tensor

Function = Callable[..., Any]


def record(
    f: Function,
    inputs: Sequence[Tensor],
    *,
    rows: int | None = None,
    fixed: Sequence[Tensor] = (),
    cache: KVCache | None = None,
) -> Program:
    """The program of a function of tensors, which gives a tensor or a tuple of them."""
    with torch.no_grad(), Recorder() as recorder:
        results = f(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    rows = len(inputs[0]) if rows is None else rows
    own = {storage(x) for x in fixed}
    kept = KVCache(rows, 1) if cache is None else cache
    return program_of(Recording(recorder.calls, inputs, results, kept, own, rows))


def replayed(f: Function, first: Sequence[Tensor], then: Sequence[Tensor]) -> list[Tensor]:
    """What a function that was recorded on some tensors gives on others."""
    program = record(f, first)
    with torch.no_grad():
        program.run(then)
    return [x.clone() for x in program.results if x is not None]
