"""The one place that chooses what runs an op: "reference", "native" or "triton"."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch

from . import reference

NAMES = ("native", "triton", "reference")  # the fastest first


def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot take tensors of this device; None if it can."""
    if name == "reference":
        return None
    return _why_not(name, device.type, device.index)


@functools.cache
def _why_not(name: str, kind: str, index: int | None) -> str | None:
    if name == "native":
        from . import native

        return native.why_not(torch.device(kind) if index is None else torch.device(kind, index))
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "cpu" and not interpreted:
        return "Triton compiles for GPUs only (TRITON_INTERPRET=1 runs its interpreter on a CPU)"
    if kind not in ("cpu", "cuda", "xpu"):
        return f"Triton has no {kind} backend"
    return None


@functools.cache
def _fastest(device: torch.device) -> ModuleType:
    for name in NAMES:
        interpreted = name == "triton" and device.type == "cpu"  # for tests, never for speed
        if why_not(name, device) is None and not interpreted:
            return _module(name)
    raise AssertionError("the reference runs everywhere")


def _module(name: str) -> ModuleType:
    if name == "reference":
        return reference
    if name == "native":
        from . import native

        return native
    from . import triton

    return triton


def select(name: str | None, device: torch.device) -> ModuleType:
    """The module that runs an op on `device`: the one named, or the fastest that can."""
    if name is None:
        return _fastest(device)
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}; it must be None or one of {sorted(NAMES)}")
    reason = why_not(name, device)
    if reason is not None:
        raise ValueError(f"backend is {name!r}, which cannot run on {device}: {reason}")
    return _module(name)
