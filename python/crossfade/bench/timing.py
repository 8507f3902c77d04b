"""Contenders that are timed in turns, and the hardware that they ran on."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

COLD_BYTES = 256 << 20  # inputs of this size, used in turn, are in no cache when they are read


def cpu_times(calls: dict[str, list[Callable[[], Any]]], seconds: float) -> dict[str, list[float]]:
    """Microseconds of single calls, for some `seconds`; the contenders take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for ways in calls.values():
        ways[0]()
    end = time.perf_counter() + seconds
    turn = 0
    while turn < 7 or time.perf_counter() < end:
        for name, ways in calls.items():
            call = ways[turn % len(ways)]
            start = time.perf_counter()
            call()
            times[name].append((time.perf_counter() - start) * 1e6)
        turn += 1
    return times


def cuda_times(calls: dict[str, list[Callable[[], Any]]], rounds: int) -> dict[str, list[float]]:
    """Microseconds a call, over some `rounds`; the contenders take turns.

    All calls of a contender are captured in one CUDA graph, which is replayed in each round.
    """
    graphs = {}
    for name, ways in calls.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # on which the inputs are made
        with torch.cuda.stream(side):
            for call in ways[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in ways:
                    call()
        except RuntimeError as error:  # as where a contender waits for the device
            print(f"{name} cannot be captured: {error}", file=sys.stderr)
            continue
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / len(calls[name]))
    return times


def hardware(device: str) -> dict[str, Any]:
    """What a reader of figures must know of the machine."""
    if device == "cuda":
        return {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    from ..ops import native

    isa = native._native.cpu_isa() if native._native else "none"
    return {"device": name, "threads": torch.get_num_threads(), "isa": isa}
